"""Measure what the noise costs that branches share with their trunk, in simulated worlds with seeds fixed beforehand.

    python benchmarks/trunks.py [--worlds 400] [--seed 4] [--write]

Each row is a design and a true law. In every world, runs are drawn twice: with noise of their own only, and with noise
of the same variance of which a share belongs to the trunk. A surface is fitted to both. `width` is the spread of N* at
the top budget over the worlds with shared noise, relative to that without; `planned` is what `dlm plan` says;
`covered` is the share of the 95 % intervals after `bootstrap` that hold N*.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from dlm.fit import bootstrap, fit_surface
from dlm.plan import sharing
from dlm.plan.cells import Plan
from dlm.plan.definition import parse_sweep
from dlm.plan.grid import make_plan

NOISE = 0.005  # standard deviation of the log of a loss
SHARES = (0.5, 0.9)  # of the variance of the noise
EXPONENTS = ((0.34, 0.28), (0.5, 0.5))
DESIGNS: dict[str, dict[str, Any]] = {
    "3 budgets x 5 sizes": {"budgets": [3e11, 1e12, 3e12], "tokens_per_param": [6, 600], "sizes_per_budget": 5},
    "4 budgets x 7 sizes": {"budgets": [1e11, 3e11, 1e12, 3e12], "tokens_per_param": [2, 1500], "sizes_per_budget": 7},
}
MODELS = ["4k", "8k", "19k", "33k", "49k", "74k", "111k", "197k"]


def plan_of(design: dict[str, Any]) -> Plan:
    """Plan a sweep with shared trunks."""
    keys = {"optimizer.lr": 5e-3, "scheduler.warmup_tokens_per_param": 0.1, "scheduler.decay_fraction": 0.2}
    shape = {"name": "trunks", "models": MODELS, "convention": "full_masked_head", "branches": True, "max_epochs": 99}
    return make_plan(parse_sweep({**shape, **design, "groups": {"scheduler": "wsd"}, "set": keys}, "trunks"))


def simulate(plan: Plan, alpha: float, beta: float, share: float, worlds: int, seed: int) -> dict[str, float]:
    """Draw and fit worlds; `share` of the variance of the noise belongs to the trunk."""
    n = np.array([cell.num_params for cell in plan.cells], dtype=float)
    d = np.array([cell.tokens for cell in plan.cells], dtype=float)
    _, trunk = np.unique([cell.parent or cell.cell_id for cell in plan.cells], return_inverse=True)
    unit = sharing.ABOVE / (1 / alpha + 1 / beta)
    a, b = (unit / power * np.exp(power * np.log(of).mean()) for power, of in ((alpha, n), (beta, d)))
    loss = sharing.FLOOR + a * n**-alpha + b * d**-beta
    top = max(cell.budget_flops for cell in plan.cells)
    at_top = np.array([cell.budget_flops for cell in plan.cells]) == top
    flops = 6 * float(np.exp(np.log(n * d)[at_top].mean()))
    best = (np.log(alpha * a / (beta * b)) + beta * np.log(flops / 6)) / (alpha + beta)
    found: dict[str, list[float]] = {"own": [], "shared": []}
    covered = []
    for world in range(worlds):
        rng = np.random.default_rng((seed, world))
        mine, others = rng.standard_normal(len(n)), rng.standard_normal(len(n))[trunk]
        for name, noise in (("own", mine), ("shared", np.sqrt(1 - share) * mine + np.sqrt(share) * others)):
            runs = {"params": n, "tokens": d, "loss": loss * np.exp(NOISE * noise), "cluster": trunk}
            fitted = fit_surface(**runs, norm="mse", at=[flops], holdout=False)
            found[name].append(float(np.log(fitted.at[flops].N)))
            if name == "shared" and world < worlds // 4:
                low, high = bootstrap(fitted, replicates=200, seed=world).at[flops].ci["N"]
                covered.append(float(low <= np.exp(best) <= high))
    # The spread is half the distance of the 16 % and 84 % quantiles: a few fits that run away would decide a variance.
    own, shared = (np.ptp(np.quantile(found[name], [0.16, 0.84])) / 2 for name in ("own", "shared"))
    return {"spread": float(own), "width": float(shared / own), "covered": float(np.mean(covered))}


def main() -> None:
    """Print the table row by row; with --write also store it in benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=400)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, design in DESIGNS.items():
        plan = plan_of(design)
        planned = sharing.sharing(plan.cells)
        for alpha, beta in EXPONENTS:
            for share in SHARES:
                began = time.perf_counter()
                row = {"design": name, "cells": len(plan.cells), "alpha": alpha, "beta": beta, "share": share,
                       **simulate(plan, alpha, beta, share, args.worlds, args.seed)}  # fmt: skip
                row |= {"flops": planned.flops, "flops_at_equal_width": planned.flops * row["width"] ** 2,
                        "planned_width": planned.width, "planned": planned.flops_at_equal_width,
                        "seconds": time.perf_counter() - began}  # fmt: skip
                rows.append(row)
                print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    if args.write:
        path = Path(__file__).parent / "results" / f"trunks_{date.today()}.json"
        path.write_text(json.dumps({"seed": args.seed, "worlds": args.worlds, "rows": rows}, indent=2) + "\n")
        print(path)


if __name__ == "__main__":
    main()
