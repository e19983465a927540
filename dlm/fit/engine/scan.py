"""Scan a grid of (alpha, beta) for Chinchilla laws near the global minimum, from which the fit of every law starts.

For fixed exponents Chinchilla's law is linear in (E, A, B). So one matrix product gives the weighted least squares of
every replicate at every cell of the grid: variable projection (Golub and Pereyra, SIAM J. Numer. Anal. 10, 413, 1973).
Residuals of log loss enter as residuals of the loss, weighted by 1/L^2.
"""

from __future__ import annotations

import numpy as np

from dlm.fit.engine.newton import Problem, target_of, value
from dlm.fit.points import Array, Mask

EXPONENTS = np.geomspace(0.02, 3.0, 32)
COARSE = EXPONENTS[1::3]  # for bootstrap replicates, which also start from the fit itself
LEAST = 1e-6  # E as a share of the smallest loss, if least squares would give a negative E


def grid(problem: Problem, loss: Array, weight: Array, exponents: Array = EXPONENTS) -> tuple[Array, Array]:
    """Solve least squares at every pair of `exponents`.

    Args:
        problem: Defines the features and the space of the residuals.
        loss: nats/token, (R, n) or (1, n).
        weight: Factor of each point, (R, n) or (1, n).
        exponents: The values of alpha and of beta, (k,).

    Returns:
        theta of Chinchilla's law at every cell, (R, k * k, 5), and the weighted mean of squared residuals there,
        (R, k * k), which is infinite if A or B is not positive.
    """
    size, tokens = (np.exp(-np.outer(v, exponents)) for v in problem.x)
    weight = weight / loss**2 if problem.how.space == "log" else weight
    moments = _moments(size, tokens, loss, weight / weight.sum(axis=1, keepdims=True))
    with np.errstate(all="ignore"):
        return _solve(exponents, moments, least=LEAST * loss.min(axis=1)[:, None, None])


def starts(problem: Problem, loss: Array, weight: Array) -> tuple[Array, Mask]:
    """The best cell of every replicate: its theta (R, 5), and whether any cell gives a law (R,)."""
    theta, squares = grid(problem, loss, weight, COARSE)
    best, rows = squares.argmin(axis=1), np.arange(len(squares))
    return theta[rows, best], np.isfinite(squares[rows, best])


def many_starts(problem: Problem, loss: Array, weight: Array, *, cells: int | None = None, best: int = 16) -> Array:
    """The starts of a single fit, (S, 5): the best cells of the grid by the true objective.

    The best cell of each 8 x 8 block is among them, so that no basin is missed.

    Args:
        problem: The problem that will be minimised.
        loss: nats/token, (n,).
        weight: Factor of each point, (n,).
        cells: Number of cells, those with the least squares, at which the true objective is computed; all if None.
        best: Number of best cells to return, besides those of the blocks.
    """
    thetas, squares = (v[0] for v in grid(problem, loss[None], weight[None]))
    scored = np.argsort(squares)[:cells]
    scored = scored[np.isfinite(squares[scored])]
    scores = np.full(len(squares), np.inf)
    scores[scored] = value(problem, thetas[scored], target_of(problem, loss)[None], weight[None])
    side = len(EXPONENTS)
    blocks = np.arange(side * side).reshape(side // 8, 8, side // 8, 8).transpose(0, 2, 1, 3).reshape(-1, 64)
    chosen = np.concatenate([np.argsort(scores)[:best], blocks[np.arange(len(blocks)), scores[blocks].argmin(axis=1)]])
    chosen = np.unique(chosen[np.isfinite(scores[chosen])])
    return np.asarray(thetas[chosen], dtype=np.float64)


def _moments(size: Array, tokens: Array, loss: Array, weight: Array) -> tuple[Array, ...]:
    """Weighted means of f = N^-alpha, g = D^-beta, the loss and their products, ready to broadcast over cells."""
    n, k = size.shape
    product = (size[:, :, None] * tokens[:, None, :]).reshape(n, k * k)
    plain = weight @ np.concatenate([size, tokens, size**2, tokens**2], axis=1)
    mixed = (weight * loss) @ np.concatenate([size, tokens], axis=1)
    f, g, ff, gg = (plain[:, i * k : (i + 1) * k] for i in range(4))
    fl, gl = mixed[:, :k], mixed[:, k:]
    fg = (weight @ product).reshape(-1, k, k)
    first, second = ((weight * loss**p).sum(axis=1)[:, None, None] for p in (1, 2))
    columns = (f[:, :, None], g[:, None, :], ff[:, :, None], gg[:, None, :], fl[:, :, None], gl[:, None, :])
    return (*columns, fg, first, second)


def _solve(exponents: Array, moments: tuple[Array, ...], *, least: Array) -> tuple[Array, Array]:
    """Solve for E, A and B at each cell; where E would not be positive, pin it to `least` and solve for A and B."""
    f, g, ff, gg, fl, gl, fg, l1, l2 = moments
    a, b = _two(ff - f * f, gg - g * g, fg - f * g, fl - f * l1, gl - g * l1)
    e = l1 - a * f - b * g
    a0, b0 = _two(ff, gg, fg, fl - least * f, gl - least * g)
    pinned = e < least
    a, b, e = np.where(pinned, a0, a), np.where(pinned, b0, b), np.where(pinned, least, e)
    squares = (l2 - 2 * (e * l1 + a * fl + b * gl) + e * e + 2 * e * (a * f + b * g)) + (
        a * a * ff + b * b * gg + 2 * a * b * fg
    )
    squares = np.where((a > 0) & (b > 0) & np.isfinite(squares), squares, np.inf)
    alpha = np.broadcast_to(exponents[None, :, None], squares.shape)
    beta = np.broadcast_to(exponents[None, None, :], squares.shape)
    theta = np.stack([np.log(a), alpha, np.log(b), beta, e], axis=-1)
    return theta.reshape(len(theta), -1, 5), squares.reshape(len(squares), -1)


def _two(ff: Array, gg: Array, fg: Array, fl: Array, gl: Array) -> tuple[Array, Array]:
    """Solve the 2 x 2 normal equations by Cramer's rule."""
    determinant = ff * gg - fg * fg
    return (fl * gg - gl * fg) / determinant, (gl * ff - fl * fg) / determinant
