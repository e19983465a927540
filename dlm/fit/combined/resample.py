"""Sample combined laws that are compatible with the noise of the runs.

All parts, the isoFLOP line and the floor law are refitted to the same samples, because they rest on the same runs: what
noise does to the one, it mostly does to the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from dlm.fit.combined.floor import FloorLaw
from dlm.fit.draws import Draws
from dlm.fit.engine import newton
from dlm.fit.fitted import Fitted
from dlm.fit.isoflop import curves
from dlm.fit.isoflop.fit import lines
from dlm.fit.isoflop.resample import kept
from dlm.fit.optimum import as_rows
from dlm.fit.points import Array
from dlm.fit.surface import noise
from dlm.fit.surface.resample import known, method_of, refit, samples


@dataclass(frozen=True, kw_only=True, eq=False)
class Resampled:
    """What was refitted to R samples of the points."""

    parts: Draws
    line: Array | None  # the isoFLOP lines, (R, 6); None without a line
    lowest: Array | None  # the lowest loss at each budget of the floor law, nats/token, (R, m); None without one


def draw(result: Fitted, replicates: int, method: str, rng: np.random.Generator) -> Resampled:
    """Refit every part, the line and the floor law to the same resampled points.

    The noise of single points is that about the combined law. The shares of trunks and points in nested noise are those
    about the first part.

    Args:
        result: A combined law.
        replicates: Number of samples to refit.
        method: As in `bootstrap`.
        rng: The source of random numbers.

    Raises:
        UserError: If the points do not permit the method.
    """
    points, surface, combination = result.points, result.surface, result.combination
    assert points is not None and surface is not None and combination is not None
    method = method_of(method, points, result.how)
    logs = np.log(points.params)[None], np.log(points.tokens)[None]
    fitted = newton.in_space(surface.predict(as_rows(surface, result.params), *logs)[0], result.how)
    parts = list(combination.parts.values())
    free = max(len(part.params) for part in parts) - len(result.fixed)
    problem, thetas = known(parts[0])
    nested = partial(noise.draw_nested, points, problem, thetas[:1], replicates, rng)
    targets, weight = samples(points, result.how, fitted, free, nested, replicates, method, rng)
    rows = [refit(part, targets, weight * _emphasis(part, result)) for part in parts]
    dof = len(points) - free if method == "residuals" else 0
    centre = newton.in_space(points.loss, result.how) if method == "pairs" else fitted
    resampled = (centre, targets, weight, rng)
    return Resampled(
        parts=Draws(rows=np.concatenate(rows, axis=1), method=method, dof=dof),
        line=None if combination.line is None else _line(combination.line, result, *resampled),
        lowest=None if combination.floor is None else _lowest(combination.floor, result, *resampled),
    )


def _line(
    line: Fitted, result: Fitted, centre: Array, targets: Array, weight: Array, rng: np.random.Generator
) -> Array:
    """The lines through the minima of resampled points, (R, 6).

    The minima of noise-free points at `centre`, (n,), differ from those of the runs, and the draws are moved by this
    difference.
    """
    points, found = line.points, []
    assert points is not None
    for minimum in line.usable:
        here = points.budget == minimum.budget
        x = np.log(points.params[here])
        both = [
            _vertex(x, losses[:, here], w[:, here], result)
            for losses, w in ((centre[None], points.weight[None]), (targets, weight))
        ]
        place, loss = kept(both[1], x, rng).T + (np.log([minimum.N, minimum.L]) - both[0][0])[:, None]
        found.append(np.stack([place, np.log(minimum.budget) - line.cost.log_per_token(place), loss], axis=1))
    return lines(np.array([m.budget for m in line.usable]), np.stack(found, axis=1))


def _vertex(x: Array, losses: Array, weight: Array, result: Fitted) -> Array:
    """log N and log L of the minima of parabolas, (R, 2), from losses in the space of the residuals."""
    place, lowest = curves.turning(_parabola(x, losses, weight, result))
    return np.stack([x.mean() + place, np.log(lowest)], axis=1)


def _lowest(
    floor: FloorLaw, result: Fitted, centre: Array, targets: Array, weight: Array, rng: np.random.Generator
) -> Array:
    """The lowest losses of resampled points at each budget of the floor law, (R, m), moved as those of the line.

    A minimum whose place is not bounded still has a loss, because the curve is flat there.
    """
    points, found = result.points, []
    assert points is not None
    for budget, lowest in zip(floor.budgets, floor.losses, strict=True):
        here = points.budget == budget
        x = np.log(points.params[here])
        before = _within(x, centre[None, here], points.weight[None, here], result)
        after = _within(x, targets[:, here], weight[:, here], result)
        lost = np.isnan(after)
        if not lost.all():
            after[lost] = rng.choice(after[~lost], size=int(lost.sum()))
        found.append(lowest * np.exp(after - before))
    return np.stack(found, axis=1)


def _within(x: Array, losses: Array, weight: Array, result: Fitted) -> Array:
    """The log of the lowest loss of parabolas within the sizes, (R,); NaN if the sizes do not determine them."""
    curve, z = _parabola(x, losses, weight, result), x - x.mean()
    place = curves.turning(curve)[0]
    inside = np.where(np.isnan(place), z.min(), np.clip(place, z.min(), z.max()))
    ends = np.full((2, len(curve)), [[z.min()], [z.max()]])
    return np.asarray(np.log(curves.value(curve, np.stack([inside, *ends], axis=1)).min(axis=1)), dtype=np.float64)


def _parabola(x: Array, losses: Array, weight: Array, result: Fitted) -> Array:
    """The coefficients, (R, 3), of parabolas over x less its mean, from losses in the space of the residuals."""
    loss = np.exp(losses) if result.how.space == "log" else losses
    return curves.polynomial(x - x.mean(), loss, weight, curves.DEGREE["parabola"])


def _emphasis(part: Fitted, result: Fitted) -> Array:
    """The factors on the weights of the points that a part adds, (n,)."""
    assert part.points is not None and result.points is not None
    return part.points.weight / result.points.weight
