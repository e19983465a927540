"""Why a run has no row in runs.csv: the cause, and the line that excluded.csv shows."""

from __future__ import annotations

from enum import StrEnum

from dlm.record.outcomes import State


class Cause(StrEnum):
    """Why a run is left out, where no state says it."""

    OTHER_CONFIG = "another config"
    OTHER_CONVENTION = "another convention"
    DUPLICATE = "duplicate"
    SHORT = "short"
    LONG = "long"
    NO_VALIDATION = "missing validation"
    NOT_LEARNED = "did not learn"


class Excluded(Exception):
    """A run is left out of runs.csv. As text it is the reason in excluded.csv: the cause, then the details.

    Args:
        cause: The cause, or the state of a run that says why it does not count.
        details: What was found, and what the user should do.
        progress: How far a cell without a result came, such as ', step 5 of 10'.
    """

    def __init__(self, cause: Cause | State, details: str, *, progress: str = "") -> None:
        super().__init__(f"{cause}{progress}: {details}")
        self.cause = cause
