"""Turn the minima of the cells into power laws with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlm.fit.draws import ends
from dlm.fit.hparams.cells import AXES
from dlm.fit.hparams.curves import Curves
from dlm.fit.hparams.powers import TERMS, Power, coefficients, path_of, scatter_of
from dlm.fit.points import Array

LEVEL = 0.95
TO_WEIGH = 400  # draws of the noise of the runs that give the standard error of every minimum
AT_ONCE = 250  # draws that are fitted together, to bound the memory


@dataclass(frozen=True, kw_only=True, eq=False)
class Laws:
    """The power laws by axis, and the curvatures of the draws of their intervals, (R, k, k)."""

    powers: Mapping[str, Power]
    curvatures: Array


def fit_powers(
    curves: Curves,
    vertices: Array,
    curvature: Array,
    sigma: float,
    at: tuple[Array, Array],
    axes: Sequence[int],
    replicates: int,
    seed: int,
) -> Laws:
    """Fit a power law through the minima of each axis.

    Args:
        curves: The parabolas of G cells.
        vertices: Their minima, logs, (G, k).
        curvature: H, (k, k).
        sigma: Standard deviation of the log loss between runs; NaN if the runs do not show it. Then there are no
            intervals.
        at: log N and log D of the cells, (G,) each.
        axes: The axes that were fitted, (k,).
        replicates: Number of draws for the intervals.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    paths = [path_of(*at, sizes=AXES[axis] == "lr") for axis in axes]
    designs = [path.design(*at) for path in paths]
    errors = np.ones_like(vertices)
    if np.isfinite(sigma):
        errors = _spread(_draws(curves, np.tile(vertices, (TO_WEIGH, 1, 1)), curvature, sigma, rng)[0])
    scatters = [
        scatter_of(x, y, e) if np.isfinite(sigma) else 0.0
        for x, y, e in zip(designs, vertices.T, errors.T, strict=True)
    ]
    found = [coefficients(x, y[None], e, s) for x, y, e, s in zip(designs, vertices.T, errors.T, scatters, strict=True)]
    drawn, curvatures = np.empty((0, *vertices.shape)), np.empty((0, *curvature.shape))
    if np.isfinite(sigma):
        law = np.stack([x @ c[0] for x, c in zip(designs, found, strict=True)], axis=1)
        truths = law + np.array(scatters) * rng.standard_normal((replicates, *law.shape))
        drawn, curvatures = _draws(curves, truths, curvature, sigma, rng)
    powers = {}
    for k, axis in enumerate(axes):
        path, scatter = paths[k], scatters[k]
        point = path.terms(found[k])[0]
        rows = path.terms(coefficients(designs[k], drawn[:, :, k], errors[:, k], scatter))
        dof = len(vertices) - designs[k].shape[1] if scatter else curves.dof
        known = [0, *(1 + np.flatnonzero(path.directions.any(axis=0)))] if len(rows) else []  # the others are 0
        ci = {TERMS[j]: ends(float(point[j]), rows[:, j], dof, LEVEL) for j in known}
        powers[AXES[axis]] = Power(
            **dict(zip(TERMS, point.tolist(), strict=True)), scatter=scatter, free=path.free, ci=ci, draws=rows
        )
    return Laws(powers=powers, curvatures=curvatures)


def _draws(
    curves: Curves, truths: Array, curvature: Array, sigma: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Fit runs with noise about cells with these minima, (R, G, k): the minima found, and the curvatures, (R, k, k)."""
    parts = []
    for start in range(0, len(truths), AT_ONCE):
        losses = curves.losses(truths[start : start + AT_ONCE], curvature)
        parts.append(curves.solve(losses + sigma * rng.standard_normal(losses.shape))[:2])
    minima, curvatures = (np.concatenate(part) for part in zip(*parts, strict=True))
    return minima, curvatures


def _spread(draws: Array) -> Array:
    """The standard deviation of each minimum, (G, k), by the middle 68 % of its draws, (R, G, k)."""
    low, high = np.nanquantile(draws, [0.16, 0.84], axis=0)
    return np.asarray(np.maximum((high - low) / 2, 1e-9))
