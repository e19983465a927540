"""isoflop_draws: an isoFLOP fit -> draws of its minima and lines, as far from them as their noise allows.
Called by resample.

Every draw is the fit minus an error that the noise could have made, so that percentiles of the draws are an interval.

* The noise is a fraction of the loss, one variance for all budgets, from the residuals about the curves; each draw has
  its own (Student's t, with the degrees of freedom of all budgets). A variance of a budget's own would rest on 2 to 4
  degrees of freedom, and one in nats would be too large at the top budget, where losses are low.
* The minimum of a parabola is the ratio -c1 / 2 c2. Drawing the coefficients gives the percentiles of Fieller's
  interval (J. R. Stat. Soc. B 16, 175, 1954), which is exact where a linear error or a symmetric one is not.
* A minimum outside the sizes tried would have been refused, so such draws are drawn again. Where they are more than
  `MOST_LOST`, the points do not show where the minimum is, and the draws stay without one.
* A line through minima is a law of its own: what bends L*(C) away from its line (which has no floor), and what scatters
  N*(C) about its line by more than the noise, is an error of the line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlm.core.errors import UserError
from dlm.fit import draws
from dlm.fit.fitted import Minimum
from dlm.fit.isoflop import curves
from dlm.fit.isoflop.fit import lines, log_params
from dlm.fit.isoflop.minima import along
from dlm.fit.points import Array, Cost, Points
from dlm.fit.result import FitResult

MOST_LOST = 0.25  # of a budget's draws


SURE = 0.01  # scatter about the line of N* that noise alone exceeds less often than this is real


@dataclass(frozen=True, kw_only=True, eq=False)
class _Smooth:
    """The polynomial of one budget about which its noise is measured: z (n,), coefficients (k,), losses on it (n,)."""

    z: Array
    coefficients: Array
    fitted: Array
    weight: Array  # (n,), above 0

    @property
    def dof(self) -> int:
        return len(self.z) - len(self.coefficients)

    def squares(self, loss: Array) -> float:
        """Weighted sum of squared residuals, as fractions of the loss."""
        return float(np.sum(self.weight * (loss / self.fitted - 1) ** 2))


def draw(result: FitResult, points: Points, replicates: int, method: str, rng: np.random.Generator) -> draws.Draws:
    """`replicates` draws; method 'pairs' draws the points of each budget again, others as the module says."""
    usable, budgets = result.usable, np.array([m.budget for m in result.usable])
    groups = [points.at_budget(m.budget) for m in usable]
    groups = [g.take(g.weight > 0) for g in groups]
    pairs = draws.by_pairs(method, points, few=True) and result.curve != "akima"
    if method == "pairs" and not pairs:
        raise UserError(
            "bootstrap method 'pairs' leaves sizes out, and an Akima curve without them is another: "
            "use 'residuals', or curve='parabola' or 'cubic'"
        )
    if pairs:
        found = [_pairs(result, g, replicates, rng) for g in groups]
    else:
        found = _student(result, groups, replicates, rng)
    vertices = _logs(result, budgets, np.stack(found, axis=1))
    rows = np.zeros((replicates, 0))
    if result.params:
        rows = lines(budgets, vertices if pairs else _with_misfit(result.cost, usable, vertices, rng))
    return draws.Draws(rows=rows, vertices=vertices, method="pairs" if pairs else "residuals", dof=0)


def _logs(result: FitResult, budgets: Array, found: Array) -> Array:
    """(x, L) of the minima (R, budgets, 2) -> logs of N, D, L (R, budgets, 3)."""
    x, loss, log_c = found[:, :, 0], found[:, :, 1], np.log(budgets)
    if result.axis == "params":
        log_n, log_d = x, log_c - result.cost.log_per_token(x)
    else:
        log_n, log_d = log_params(result.cost, log_c - x), x
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([log_n, log_d, np.log(loss)], axis=2)


def _student(result: FitResult, groups: list[Points], replicates: int, rng: np.random.Generator) -> list[Array]:
    """(x, L) of the minimum in every draw, (R, 2) a budget."""
    smooth = [_smoothed(result, g) for g in groups]
    dof = sum(s.dof for s in smooth)
    variance = sum(s.squares(g.loss) for s, g in zip(smooth, groups, strict=True)) / dof
    spread = np.sqrt(variance * dof / rng.chisquare(dof, size=replicates))
    one = _akima if result.curve == "akima" else _polynomial
    each = zip(groups, result.usable, smooth, strict=True)
    return [_kept(one(result, g, m, s, spread, rng), along(g, result.axis), rng) for g, m, s in each]


def _smoothed(result: FitResult, group: Points) -> _Smooth:
    """The fit itself; for an Akima curve, which leaves no residuals, the cubic (or parabola) through the points."""
    x = along(group, result.axis)
    z, sizes = x - x.mean(), len(np.unique(x))
    for degree in (curves.DEGREE[result.curve],) if result.curve in curves.DEGREE else (3, 2):
        found = curves.polynomial(z, group.loss[None], group.weight[None], degree)
        place = curves.turning(found)[0][0]
        if z.min() < place < z.max() and sizes > degree + 1:
            break
    return _Smooth(z=z, coefficients=found[0], fitted=curves.value(found, z[None])[0], weight=group.weight)


def _polynomial(
    result: FitResult, group: Points, minimum: Minimum, smooth: _Smooth, spread: Array, rng: np.random.Generator
) -> Array:
    """Minima of the fitted polynomial minus errors of its coefficients."""
    degree = len(smooth.coefficients) - 1
    powers = np.abs(smooth.z).max() ** np.arange(degree + 1)  # keeps the basis well conditioned
    basis = np.sqrt(smooth.weight)[:, None] * smooth.z[:, None] ** np.arange(degree + 1) / powers
    root = minimum.L * np.linalg.inv(np.linalg.qr(basis)[1]) / powers[:, None]
    errors = spread[:, None] * (rng.standard_normal((len(spread), degree + 1)) @ root.T)
    place, loss = curves.turning(smooth.coefficients - errors)
    return np.stack([along(group, result.axis).mean() + place, loss], axis=1)


def _akima(
    result: FitResult, group: Points, minimum: Minimum, smooth: _Smooth, spread: Array, rng: np.random.Generator
) -> Array:
    """The minimum, and what noise does to the minimum of Akima curves through a smooth curve's losses.

    The loss is reflected, which takes out its bias: a curve through every point is lowest where noise made a loss low.
    The place is not: its errors bunch at the sizes, on either side of where the smooth curve is lowest.
    """
    x = along(group, result.axis)
    sizes, _, total = curves.averaged(x, group.loss[None], group.weight[None])
    true = np.log(curves.value(smooth.coefficients[None], sizes[None] - x.mean()))
    noise = spread[:, None] * rng.standard_normal((len(spread), len(sizes))) / np.sqrt(total)
    place, loss = curves.akima(sizes, np.concatenate([true, true + noise]))
    place = np.where((place > sizes[0]) & (place < sizes[-1]), place, np.nan)
    at = np.log(minimum.N if result.axis == "params" else minimum.D)
    return np.stack([at + (place[1:] - place[0]), minimum.L * np.exp(loss[0] - loss[1:])], axis=1)


def _kept(found: Array, x: Array, rng: np.random.Generator) -> Array:
    """Draws (R, 2) without a minimum inside the sizes, drawn again from the others, or NaN if they are too many."""
    inside = (found[:, 0] > x.min()) & (found[:, 0] < x.max())
    found = np.where(inside[:, None], found, np.nan)
    if inside.mean() >= 1 - MOST_LOST:
        found[~inside] = rng.choice(found[inside], size=int(np.sum(~inside)))
    return found


def _with_misfit(cost: Cost, usable: list[Minimum], vertices: Array, rng: np.random.Generator) -> Array:
    """Minima (R, budgets, 3) whose lines err by what their form leaves out too."""
    if len(usable) < 3:  # two points are on a line, whatever its misfit
        return vertices
    z = np.log([m.budget for m in usable])
    moved = vertices.copy()
    scatter = _scatter(z, np.log([m.N for m in usable]), vertices[:, :, 0], rng)
    moved[:, :, 0] += scatter
    moved[:, :, 1] -= cost.log_per_token(moved[:, :, 0]) - cost.log_per_token(vertices[:, :, 0])
    moved[:, :, 2] += _bend(z, vertices[:, :, 2], rng)[:, None]
    return moved


def _bend(z: Array, log_loss: Array, rng: np.random.Generator) -> Array:
    """How far the square term of log C takes log L*(C) off its line, where it is furthest above or below it: (R,).

    Above and below by turns: an interval then reaches 95 % at both places, and holds the truth more often between them.
    """
    powers = (z - z.mean())[:, None] ** np.arange(3)
    q, r = np.linalg.qr(powers)
    between = np.linspace(z[0], z[-1], 65) - z.mean()
    square = (between[:, None] ** np.arange(3)) @ np.linalg.inv(r)[:, 2]
    furthest = rng.choice([square.min(), square.max()], size=len(log_loss))
    return np.asarray((log_loss @ q[:, 2]) * furthest, dtype=np.float64)


def _scatter(z: Array, log_n: Array, drawn: Array, rng: np.random.Generator) -> Array:
    """Errors (R, budgets) that minima have beside their noise; 0 where the noise explains their distance to the line.

    The variance of a minimum is tau^2 + its noise: tau^2 is drawn from its distribution given the residuals of the line
    (generalised inference for a random effect: Tsui and Weerahandi, J. Am. Stat. Assoc. 84, 602, 1989).
    """
    from scipy.special import chdtrc

    if np.isnan(drawn).all(axis=0).any():  # a budget without minima: no line is drawn
        return np.zeros_like(drawn)
    free = len(z) - 2
    basis = np.linalg.qr((z - z.mean())[:, None] ** np.arange(2))[0]
    residual = log_n - basis @ (basis.T @ log_n)
    noise = np.var(drawn, axis=0, where=np.isfinite(drawn))
    root = 1 / np.sqrt(np.maximum(noise, 1e-30))
    weighted = np.linalg.qr(basis * root[:, None])[0]
    whitened = log_n * root
    excess = float(np.sum((whitened - weighted @ (weighted.T @ whitened)) ** 2))
    if chdtrc(free, excess) > SURE:
        return np.zeros_like(drawn)
    total = residual @ residual / rng.chisquare(free, size=len(drawn))
    tau = np.sqrt(np.maximum(total - noise.mean(), 0.0))
    return np.asarray(tau[:, None] * rng.standard_normal(drawn.shape), dtype=np.float64)


def _pairs(result: FitResult, group: Points, replicates: int, rng: np.random.Generator) -> Array:
    """(x, L) of the minima of points drawn again, clusters whole, (R, 2)."""
    x, weight = along(group, result.axis), draws.cluster_counts(group, replicates, rng)
    found = curves.polynomial(x - x.mean(), group.loss[None], weight, curves.DEGREE[result.curve])
    place, loss = curves.turning(found)
    return _kept(np.stack([x.mean() + place, loss], axis=1), x, rng)
