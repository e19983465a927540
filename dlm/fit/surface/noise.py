"""noise: the scatter about a fitted law -> its parts, and draws of it. Called by surface and surface_draws.

Three noises that must not be lumped: Monte Carlo (of a validation bound: what all runs share moves E only, the rest is
in the scatter), seed (seen where a cell was run again) and trunk (shared by branches or checkpoints of one run).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dlm.fit.engine import newton
from dlm.fit.fitted import Noise
from dlm.fit.points import NAN, Array, Points

SHARES = np.linspace(0.0, 0.95, 20)  # sd of trunk over sd of trunk plus sd of the rest: the grid, a flat prior on it


MOST_NESTED = 1000  # points whose covariance is still handled as a matrix


def parts(points: Points, problem: newton.Problem, theta: Array) -> Noise:
    """The parts of the noise about the law `theta` (1, p), of a point of mean weight."""
    points = replace(points, weight=points.weight / points.weight.mean())
    residual, free = relative_residual(points, problem, theta), len(problem.free)
    dof = max(len(points) - free, 1)
    squares = float((points.weight * residual**2).sum())
    seed, pure, replicates = _replicates(points)
    f = p = NAN
    lack = dof - replicates
    if replicates and lack > 0 and pure > 0:
        from scipy.special import fdtrc

        f = (squares - pure) / lack / (pure / replicates)
        p = float(fdtrc(lack, replicates, max(f, 0.0)))
    share = NAN
    spread = np.sqrt(squares / dof)
    if is_nested(points) and len(points) <= MOST_NESTED:
        odds, sigma = _posterior(points, problem, theta)
        share = float((odds * sigma * SHARES / (1 - SHARES)).sum())
        share /= 1.0 if problem.space == "log" else float(np.median(points.loss))
    return Noise(
        residual=float(spread),
        seed=seed,
        trunk=share,
        monte_carlo=_median(points.loss_se, points),
        monte_carlo_own=_median(points.loss_se_own, points),
        replicates=replicates,
        lack_of_fit=float(f),
        lack_of_fit_p=p,
    )


def relative_residual(points: Points, problem: newton.Problem, theta: Array) -> Array:
    """log L less log of the law in log space, (L - law)/L in raw space, (n,)."""
    off = newton.target_of(problem, points.loss) - newton.predict(problem, theta)[0]
    return np.asarray(off if problem.space == "log" else off / points.loss)


def is_nested(points: Points) -> bool:
    """Whether some points share a trunk, and some do not."""
    clusters = len(np.unique(points.cluster))
    return 1 < clusters < len(points)


def shared_se(points: Points) -> float:
    """The standard error in nats/token that all losses share; 0 where none is known.

    Where nothing is known of the runs' own part, all of loss_se counts as shared: the wider answer for E.
    """
    if points.loss_se is None:
        return 0.0
    own = 0.0 if points.loss_se_own is None else float(np.median(points.loss_se_own))
    return float(np.sqrt(max(float(np.median(points.loss_se)) ** 2 - own**2, 0.0)))


def draw_nested(
    points: Points, problem: newton.Problem, theta: Array, replicates: int, rng: np.random.Generator
) -> Array:
    """Noise (R, n) in the space of the residuals: one draw a trunk and one a point.

    How large each is comes from the posterior given the residuals (restricted likelihood, flat prior on the
    share), so what few trunks leave open is in the draws.
    """
    odds, sigma = _posterior(points, problem, theta, rng=rng, replicates=replicates)
    assert sigma.shape == odds.shape == (replicates,)
    ratio = odds / (1 - odds)
    _, place = np.unique(points.cluster, return_inverse=True)
    trunk = rng.standard_normal((replicates, int(place.max()) + 1))[:, place] * ratio[:, None]
    own = rng.standard_normal((replicates, len(points))) / np.sqrt(np.maximum(points.weight, 1e-300))
    return np.asarray(sigma[:, None] * (own + trunk))


def _posterior(
    points: Points,
    problem: newton.Problem,
    theta: Array,
    *,
    rng: np.random.Generator | None = None,
    replicates: int = 0,
) -> tuple[Array, Array]:
    """Odds of each share and sigma there; with `rng`, draws of (share, sigma) instead.

    The law is linear near the fit: y = J d + Z u + e. For each ratio of the variances, the restricted likelihood is
    |V|^-1/2 |J'V^-1 J|^-1/2 (r'Pr)^-(n-p)/2 (Harville 1977), and r'Pr / sigma^2 is chi-squared with n - p degrees.
    """
    loss, slopes = problem.law.jet(theta, problem.x)
    j = slopes[0][problem.free].T / (loss[0][:, None] if problem.space == "log" else 1.0)
    residual = newton.target_of(problem, points.loss) - newton.predict(problem, theta)[0]
    _, place = np.unique(points.cluster, return_inverse=True)
    together = (place[:, None] == place[None, :]).astype(np.float64)
    dof = len(residual) - j.shape[1]
    own = np.diag(1.0 / np.maximum(points.weight, 1e-300))
    log_odds, squares = np.empty(len(SHARES)), np.empty(len(SHARES))
    for k, share in enumerate(SHARES):
        v = own + (share / (1 - share)) ** 2 * together
        root = np.linalg.cholesky(v)
        q, r = np.linalg.qr(np.linalg.solve(root, j))
        white = np.linalg.solve(root, residual)
        squares[k] = white @ white - ((q.T @ white) ** 2).sum()
        half = np.log(np.diag(root)).sum() + np.log(np.maximum(np.abs(np.diag(r)), 1e-300)).sum()
        log_odds[k] = -half - 0.5 * dof * np.log(squares[k])
    odds = np.exp(log_odds - log_odds.max())
    odds /= odds.sum()
    if rng is None:
        return odds, np.sqrt(squares / dof)
    chosen = rng.choice(len(SHARES), size=replicates, p=odds)
    return SHARES[chosen], np.sqrt(squares[chosen] / rng.chisquare(dof, size=replicates))


def _replicates(points: Points) -> tuple[float, float, int]:
    """Relative sd between runs of one (N, D), the sum of squares behind it, and its degrees of freedom."""
    keys = np.stack([points.params, points.tokens], axis=1)
    _, place = np.unique(keys, axis=0, return_inverse=True)
    count = np.bincount(place)
    dof = int((count - 1).sum())
    if not dof:
        return NAN, 0.0, 0
    log_loss = np.log(points.loss)
    weight = np.bincount(place, weights=points.weight)
    mean = np.bincount(place, weights=points.weight * log_loss) / np.maximum(weight, 1e-300)
    squares = float((points.weight * (log_loss - mean[place]) ** 2).sum())
    return float(np.sqrt(squares / dof)), squares, dof


def _median(error: Array | None, points: Points) -> float:
    return NAN if error is None else float(np.median(error / points.loss))
