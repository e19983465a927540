"""The causes for which a run has no row in runs.csv, as excluded.csv states them, and what to do about each."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from dlm.record.outcomes import OUTCOMES


class Cause(StrEnum):
    """Why a run is left out of runs.csv, where its ``State`` does not give the reason."""

    OTHER_CONFIG = "another config"
    OTHER_CONVENTION = "another convention"
    DUPLICATE = "duplicate"
    SHORT = "short"
    STOPPED_EARLY = "stopped early"
    LONG = "long"
    NO_VALIDATION = "missing validation"
    NOT_LEARNED = "did not learn"


ADVICE: Mapping[str, str] = {
    **{str(state): outcome.advice for state, outcome in OUTCOMES.items()},
    Cause.OTHER_CONFIG: "move the folder of the other run away, then submit the cell again",
    Cause.OTHER_CONVENTION: "state how the FLOPs of these runs are counted, or give them as the sweep counts them",
    Cause.DUPLICATE: "nothing: the other run of the same cell counts",
    Cause.SHORT: "submit again: the run ended before its planned last step",
    Cause.STOPPED_EARLY: "train it with `python -m dlm.launch --rerun`, without the callback that stopped it",
    Cause.LONG: "submit again: the run went on beyond its planned last step",
    Cause.NO_VALIDATION: "validate at the planned last step: the law needs the loss there",
    Cause.NOT_LEARNED: "train it on more tokens or at another learning rate, or leave such cells out of the definition",
}
