"""Group FLOPs that differ slightly into budgets, and notice rows that are checkpoints of a few runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlm.fit.points import Array

TOLERANCE = 0.05  # FLOPs that differ by at most this share are one budget, because tokens come in whole steps
APART = 1.2  # isoFLOP budgets are further apart than this ratio; checkpoints of several runs have FLOPs of all sizes
LEAST_ROWS = 6  # rows of one size from which they may be the checkpoints of a run
DENSE = 1.9  # usual ratio of the tokens of neighbouring checkpoints, at most; separate runs often double their tokens
FALLING = 0.8  # share of the steps up to the lowest loss in which the loss falls, at least; then a run may overfit


def group(flops: Array, tolerance: float) -> Array:
    """Return the budget of each run, (n,), so that all FLOPs of one budget differ by at most the share `tolerance`.

    Neighbouring values are joined, the nearest first, while their group stays this narrow. So a chain of near values
    joins no far ones. The budget is the geometric mean of the runs of a group; equal FLOPs stay as they are.
    """
    low = high = np.unique(flops)
    while len(low) > 1:
        widths = high[1:] / low[:-1]
        place = int(widths.argmin())
        if widths[place] > 1 + tolerance:
            break
        low, high = np.delete(low, place + 1), np.delete(high, place)
    found = np.array(flops, dtype=np.float64)
    for first, last in zip(low.tolist(), high.tolist(), strict=True):
        if last > first:
            inside = (flops >= first) & (flops <= last)
            found[inside] = np.exp(np.log(flops[inside]).mean())
    return found


def are_groups(budgets: Array) -> bool:
    """Whether runs with these budgets, (n,), form isoFLOP curves: some have several runs, and on average three."""
    counts = np.unique(budgets, return_counts=True)[1]
    return bool(counts.max() > 1 and len(counts) <= len(budgets) / 3)


def checkpoint_rows(labels: Sequence[object], tokens: Array, loss: Array, flops: Array) -> tuple[int, int]:
    """Count the rows that look like checkpoints of one run, and these runs; (0, 0) if they are fewer than half.

    Rows with one label, which names the size and the settings, look like checkpoints if there are many, their tokens
    rise in small steps, and their loss falls to its lowest value. Rows at a few separate levels of FLOPs never do: on
    isoFLOP curves, the same sizes return at every budget.
    """
    places = np.unique(np.array([str(label) for label in labels]), return_inverse=True)[1]
    rows = [np.flatnonzero(places == k) for k in range(places.max() + 1)]
    sizes = [len(own) for own in rows if _is_one_run(tokens[own], loss[own])]
    if 2 * sum(sizes) < len(tokens) or _are_levels(group(flops, TOLERANCE)):
        return 0, 0
    return sum(sizes), len(sizes)


def _are_levels(budgets: Array) -> bool:
    levels = np.unique(budgets)
    return are_groups(budgets) and (len(levels) == 1 or bool(np.median(levels[1:] / levels[:-1]) > APART))


def _is_one_run(tokens: Array, loss: Array) -> bool:
    order = np.argsort(tokens, kind="stable")
    steps = tokens[order][1:] / tokens[order][:-1]
    if len(tokens) < LEAST_ROWS or steps.min() <= 1:  # runs of equal size and tokens are several
        return False
    until = loss[order][: int(loss[order].argmin()) + 1]
    return bool(np.median(steps) < DENSE and len(until) > 1 and (np.diff(until) < 0).mean() >= FALLING)
