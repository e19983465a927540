"""Split the spread of an exponent over sets of runs into how N and C are counted, the form, noise and the rest.

The parts are variances, estimated one by one from differences within and between sets:

* convention: the variance over the counts of N and C of one set under one form;
* form: the variance over the forms that are fitted to one set under one count;
* noise: the variance of one exponent over refits to redrawn losses;
* rest: the variance over the sets, of one form under one count that all sets allow.

From the first two and from the last, the part that noise alone causes is subtracted. The refits of one set share their
redrawn losses, so noise that moves two exponents of a set together does not count as a difference between them. A part
is an average over the sets (and the other levels) that show it, so sets need not allow the same counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlm.fit.points import NAN, Array, Interval

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """How an exponent was found: the counts of N and C, and the form."""

    N: str
    C: str
    by: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the spread."""

    variance: float  # below 0 if there is less of it than noise alone causes; NaN if no set shows it
    sets: int  # number of sets that show it
    ci: Interval = (NAN, NAN)  # of the standard deviation; of the rest only

    @property
    def sd(self) -> float:
        """The standard deviation; 0 for a variance below 0."""
        return float(np.sqrt(max(self.variance, 0.0))) if np.isfinite(self.variance) else NAN


Exponent = tuple[float, Array]  # the value, and its errors in the refits to redrawn losses, (R,)


def split(sets: Sequence[Mapping[Cell, Exponent]], common: Sequence[Cell]) -> dict[str, Part]:
    """Split the spread of one exponent.

    Args:
        sets: The exponent in every cell that a set allows, for each set.
        common: The cells that all sets allow.
    """
    noise = [float(np.mean([np.var(errors) for _, errors in cells.values()])) for cells in sets]
    return {
        "convention": _within(sets, group=lambda cell: cell.by),
        "form": _within(sets, group=lambda cell: (cell.N, cell.C)),
        "noise": Part(variance=float(np.mean(noise)), sets=len(sets)),
        "rest": _between(sets, common),
    }


def shares(parts: Mapping[str, Part]) -> dict[str, float]:
    """The share of each part in the sum of the variances, where a variance below 0 counts as 0."""
    known = {name: part.sd**2 for name, part in parts.items() if np.isfinite(part.variance)}
    total = sum(known.values())
    return {name: value / total if total else NAN for name, value in known.items()}


def _within(sets: Sequence[Mapping[Cell, Exponent]], *, group: Callable[[Cell], Hashable]) -> Part:
    """The variance within the groups of cells of a set, less that of noise: the mean over groups, then over sets."""
    found = []
    for cells in sets:
        groups = defaultdict(list)
        for cell, exponent in cells.items():
            groups[group(cell)].append(exponent)
        own = [_excess(members) for members in groups.values() if len(members) > 1]
        found += [float(np.mean(own))] if own else []
    return Part(variance=float(np.mean(found)) if found else NAN, sets=len(found))


def _excess(members: Sequence[Exponent]) -> float:
    """The variance of the exponents of one set, less the variance that their errors, which they share, cause."""
    values = np.array([value for value, _ in members])
    errors = np.stack([errors for _, errors in members], axis=1)
    return float(np.var(values, ddof=1) - np.mean(np.var(errors, axis=1, ddof=1)))


def _between(sets: Sequence[Mapping[Cell, Exponent]], common: Sequence[Cell]) -> Part:
    """The variance over the sets, less that of noise: the mean over the common cells.

    The interval is that of a variance with as many degrees of freedom as there are sets, less one.
    """
    from scipy.special import chdtri

    spread = float(np.mean([np.var([cells[cell][0] for cells in sets], ddof=1) for cell in common]))
    noise = float(np.mean([np.var(cells[cell][1]) for cell in common for cells in sets]))
    free = len(sets) - 1
    ends = [free * spread / float(chdtri(free, p)) - noise for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
    low, high = (float(np.sqrt(max(end, 0.0))) for end in ends)
    return Part(variance=spread - noise, sets=len(sets), ci=(low, high))
