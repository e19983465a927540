"""The signal that a run gets no row in runs.csv, with the cause and the reason that excluded.csv states."""

from __future__ import annotations

from dlm.record.causes import Cause as Cause
from dlm.record.outcomes import State


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
