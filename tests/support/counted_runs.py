"""Synthetic runs of a known law in all parameters, with the parameters of the blocks beside them."""

import numpy as np
import pandas as pd

BUDGETS = (1e18, 3e18, 1e19, 3e19, 1e20)
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
EXPONENTS = (BETA / (ALPHA + BETA), ALPHA / (ALPHA + BETA))  # a and b, with N in all parameters and C = 6 N D
EMBEDDING = 2 * 32000 / 64  # rows of embedding and head, over the ratio of depth times width that `total_of` assumes


def total_of(blocks):
    """All parameters: the blocks and an embedding whose width is that of the blocks to the power 1/3."""
    return blocks + 100 * EMBEDDING * np.cbrt(blocks)


def blocks_of(total):
    """The inverse of `total_of`, by bisection."""
    low, high = np.zeros_like(total), total
    for _ in range(200):
        middle = (low + high) / 2
        above = total_of(middle) > total
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return low


def best_total(flops, *, alpha=ALPHA, beta=BETA):
    """N* in all parameters at C = 6 N D."""
    factor = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    return factor * (flops / 6) ** (beta / (alpha + beta))


def exponents_of_blocks():
    """a with N of the blocks: the mean slope of the blocks of the best model over the budgets."""
    best = blocks_of(best_total(np.array([BUDGETS[0], BUDGETS[-1]])))
    return float(np.log(best[1] / best[0]) / np.log(BUDGETS[-1] / BUDGETS[0]))


def counted_runs(*, sigma=0.0, seed=0, alpha=ALPHA, beta=BETA, width=2.5, sizes=7):
    """Runs with params of the blocks, params_total, and FLOPs of 6 params_total tokens; sigma is the relative noise."""
    total = np.concatenate(
        [best_total(c, alpha=alpha, beta=beta) * np.geomspace(1 / width, width, sizes) for c in BUDGETS]
    )
    flops = np.repeat(BUDGETS, sizes)
    tokens = flops / 6 / total
    loss = E + A / total**alpha + B / tokens**beta
    noise = 1 + sigma * np.random.default_rng(seed).standard_normal(len(loss))
    return pd.DataFrame(
        {
            "params": blocks_of(total),
            "params_total": total,
            "tokens": tokens,
            "loss": loss * noise,
            "flops": flops,
            "budget": flops,
            "convention": "6n_total",
        }
    )
