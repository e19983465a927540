"""Say why a cell or an exponent is not determined, and what to run next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.hparams.cells import AXES, Runs
from dlm.fit.hparams.powers import LEAST_SPREAD, Power
from dlm.fit.hparams.result import WORDS, Cell, shown
from dlm.fit.points import Array, Interval

FACTOR = 2.0  # multiple of the outermost setting to run next when the best one lies beyond it
FEW_FAILED = 0.005  # largest share of draws without a minimum that gives no warning
MOST_NAMED = 3  # cells that an error names


def edge(tried: Mapping[str, Interval], best: Mapping[str, float], *, slack: float) -> tuple[str, str]:
    """Why the best settings lie outside those tried, and what to run; ('', '') if they lie within.

    Args:
        tried: The lowest and the highest setting of each axis.
        best: The best setting of each axis.
        slack: The share by which the best may exceed the outermost setting; with 0, it must lie inside.
    """
    for name, (low, high) in tried.items():
        value, what = best[name], WORDS[name]
        if value > high * (1 + slack) or (not slack and value >= high):
            return f"every {what} up to {shown(name, high)} lies below the best", f"add {shown(name, FACTOR * high)}"
        if value < low * (1 - slack) or (not slack and value <= low):
            return f"every {what} from {shown(name, low)} lies above the best", f"add {shown(name, low / FACTOR)}"
    return "", ""


def one_side(cells: Sequence[Cell]) -> UserError:
    """The error for cells of which none has its best settings within those tried."""
    more = len(cells) - MOST_NAMED
    said = "; ".join(_with_place(cell) for cell in cells[:MOST_NAMED])
    return UserError(
        f"no tuning cell has its best settings within those tried: {said}{f'; and {more} more' if more > 0 else ''}"
    )


def no_minimum(cells: Mapping[int, Cell]) -> UserError:
    """The error for losses that do not turn upward: all cells lie on one side of the best, or noise hides it."""
    if all(not cell.usable for cell in cells.values()):
        return one_side(list(cells.values()))
    what = text.listed([WORDS[name] for name in next(iter(cells.values())).tried])
    return UserError(
        f"over the values of {what} that were tried, the loss does not turn upward on both sides of the best: noise "
        "hides it; add runs at 1/4 and 4 times the best, or replicates"
    )


def _with_place(cell: Cell) -> str:
    return f"at N {text.count(cell.params)}, D {text.count(cell.tokens)} {cell.reason} ({cell.next})"


def refused(cells: Iterable[Cell]) -> list[str]:
    """A warning for each cell that enters no law."""
    return [f"left out: {_with_place(cell)}" for cell in cells if not cell.usable]


def undetermined(powers: Mapping[str, Power], log_n: Array, log_d: Array) -> Iterator[str]:
    """Warnings about exponents that the cells do not determine, and what follows from that."""
    varies = [name for name, values in (("N", log_n), ("D", log_d)) if np.ptp(values) >= LEAST_SPREAD]
    for name, power in powers.items():
        what = WORDS[name]
        needed = [size for size in ("N", "D") if name == "lr" or size == "D"]
        missing = [size for size in needed if size not in varies]
        if missing:
            yield (
                f"the cells have nearly one {text.listed(missing)}, so the exponent of {text.listed(missing)} for the "
                f"{what} is not known, and 0 in the recipe: tune at another {text.listed(missing)} too"
            )
        elif power.free < len(needed):
            slope = float(np.polyfit(log_n, log_d, 1)[0])
            yield (
                f"the cells lie along one line, D ~ N^{slope:.2f}, which does not show the exponents of N and D apart: "
                f"the recipe has the {what} of this line and takes it as constant across the line, so off the line it "
                "may be wrong; tune a second size at one of the budgets to tell the exponents apart"
            )
        if len(log_n) == 1 + power.free and power.free:
            yield (
                f"the law of the {what} has as many cells as coefficients: its interval holds the noise of the runs, "
                "and nothing shows how far cells scatter about a power law"
            )


def batches(used: Runs, axes: Sequence[int]) -> list[str]:
    """What holds for one value of the setting that was not varied, or a warning that it differs between cells."""
    if len(axes) == len(AXES):
        return []
    (other,) = (axis for axis in range(len(AXES)) if axis not in axes)
    mine, name = WORDS[AXES[axes[0]]], AXES[other]
    values = np.unique(np.round(np.exp(used.settings[:, other]), 12))
    if not np.isfinite(values).all():
        return [f"the table does not hold the {WORDS[name]} of the runs: the best {mine} is that of whatever was used"]
    if len(values) == 1:
        return []
    ends = f"{shown(name, values[0])} to {shown(name, values[-1])}"
    return [
        f"the cells differ in {WORDS[name]} ({ends}), which is not varied within them: the law of the {mine} mixes "
        "its effect in"
    ]


def left_out(runs: Runs, near: Runs, axes: Sequence[int], *, has_interaction: bool) -> Iterator[str]:
    """Notes on runs that serve no fit, and on what the laws assume."""
    tuned = np.isin(runs.cell, near.cell)
    far = int(tuned.sum()) - len(near.cell)
    if far:
        yield (
            f"{text.counted(far, 'run')} of these cells left out: further than a factor of four from the best setting, "
            "or off the best value of a setting that is not fitted"
        )
    if not tuned.all():
        yield f"{text.counted(int((~tuned).sum()), 'run')} of cells with too few settings serve no tuning"
    if len(axes) == len(AXES):
        if not has_interaction:
            yield "no cell varies rate and batch together: their best values are taken as independent of each other"
        return
    (other,) = (axis for axis in range(len(AXES)) if axis not in axes)
    values = np.unique(np.round(np.exp(near.settings[:, other]), 12))
    if len(values) == 1 and np.isfinite(values).all():
        name = AXES[other]
        unit = " tokens" if name == "batch" else ""
        yield f"all runs have a {WORDS[name]} of {shown(name, values[0])}{unit}, and the law holds for this value"


def failed(curvatures: Array) -> list[str]:
    """A warning if the loss does not turn upward in many draws, whose curvatures, (R, k, k), are then NaN."""
    share = float((~np.isfinite(curvatures)).any(axis=(1, 2)).mean()) if len(curvatures) else 1.0
    if not len(curvatures):
        return ["no interval: there are as many runs as coefficients, so nothing shows the noise; add runs"]
    if share <= FEW_FAILED:
        return []
    return [
        f"in {share:.1%} of the draws the loss does not turn upward on both sides of the best, so intervals are wide "
        "or missing: add replicates, or settings further from the best"
    ]
