"""crosscheck: two records of one run -> the lines that say where they disagree. Called by runrow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dlm.collect.sources import CellFiles
from dlm.record.run import Result


def check_row_agrees(cell: CellFiles, planned: Mapping[str, Any]) -> None:
    """Warn of every value that the sources do not agree on: the plan, the result, the logged steps."""
    for one in cell.logged:
        cell.warn(check_values(planned, one.run.record, "the plan", one.where))
    result, step = cell.now.result, cell.recipe.steps
    read = [("metrics.jsonl", cell.history), *((one.where, one.history) for one in cell.logged if one.read)]
    read = [(name, history) for name, history in read if history.num_rows]
    if result is not None:
        first = "result.json" if cell.source == "run_dir" else "the result in W&B"
        for one in cell.logged:
            if one.source != cell.source and (other := one.result) is not None:
                cell.warn(check_values(_fields_of(result), _fields_of(other), first, one.where))
        final = [f"val/loss at step {step}", f"val/loss_se at step {step}"]
        ours = dict(zip(final, (result.loss, result.loss_se), strict=True))
        for name, history in read:
            cell.warn(check_values(ours, dict(zip(final, history.at(step), strict=True)), first, name))
    if len(read) > 1:
        first, rows = read[0][0], read[0][1].rows()
        for name, history in read[1:]:
            cell.warn(check_history(rows, history.rows(), first, name))


def _fields_of(result: Result) -> dict[str, Any]:
    return {f"{item}, of the result,": value for item, value in dataclasses.asdict(result).items()}


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
