"""Sample minima and lines of an isoFLOP fit that are compatible with the noise of the runs.

Every draw is the fit minus an error that the noise could have caused, so that percentiles of the draws form an
interval.

* The noise is relative to the loss, with one variance for all budgets, estimated from the residuals about the curves.
  Each draw has its own variance: together, the draws follow Student's t with the degrees of freedom of all budgets. A
  variance for each budget would rest on 2 to 4 degrees of freedom, and a variance in nats would be too large at the top
  budget, where losses are low.
* The minimum of a parabola is the ratio -c1 / 2 c2. Drawing the coefficients gives the percentiles of Fieller's
  interval (J. R. Stat. Soc. B 16, 175, 1954), which is exact where linear propagation is not.
* A minimum outside the sizes tried would have been refused, so a draw with such a minimum is replaced by another draw.
  If the share of these draws is above `MOST_LOST`, the points do not determine the minimum, and these draws are NaN.
* A line through minima is itself a law, and can be wrong: L*(C) curves away from its line (which has no floor), and
  N*(C) can scatter about its line by more than the noise. Both are added to the draws as errors of the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlm.core.errors import UserError
from dlm.fit import draws
from dlm.fit.fitted import Fitted, Minimum
from dlm.fit.isoflop import curves
from dlm.fit.isoflop.fit import lines
from dlm.fit.isoflop.minima import along
from dlm.fit.points import Array, Cost, Points

MOST_LOST = 0.25  # largest share of the draws of one budget that is replaced
SURE = 0.01  # p-value under noise alone below which the scatter about the line of N* counts as real


@dataclass(frozen=True, kw_only=True, eq=False)
class _Budget:
    """The points of one budget, their minimum, and the polynomial about which their noise is measured."""

    points: Points
    minimum: Minimum
    x: Array  # values on the axis of the curve: log N or log D, (n,)
    place: float  # x of the minimum
    coefficients: Array  # coefficients of the polynomial in z, (k,)

    @property
    def z(self) -> Array:
        """x minus its mean, (n,)."""
        return np.asarray(self.x - self.x.mean(), dtype=np.float64)

    def squares(self) -> float:
        """The weighted sum of squared residuals, each relative to the fitted loss."""
        fitted = curves.value(self.coefficients[None], self.z[None])[0]
        return float(np.sum(self.points.weight * (self.points.loss / fitted - 1) ** 2))


def draw(result: Fitted, replicates: int, method: str, rng: np.random.Generator) -> draws.Draws:
    """Sample minima, and lines if the fit has them.

    Args:
        result: An isoFLOP fit.
        replicates: Number of draws.
        method: 'pairs' resamples the points of each budget, as does 'auto' for points that share clusters, except with
            Akima curves. Other methods draw noise as the docstring of this module describes.
        rng: The source of random numbers.

    Raises:
        UserError: For 'pairs' with Akima curves.
    """
    assert result.points is not None
    points, usable = result.points, result.usable
    if method == "pairs" and result.curve == "akima":
        raise UserError(
            "bootstrap method 'pairs' leaves sizes out, which changes an Akima curve: "
            "use 'residuals', or curve='parabola' or 'cubic'"
        )
    clustered = method == "auto" and points.num_clusters < len(points)
    is_pairs = method == "pairs" or (clustered and result.curve != "akima")
    groups = [points.at_budget(m.budget) for m in usable]
    found = _pairs(result, groups, replicates, rng) if is_pairs else _student(result, groups, replicates, rng)
    budgets = np.array([m.budget for m in usable])
    vertices = _logs(result, budgets, np.stack(found, axis=1))
    rows = np.zeros((replicates, 0))
    if result.params:
        rows = lines(budgets, vertices if is_pairs else _with_misfit(result.cost, usable, vertices, rng))
    return draws.Draws(rows=rows, vertices=vertices, method="pairs" if is_pairs else "residuals")


def _logs(result: Fitted, budgets: Array, found: Array) -> Array:
    """log N, log D and log L, (R, budgets, 3), of minima given as x and L, (R, budgets, 2)."""
    x, loss, log_c = found[:, :, 0], found[:, :, 1], np.log(budgets)
    if result.axis == "params":
        log_n, log_d = x, log_c - result.cost.log_per_token(x)
    else:
        log_n, log_d = result.cost.log_size(log_c - x), x
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([log_n, log_d, np.log(loss)], axis=2)


def _pairs(result: Fitted, groups: Sequence[Points], replicates: int, rng: np.random.Generator) -> list[Array]:
    """x and L of the minima of resampled points, drawn as whole clusters: (R, 2) for each budget."""
    found = []
    for group in groups:
        x, weight = along(group, result.axis), draws.cluster_counts(group, replicates, rng)
        coefficients = curves.polynomial(x - x.mean(), group.loss[None], weight, curves.DEGREE[result.curve])
        place, loss = curves.turning(coefficients)
        found.append(kept(np.stack([x.mean() + place, loss], axis=1), x, rng))
    return found


def _student(result: Fitted, groups: Sequence[Points], replicates: int, rng: np.random.Generator) -> list[Array]:
    """x and L of the minimum in every draw of the noise: (R, 2) for each budget."""
    budgets = [_budget(result, group, m) for group, m in zip(groups, result.usable, strict=True)]
    dof = sum(len(b.x) - len(b.coefficients) for b in budgets)
    variance = sum(b.squares() for b in budgets) / dof
    spread = np.sqrt(variance * dof / rng.chisquare(dof, size=replicates))
    one = _akima if result.curve == "akima" else _polynomial
    return [kept(one(b, spread, rng), b.x, rng) for b in budgets]


def _budget(result: Fitted, points: Points, minimum: Minimum) -> _Budget:
    """One budget with its fitted polynomial.

    An Akima curve leaves no residuals, so its noise is measured about a fitted cubic, or about a parabola if the cubic
    has no interior minimum or there are too few sizes for it.
    """
    x = along(points, result.axis)
    z, sizes = x - x.mean(), len(np.unique(x))
    for degree in (curves.DEGREE[result.curve],) if result.curve in curves.DEGREE else (3, 2):
        found = curves.polynomial(z, points.loss[None], points.weight[None], degree)
        place = curves.turning(found)[0][0]
        if z.min() < place < z.max() and sizes > degree + 1:
            break
    best = minimum.N if result.axis == "params" else minimum.D
    return _Budget(points=points, minimum=minimum, x=x, place=float(np.log(best)), coefficients=found[0])


def _polynomial(budget: _Budget, spread: Array, rng: np.random.Generator) -> Array:
    """x and L of the minima, (R, 2), of the fitted polynomial minus random errors of its coefficients."""
    powers = np.arange(len(budget.coefficients))
    scale = np.abs(budget.z).max() ** powers  # keeps the basis well conditioned
    basis = np.sqrt(budget.points.weight)[:, None] * budget.z[:, None] ** powers / scale
    root = budget.minimum.L * np.linalg.inv(np.linalg.qr(basis)[1]) / scale[:, None]
    errors = spread[:, None] * (rng.standard_normal((len(spread), len(powers))) @ root.T)
    place, loss = curves.turning(budget.coefficients - errors)
    return np.stack([budget.x.mean() + place, loss], axis=1)


def _akima(budget: _Budget, spread: Array, rng: np.random.Generator) -> Array:
    """x and L, (R, 2): the fitted minimum with random errors of its place and loss.

    The errors are those that noise causes in the minima of Akima curves through losses from a smooth curve. The error
    of the loss is subtracted, which removes its bias: a curve through every point is lowest where noise made a loss
    low. The error of the place is added, because these errors cluster at the sizes, on either side of the true minimum.
    """
    sizes, _, total = curves.averaged(budget.x, budget.points.loss[None], budget.points.weight[None])
    true = np.log(curves.value(budget.coefficients[None], sizes[None] - budget.x.mean()))
    noise = spread[:, None] * rng.standard_normal((len(spread), len(sizes))) / np.sqrt(total)
    place, loss = curves.akima(sizes, np.concatenate([true, true + noise]))
    place = np.where((place > sizes[0]) & (place < sizes[-1]), place, np.nan)
    return np.stack([budget.place + (place[1:] - place[0]), budget.minimum.L * np.exp(loss[0] - loss[1:])], axis=1)


def kept(found: Array, x: Array, rng: np.random.Generator) -> Array:
    """Replace draws (R, 2) without a minimum inside the sizes: by other draws, or by NaN if too many lack a minimum."""
    inside = (found[:, 0] > x.min()) & (found[:, 0] < x.max())
    found = np.where(inside[:, None], found, np.nan)
    if inside.mean() >= 1 - MOST_LOST:
        found[~inside] = rng.choice(found[inside], size=int(np.sum(~inside)))
    return found


def _with_misfit(cost: Cost, usable: list[Minimum], vertices: Array, rng: np.random.Generator) -> Array:
    """Add the errors of the form of the lines to the drawn minima, (R, budgets, 3)."""
    if len(usable) < 3:  # two points always lie on a line
        return vertices
    z = np.log([m.budget for m in usable])
    moved = vertices.copy()
    scatter = _scatter(z, np.log([m.N for m in usable]), vertices[:, :, 0], rng)
    moved[:, :, 0] += scatter
    moved[:, :, 1] -= cost.log_per_token(moved[:, :, 0]) - cost.log_per_token(vertices[:, :, 0])
    moved[:, :, 2] += _bend(z, vertices[:, :, 2], rng)[:, None]
    return moved


def _bend(z: Array, log_loss: Array, rng: np.random.Generator) -> Array:
    """The extreme deviation of log L*(C) from its line that a quadratic term in log C causes, (R,).

    Each draw takes the C that is furthest above or furthest below the line, at random. So the interval has its nominal
    coverage at both values of C, and a higher coverage between them.
    """
    powers = (z - z.mean())[:, None] ** np.arange(3)
    q, r = np.linalg.qr(powers)
    between = np.linspace(z[0], z[-1], 65) - z.mean()
    square = (between[:, None] ** np.arange(3)) @ np.linalg.inv(r)[:, 2]
    furthest = rng.choice([square.min(), square.max()], size=len(log_loss))
    return np.asarray((log_loss @ q[:, 2]) * furthest, dtype=np.float64)


def _scatter(z: Array, log_n: Array, drawn: Array, rng: np.random.Generator) -> Array:
    """Errors of the minima in addition to noise, (R, budgets); 0 if noise explains their distances to the line.

    The variance of a minimum is tau^2 plus the variance of its noise. tau^2 is drawn from its distribution given the
    residuals of the line: generalised inference for a random effect (Tsui and Weerahandi, J. Am. Stat. Assoc. 84, 602,
    1989).
    """
    from scipy.special import chdtrc

    if np.isnan(drawn).all(axis=0).any():  # a budget without any minimum leaves no line
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
