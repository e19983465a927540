"""The reasons for which a run has no row in runs.csv, as excluded.csv states them."""

from __future__ import annotations

from enum import StrEnum

from dlm.record.outcomes import State


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


class Excluded(Exception):
    """Signals that a run is left out of runs.csv. The exception text is the reason shown in excluded.csv.

    Args:
        cause: The cause, or the state of the run where the state is the reason.
        details: What was found, and what the user should do.
        progress: The progress of a cell without a result, such as ', step 5 of 10'.
    """

    def __init__(self, cause: Cause | State, details: str, *, progress: str = "") -> None:
        super().__init__(f"{cause}{progress}: {details}")
        self.cause = cause
        self.details = details
