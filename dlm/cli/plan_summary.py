"""Sum up a plan: a row for each budget with its cells and what they cost, and a picture of the sizes in characters."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from dlm.core import table, text
from dlm.plan.cells import TUNE, Cell, Plan

MOST_SIZES = 12  # rows of the picture; with more sizes, a row stands for neighbouring sizes
MOST_DOTS = 5  # runs that are drawn as one dot each; if a place of the picture has more, all places hold numbers
EXPENDABLE = ("tokens", "N", "price")  # the columns that a narrow terminal lacks, the least important one first


def summary_rows(plan: Plan, proof: Sequence[Cell]) -> list[dict[str, str]]:
    """Return a row for each budget, one for the tuning cells, one for their sum, and one for the proof run.

    Args:
        plan: The plan with its estimates.
        proof: The expected proof runs with estimates; their sizes and costs are approximate.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in sorted(plan.grid, key=lambda cell: (cell.role == TUNE, cell.budget_flops)):
        budget = text.flops(cell.budget_flops)
        groups.setdefault(f"tune {budget}" if cell.role == TUNE else budget, []).append(cell)
    if len(groups) > 1:
        groups["sum"] = list(plan.grid)
    if proofs := _proofs(plan, proof):
        groups["proof"] = proofs
    rows = [_row(name, cells, price=plan.spec.hardware.price_per_gpu_hour) for name, cells in groups.items()]
    empty = {head for head in rows[0] if all(row[head] == "-" for row in rows)}
    return [{head: value for head, value in row.items() if head not in empty} for row in rows]


def _row(name: str, cells: Sequence[Cell], *, price: float | None) -> dict[str, str]:
    hours = [cell.estimate.hours for cell in cells]
    on_gpus = sum(cell.estimate.gpu_hours or 0.0 for cell in cells)
    is_known = None not in hours
    alone = "-" if on_gpus or not is_known else text.duration(3600 * sum(hour or 0.0 for hour in hours))
    cost = on_gpus * price if price is not None and is_known and on_gpus else None
    return {
        "budget": name,
        "cells": str(len(cells)),
        "N": _span(cell.num_params for cell in cells),
        "tokens": _span(cell.tokens for cell in cells),
        "GPU-hours": f"{on_gpus:,.4g}" if on_gpus and is_known else "-",
        "one process": alone,
        "price": "-" if cost is None else f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}",
    }


def _span(values: Iterable[float]) -> str:
    found = sorted(values)
    low, high = text.count(found[0]), text.count(found[-1])
    return low if low == high else f"{low} to {high}"


def _proofs(plan: Plan, proof: Sequence[Cell]) -> list[Cell]:
    return [*(cell for cell in plan.cells if cell.is_proof), *proof]


def picture(plan: Plan, proof: Sequence[Cell], *, width: int, dot: str = "o", empty: str = ".") -> Sequence[str]:
    """Draw how many runs there are of each size (down) at each budget (across), in lines of at most ``width``.

    Args:
        plan: The plan.
        proof: The expected proof runs, drawn as P.
        width: The width of the terminal.
        dot: The character for a run, if each place has few.
        empty: The character for a place without runs.
    """
    cells = [*plan.grid, *_proofs(plan, proof)]
    kinds = ["t" if cell.role == TUNE else dot for cell in plan.grid] + ["P"] * (len(cells) - len(plan.grid))
    sizes = _Bins([cell.num_params for cell in cells], MOST_SIZES)
    budgets = sorted({cell.budget_flops for cell in cells})
    for number in range(len(budgets), 0, -1):  # with too many budgets for the width, a column stands for neighbours
        columns = _Bins(budgets, number)
        places: dict[tuple[int, int], Counter[str]] = {}
        for cell, kind in zip(cells, kinds, strict=True):
            where = sizes.of(cell.num_params), columns.of(cell.budget_flops)
            places.setdefault(where, Counter())[kind] += 1
        lines = _lines(places, sizes, columns, dot=dot, empty=empty)
        if max(map(len, lines)) <= width:
            break
    return lines


def _lines(
    places: Mapping[tuple[int, int], Counter[str]], sizes: _Bins, columns: _Bins, *, dot: str, empty: str
) -> Sequence[str]:
    """Return the lines of the picture, the largest size at the top."""
    has_dots = all(sum(found.values()) <= MOST_DOTS for found in places.values())
    rows = [["N", *(text.flops(start) for start in columns.starts)]]
    for row in reversed(range(len(sizes.starts))):
        found = [places.get((row, at), Counter()) for at in range(len(columns.starts))]
        rows.append([text.count(sizes.starts[row]), *(_drawn(one, dot, has_dots=has_dots) or empty for one in found)])
    return table.laid_out(rows, left=()).lines


def legend(plan: Plan, proof: Sequence[Cell]) -> str:
    """Return what the picture shows, in one sentence."""
    marks = ["t: tunes the recipe"] if any(cell.role == TUNE for cell in plan.grid) else []
    marks += ["P: proof run"] if _proofs(plan, proof) else []
    return "; ".join(["the runs of each size N at each budget", *marks])


def _drawn(found: Counter[str], dot: str, *, has_dots: bool) -> str:
    if has_dots:
        return "".join(kind * found[kind] for kind in (dot, "t", "P"))
    return "+".join(f"{found[kind]}{'' if kind == dot else kind}" for kind in (dot, "t", "P") if found[kind])


class _Bins:
    """Values in ascending groups: each by itself, or if there are more than ``most``, neighbours on a log scale."""

    def __init__(self, values: Sequence[float], most: int) -> None:
        self.starts: list[float] = sorted(set(values))  # the lowest value of each group
        if len(self.starts) > most:
            low, high = math.log(self.starts[0]), math.log(self.starts[-1])
            step = (high - low) / most
            first: dict[int, float] = {}
            for value in self.starts:
                first.setdefault(min(int((math.log(value) - low) / step), most - 1), value)
            self.starts = list(first.values())

    def of(self, value: float) -> int:
        """Return the number of the group of a value."""
        return bisect.bisect_right(self.starts, value) - 1
