"""Split the noise about a fitted law into its parts, and simulate it.

The noise has three sources. Monte Carlo noise comes from estimating a validation bound; the part of it that all runs
share shifts E only. Seed noise is seen between replicates, the runs of one cell. Trunk noise is shared by the branches
or checkpoints of one run.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dlm.fit.engine import newton
from dlm.fit.fitted import Noise
from dlm.fit.points import NAN, Array, Points

SHARES = np.linspace(0.0, 0.95, 20)  # grid of the trunk's share: sd of the trunk / (sd of the trunk + sd of the point)
RATIOS = SHARES / (1 - SHARES)  # the trunk's sd over the point's sd, at each share
MOST_NESTED = 1000  # largest number of points whose covariance is computed as a matrix
TINY = 1e-300


def parts(points: Points, problem: newton.Problem, theta: Array) -> Noise:
    """Estimate the parts of the noise about the law `theta`, (1, p), for a point of mean weight."""
    points = replace(points, weight=points.weight / points.weight.mean())
    residual = relative_residual(points, problem, theta)
    dof = max(len(points) - len(problem.free), 1)
    squares = float((points.weight * residual**2).sum())
    pure, replicates = _replicates(points, residual)
    lack_of_fit, chance = _lack_of_fit(max(squares - pure, 0.0), dof - replicates, pure, replicates)
    return Noise(
        residual=float(np.sqrt(squares / dof)),
        seed=float(np.sqrt(pure / replicates)) if replicates else NAN,
        trunk=_trunk(points, problem, theta),
        monte_carlo=_median(points.loss_se, points),
        monte_carlo_own=_median(points.loss_se_own, points),
        replicates=replicates,
        lack_of_fit=lack_of_fit,
        lack_of_fit_p=chance,
    )


def relative_residual(points: Points, problem: newton.Problem, theta: Array) -> Array:
    """Residuals as shares of the loss, (n,): log L - log(law) in log space, (L - law)/L in raw space."""
    off = newton.target_of(problem, points.loss) - newton.predict(problem, theta)[0]
    return np.asarray(off if problem.how.space == "log" else off / points.loss)


def is_nested(points: Points) -> bool:
    """Whether some points share a trunk and some do not."""
    return 1 < points.num_clusters < len(points)


def shared_se(points: Points) -> float:
    """The standard error in nats/token that all losses share; 0 if `loss_se` is not known.

    If `loss_se_own` is not known, all of `loss_se` counts as shared, which gives E the wider interval.
    """
    if points.loss_se is None:
        return 0.0
    own = 0.0 if points.loss_se_own is None else float(np.median(points.loss_se_own))
    return float(np.sqrt(max(float(np.median(points.loss_se)) ** 2 - own**2, 0.0)))


def draw_nested(
    points: Points, problem: newton.Problem, theta: Array, replicates: int, rng: np.random.Generator
) -> Array:
    """Draw noise in the space of the residuals, (R, n): one draw per trunk plus one per point.

    The standard deviations of both are drawn from their posterior given the residuals. So the draws include the
    uncertainty that remains with few trunks.
    """
    probability, squares, dof = _posterior(points, problem, theta)
    chosen = rng.choice(len(SHARES), size=replicates, p=probability)
    sigma = np.sqrt(squares[chosen] / rng.chisquare(dof, size=replicates))[:, None]
    _, place = np.unique(points.cluster, return_inverse=True)
    trunk = rng.standard_normal((replicates, int(place.max()) + 1))[:, place] * RATIOS[chosen][:, None]
    own = rng.standard_normal((replicates, len(points))) / np.sqrt(np.maximum(points.weight, TINY))
    return np.asarray(sigma * (own + trunk))


def _trunk(points: Points, problem: newton.Problem, theta: Array) -> float:
    """The posterior mean of the trunks' standard deviation, as a share of the loss; NaN if it cannot be estimated."""
    if not is_nested(points) or len(points) > MOST_NESTED:
        return NAN
    probability, squares, dof = _posterior(points, problem, theta)
    mean = float((probability * np.sqrt(squares / dof) * SHARES / (1 - SHARES)).sum())
    return mean if problem.how.space == "log" else mean / float(np.median(points.loss))


def _posterior(points: Points, problem: newton.Problem, theta: Array) -> tuple[Array, Array, int]:
    """The posterior of the trunk's share, with a flat prior on SHARES.

    Near the fit, the law is linear: y = J d + Z u + e with the noise u of the trunks and e of the points. For each
    ratio of their variances, V is the covariance of Z u + e in units of sigma^2. The restricted likelihood is
    |V|^-1/2 |J' V^-1 J|^-1/2 (r' P r)^-(n-p)/2 (Harville, J. Am. Stat. Assoc. 72, 320, 1977), and r' P r / sigma^2 is
    chi-squared with n - p degrees of freedom.

    Returns:
        The probability of each share, (20,), the squares r' P r at each share, (20,), and n - p.
    """
    loss, slopes = problem.law.jet(theta, problem.x)
    j = slopes[0][problem.free].T / (loss[0][:, None] if problem.how.space == "log" else 1.0)
    residual = newton.target_of(problem, points.loss) - newton.predict(problem, theta)[0]
    together = (points.cluster[:, None] == points.cluster[None, :]).astype(np.float64)
    dof = len(residual) - j.shape[1]
    own = np.diag(1.0 / np.maximum(points.weight, TINY))
    log_likelihood, squares = np.empty(len(SHARES)), np.empty(len(SHARES))
    for k, ratio in enumerate(RATIOS):
        root = np.linalg.cholesky(own + ratio**2 * together)
        q, r = np.linalg.qr(np.linalg.solve(root, j))
        white = np.linalg.solve(root, residual)
        squares[k] = white @ white - ((q.T @ white) ** 2).sum()
        half = np.log(np.diag(root)).sum() + np.log(np.maximum(np.abs(np.diag(r)), TINY)).sum()
        log_likelihood[k] = -half - 0.5 * dof * np.log(squares[k])
    likelihood = np.exp(log_likelihood - log_likelihood.max())
    return likelihood / likelihood.sum(), squares, dof


def _replicates(points: Points, residual: Array) -> tuple[float, int]:
    """The noise between replicates: its sum of squares, as shares of the loss squared, and its degrees of freedom.

    Replicates have equal N, D and unique tokens, so the law gives them one loss, and the squares of their residuals are
    these squares plus those of the mean residual of each cell.
    """
    optional = [column for column in (points.unique, points.cell) if column is not None]
    _, place = np.unique(np.stack([points.params, points.tokens, *optional], axis=1), axis=0, return_inverse=True)
    weight = np.bincount(place, weights=points.weight)
    mean = np.bincount(place, weights=points.weight * residual) / np.maximum(weight, TINY)
    squares = float((points.weight * (residual - mean[place]) ** 2).sum())
    return squares, int((np.bincount(place) - 1).sum())


def _lack_of_fit(misfit: float, dof: int, pure: float, replicates: int) -> tuple[float, float]:
    """The F ratio of the law's misfit to the noise between seeds, and its p-value.

    `misfit` and `pure` are sums of squares with `dof` and `replicates` degrees of freedom.

    Both are NaN if no cell was run twice, if repeated runs do not differ, or if no degrees of freedom remain.
    """
    if not replicates or dof <= 0 or pure <= 0:
        return NAN, NAN
    from scipy.special import fdtrc

    ratio = misfit / dof / (pure / replicates)
    return float(ratio), float(fdtrc(dof, replicates, max(ratio, 0.0)))


def _median(error: Array | None, points: Points) -> float:
    return NAN if error is None else float(np.median(error / points.loss))
