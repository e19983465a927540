"""crosscheck: two records of one run -> the lines that say where they disagree. Called by collect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

# The run directory keeps 64-bit numbers, and so does W&B: what differs by more than rounding differs.
RELATIVE_TOLERANCE = 1e-9
COMPARED = ("train/loss", "val/loss", "val/loss_se", "lr", "grad_norm", "tokens")


def differ(first: float, second: float) -> bool:
    """Whether two numbers are not the same record; NaN equals NaN."""
    if math.isnan(first) or math.isnan(second):
        return math.isnan(first) != math.isnan(second)
    return not math.isclose(first, second, rel_tol=RELATIVE_TOLERANCE)


def check_value(what: str, ours: float | None, theirs: float | None, first: str, where: str) -> Iterator[str]:
    """A line when both are there and differ; ``first`` is where ours stands, and counts."""
    if ours is not None and theirs is not None and differ(ours, theirs):
        yield f"{what} is {ours:.10g} in {first} and {theirs:.10g} in {where}: {first} counts"


def check_history(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], where: str) -> Iterator[str]:
    """At most two lines: how many steps differ, with the first number that does; how many ``where`` lacks."""
    other = {row["step"]: row for row in theirs}
    different = [found for row in ours for found in _differences(row, other.get(row["step"], {}))]
    if different:
        step, key, mine, its = different[0]
        steps = len({found[0] for found in different})
        yield (
            f"{steps} of {len(ours)} logged steps differ between metrics.jsonl and {where}, first {key} at step "
            f"{step}: {mine:.10g} and {its:.10g}; the run directory's counts"
        )
    lacking = [row["step"] for row in ours if row["step"] not in other]
    if lacking:
        yield f"{where} lacks {len(lacking)} of {len(ours)} logged steps, first step {lacking[0]}"


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[int, str, float, float]]:
    for key in COMPARED:
        mine, its = ours.get(key), theirs.get(key)
        if isinstance(mine, (int, float)) and isinstance(its, (int, float)) and differ(mine, its):
            yield ours["step"], key, float(mine), float(its)
