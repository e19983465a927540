"""Synthetic runs.csv and excluded.csv in the form of the demo's: every column, from a known law with seeded noise."""

import numpy as np
import pandas as pd

from dlm.record.columns import EXCLUDED_COLUMNS, RUN_COLUMNS

SIZES = {
    "4k": 4224,
    "8k": 8400,
    "17k": 17000,
    "33k": 33000,
    "66k": 66000,
    "131k": 131000,
    "200k": 200000,
    "262k": 262000,
}
BUDGETS = (3e11, 1e12, 3e12)


def flops_per_token(n):
    """Return the FLOPs per token: 6 N, and an output head over 256 bytes for half of the tokens."""
    return 6 * n + 3 * 256 * np.sqrt(n / 24)


def true_loss(n, d, floor=1.5):
    return floor + 20 / n**0.35 + 60 / d**0.35


def demo_runs(*, objectives=("masked_diffusion",), budgets=BUDGETS, skip=(), sigma=0.004, seed=0):
    """Return a table with the columns RUN_COLUMNS, and one row per (objective, budget, size).

    ``skip`` holds the (budget, size) pairs to leave out; ``sigma`` is the relative noise of the loss.
    """
    rng = np.random.default_rng(seed)
    cells = [(o, c, m) for o in objectives for c in budgets for m in SIZES if (c, m) not in skip]
    rows = [_row(objective, budget, model, sigma * rng.standard_normal()) for objective, budget, model in cells]
    return pd.DataFrame(rows).reindex(columns=list(RUN_COLUMNS))


def _row(objective, budget, model, noise):
    n, head = SIZES[model], objective[:1]
    steps = int(budget / flops_per_token(n) / 2048)
    tokens = steps * 2048
    floor, error = (1.5, 0.002) if objective == "masked_diffusion" else (1.3, 0.0)
    return {
        "run_id": f"{head}-{model}-{budget:g}",
        "sweep": "demo",
        "objective": objective,
        "model": model,
        "params": n,
        "tokens": tokens,
        "flops": tokens * flops_per_token(n),
        "flops_6n": 6 * n * tokens,
        "convention": "full_masked_head",
        "budget": budget,
        "loss": true_loss(n, tokens, floor) * (1 + noise),
        "loss_se": error,
        "steps": steps,
        "schedule": "cosine",
        "data": "stdlib",
        "epochs": 1.0,
        "tokens_per_sec": 1e5,
        "device": "cpu",
        "attempts": 1,
        "status": "done",
    }


def no_excluded():
    return pd.DataFrame(columns=list(EXCLUDED_COLUMNS))


def excluded(reason):
    row = {"run_id": "m-200k-3e+12", "status": "diverged", "reason": reason}
    return pd.DataFrame([row]).reindex(columns=list(EXCLUDED_COLUMNS))
