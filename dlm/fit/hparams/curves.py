"""Fit a parabola of log loss over log learning rate (and log batch) to every cell, with one curvature for all cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dlm.fit.hparams.cells import Runs
from dlm.fit.points import Array

SAME_COLUMN = 1e-8  # share of a column that must remain beside the others, or the runs do not show its coefficient


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """The parabolas of G cells over k settings: log L = level + (z - z*)' H (z - z*) / 2."""

    numbers: Array  # the number of each cell, (G,)
    place: Any  # the cell of each run, from 0 to G - 1, (n,), integers
    centre: Array  # the mean settings of each cell, (G, k)
    design: Array  # (n, G + G k + number of curvatures)
    pairs: tuple[tuple[int, int], ...]  # the entries of H that were fitted
    settings: Array  # z, (n, k)
    log_loss: Array  # (n,)

    @property
    def num_cells(self) -> int:
        """G."""
        return len(self.numbers)

    @property
    def dof(self) -> int:
        """Degrees of freedom of the noise."""
        return len(self.log_loss) - int(self.design.shape[1])

    def mean(self, values: Array) -> Array:
        """The mean of a value of the runs, (n,), in each cell, (G,)."""
        return np.asarray(np.bincount(self.place, weights=values) / np.bincount(self.place))

    @cached_property
    def _solver(self) -> Array:
        return np.asarray(np.linalg.pinv(self.design))

    def solve(self, log_loss: Array) -> tuple[Array, Array, Array]:
        """Fit R sets of losses, (n, R), at once.

        Returns:
            (vertices z*, (R, G, k); curvatures H, (R, k, k); sums of the squared residuals, (R,)).
        """
        found = self._solver @ log_loss
        squares = ((log_loss - self.design @ found) ** 2).sum(axis=0)
        cells, k = self.centre.shape
        slopes = found[cells : cells + cells * k].T.reshape(-1, cells, k)
        curvature = np.zeros((log_loss.shape[1], k, k))
        for (i, j), value in zip(self.pairs, found[cells + cells * k :], strict=True):
            curvature[:, i, j] = curvature[:, j, i] = value
        singular = ~(np.linalg.eigvalsh(curvature) > 0).all(axis=1)
        curvature[singular] = np.nan
        inverse = np.linalg.inv(np.where(np.isnan(curvature), np.eye(k), curvature))
        vertices = self.centre[None] - np.einsum("rij,rgj->rgi", inverse, slopes)
        vertices[singular] = np.nan
        return vertices, curvature, squares

    def losses(self, vertices: Array, curvature: Array) -> Array:
        """The log losses, (n, R), of cells with these vertices, (R, G, k), and levels of 0, which move no vertex."""
        off = self.settings[None] - vertices[:, self.place]
        return np.asarray(0.5 * np.einsum("rni,ij,rnj->nr", off, curvature, off))


def curves_of(runs: Runs, axes: Sequence[int]) -> Curves:
    """The design of the parabolas. The interaction of rate and batch is left out if no cell shows it."""
    numbers, place = np.unique(runs.cell, return_inverse=True)
    settings = runs.settings[:, list(axes)]
    member = np.eye(len(numbers))[place]
    centre = (member.T @ settings) / member.sum(axis=0)[:, None]
    off = settings - centre[place]
    slopes = (member[:, :, None] * off[:, None, :]).reshape(len(settings), -1)
    pairs = [(i, j) for i in range(len(axes)) for j in range(i, len(axes))]
    products = {pair: off[:, pair[0]] * off[:, pair[1]] * (0.5 if pair[0] == pair[1] else 1.0) for pair in pairs}
    base = np.concatenate([member, slopes, *(products[i, i][:, None] for i in range(len(axes)))], axis=1)
    kept = [pair for pair in pairs if pair[0] == pair[1] or _is_shown(base, products[pair])]
    return Curves(
        numbers=numbers,
        place=place,
        centre=centre,
        design=np.concatenate([member, slopes, *(products[pair][:, None] for pair in kept)], axis=1),
        pairs=tuple(kept),
        settings=settings,
        log_loss=runs.log_loss,
    )


def _is_shown(base: Array, column: Array) -> bool:
    rest = column - base @ np.linalg.lstsq(base, column, rcond=None)[0]
    return bool((rest**2).sum() > SAME_COLUMN * max((column**2).sum(), 1e-300))
