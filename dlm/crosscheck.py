"""crosscheck: two records of one run -> the lines that say where they disagree. Called by runrow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

# The run directory keeps 64-bit numbers, and so does W&B: what differs by more than rounding differs.
RELATIVE_TOLERANCE = 1e-9
COMPARED = ("train/loss", "val/loss", "val/loss_se", "lr", "grad_norm", "tokens")
Row = dict[str, Any]


def differ(first: Any, second: Any) -> bool:
    """Whether two values are not the same record; NaN equals NaN."""
    if not (_is_number(first) and _is_number(second)):
        return bool(first != second)
    if math.isnan(first) or math.isnan(second):
        return math.isnan(first) != math.isnan(second)
    return not math.isclose(first, second, rel_tol=RELATIVE_TOLERANCE)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else repr(value)


def check_values(ours: Mapping[str, Any], theirs: Mapping[str, Any], first: str, where: str) -> Iterator[str]:
    """A line for each value that both have and that differs; ``first`` is where ours stand, and counts."""
    for what, mine in ours.items():
        its = theirs.get(what)
        if mine is not None and its is not None and differ(mine, its):
            yield f"{what} is {_shown(mine)} in {first} and {_shown(its)} in {where}: {first} counts"


def check_history(ours: list[Row], theirs: list[Row], first: str, where: str) -> Iterator[str]:
    """At most three lines: how many steps differ, with the first number that does; how many either side lacks."""
    mine, its = ({row["step"]: row for row in rows} for rows in (ours, theirs))
    different = [found for row in ours for found in _differences(row, its.get(row["step"], {}))]
    if different:
        step, key, here, there = different[0]
        steps = len({found[0] for found in different})
        yield (
            f"{steps} of {len(ours)} logged steps differ between {first} and {where}, first {key} at step "
            f"{step}: {_shown(here)} and {_shown(there)}; {first} counts"
        )
    yield from _lacking(ours, its, where, first)
    yield from _lacking(theirs, mine, first, where)


def _differences(ours: Row, theirs: Row) -> Iterator[tuple[int, str, float, float]]:
    for key in COMPARED:
        mine, its = ours.get(key), theirs.get(key)
        if mine is not None and its is not None and differ(mine, its):
            yield ours["step"], key, mine, its


def _lacking(rows: list[Row], others: Mapping[int, Row], who: str, has: str) -> Iterator[str]:
    """A line when ``others`` lacks steps of ``rows``, or a number at one."""
    found = [
        (row["step"], key)
        for row in rows
        for key in COMPARED
        if row.get(key) is not None and others.get(row["step"], {}).get(key) is None
    ]
    if found:
        (step, key), steps = found[0], len({step for step, _ in found})
        yield f"{who} lacks {steps} of the {len(rows)} logged steps that {has} has, first {key} at step {step}"
