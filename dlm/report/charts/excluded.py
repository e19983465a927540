"""Sum up why runs were left out of the law, and what to do about each cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlm.record.causes import ADVICE
from dlm.record.outcomes import State
from dlm.report.charts.runs import rows_of

if TYPE_CHECKING:
    import pandas as pd

UNKNOWN = "left out"  # of rows of an older excluded.csv, which states the cause within the reason only
SEE_REASON = "see the reason of each run"


def excluded_summary(excluded: pd.DataFrame | None) -> list[tuple[str, int, str]]:
    """Count the runs of each cause, the most frequent first: (cause in words, number of runs, what to do)."""
    counts: dict[str, int] = {}
    for row in rows_of(excluded):
        status = str(row.get("status", UNKNOWN))
        cause = str(row.get("cause", UNKNOWN if status == State.DONE else status))
        counts[cause] = counts.get(cause, 0) + 1
    ranked = sorted(counts.items(), key=lambda found: -found[1])
    return [(cause.replace("_", " "), count, ADVICE.get(cause, SEE_REASON)) for cause, count in ranked]
