"""Measure how often the intervals hold the truth, in simulated worlds whose seeds are fixed beforehand.

    python benchmarks/coverage.py [--rows surface,gate,faults] [--worlds 4000] [--seed 2] [--write]

surface: 95 % intervals of one form, which is the true one (Chinchilla's published law, with noise of 1 % for each
run), for n = 35 and 20 runs.
gate: intervals after `judge`, in worlds where the form is wrong (Skaling laws as fitted to public points: masked
diffusion k = 0.30, autoregressive k = 0.31, Prime k = 0.42), where small runs are under-tuned (their loss is too high
by 3 % at the lowest budget, falling with the root of C; or by 2 %, falling in a straight line over log C to nothing
at the top budget), and where branches of one trunk share noise.
faults: intervals of the combined law in worlds with a fault that no law knows (6 budgets, 7 sizes, noise of 0.5 %):
sizes above 300M mistuned by 2 % per decade; the top two budgets mistuned by 1 and 2 %; a floor of 2.15 that the runs
hardly see; 3B unique tokens that longer runs repeat; 4 % of the runs diverged, with a loss 10 to 50 % too high.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from dlm.fit import bootstrap, fit_surface, judge, optima, optimum
from dlm.fit.combined.fit import fit_combined
from dlm.fit.laws import LAWS
from dlm.fit.points import Array, Cost

TRUTHS = {
    "chinchilla": ("chinchilla", (1.69, 406.4, 410.7, 0.34, 0.28)),
    "diffusion": ("skaling", (0.519, 20.44, 93.47, 0.3657, 0.4925, 0.3006)),
    "autoregressive": ("skaling", (0.6707, 24.23, 14.69, 0.4111, 0.4708, 0.3131)),
    "prime": ("skaling", (1.011, 56.48, 93.29, 0.4967, 0.5816, 0.422)),
}
TRUTHS["floor"] = ("chinchilla", (2.15, 60.0, 60.0, 0.17, 0.15))
UNIQUE, WORTH = 3e9, 15.4  # unique tokens of the fault 'epochs', and how many repetitions count (2305.16264)
TOP, LOWEST = 1e20, 1e18
BEYOND = 10.0  # times the top budget, or the reach if that is nearer
Hits = dict[str, list[float]]


class World:
    """A true law with C = 6 N D, from which runs are drawn."""

    def __init__(self, name: str) -> None:
        law, row = TRUTHS[name]
        self.law, self.row = LAWS[law](), np.array([row])

    def best(self, flops: float) -> Array:
        """(N*, D*, L*)."""
        return optimum.best(self.law, self.row, flops, Cost())[0]

    def runs(
        self,
        rng: np.random.Generator,
        *,
        budgets: int,
        sizes: int,
        width: float,
        own: float,
        trunk: float = 0.0,
        under_tuned: Callable[[Array], Array] | None = None,
    ) -> dict[str, Array]:
        """Draw the runs: params, tokens, loss, budget and, if trunks share noise, cluster (one for each size)."""
        levels = np.geomspace(LOWEST, TOP, budgets)
        params = np.concatenate([self.best(c)[0] * np.geomspace(1 / width, width, sizes) for c in levels])
        budget = np.repeat(levels, sizes)
        tokens = budget / 6 / params
        loss = self.law.predict(self.row, np.log(params)[None], np.log(tokens)[None])[0]
        if under_tuned is not None:
            loss = loss * (1 + under_tuned(budget))
        found = {"params": params, "tokens": tokens, "budget": budget}
        if trunk:
            edges = np.linspace(np.log(params.min()), np.log(params.max()) + 1e-9, 12)
            found["cluster"] = np.digitize(np.log(params), edges)
            loss = loss * np.exp(trunk * rng.standard_normal(12)[found["cluster"]])
        return found | {"loss": loss * np.exp(own * rng.standard_normal(len(loss)))}


def falling(budget: Array) -> Array:
    """Relative excess loss: 3 % at the lowest budget, falling with the root of C."""
    return 0.03 * (budget / LOWEST) ** -0.5


def straight(budget: Array) -> Array:
    """Relative excess loss: 2 % at the lowest budget, 0 at the top; the runs cannot distinguish it from the law."""
    return 0.02 * np.log(TOP / budget) / np.log(TOP / LOWEST)


def surface(worlds: int, seed: int, norm: str, budgets: int, sizes: int) -> Hits:
    """Intervals of a Chinchilla fit in worlds of Chinchilla's form."""
    world, hits = World("chinchilla"), {}
    for k in range(worlds):
        runs = world.runs(np.random.default_rng((seed, k)), budgets=budgets, sizes=sizes, width=8.0, own=0.01)
        fitted = fit_surface(**runs, norm=norm, at=[TOP, BEYOND * TOP], holdout=False)
        result = bootstrap(fitted, replicates=500, seed=k)
        truth = {"a": (0.28 / 0.62, result.ci["a"])}
        for flops, where in ((TOP, ""), (BEYOND * TOP, " at ten times")):
            n, _, loss = world.best(flops)
            truth["N*" + where] = (n, result.at[flops].ci["N"])
            if not where:
                truth["L*"] = (loss, result.at[flops].ci["L"])
        _count(hits, truth)
    return hits


def gate(worlds: int, seed: int, truth: str, **how: Any) -> Hits:
    """Intervals after `judge`, at the top budget and at ten times it, or at the reach if that is lower."""
    world, hits = World(truth), {}
    for k in range(worlds):
        runs = world.runs(np.random.default_rng((seed, k)), budgets=7, sizes=5, width=5.0, **how)
        fitted = bootstrap(fit_surface(**runs, norm="mse", at=[TOP]), replicates=500, seed=k)
        result = judge(fitted, replicates=500, seed=k)
        assert result.verdict is not None
        far = min(BEYOND * TOP, result.verdict.reach)
        found = optima(result, [TOP, far, BEYOND * TOP])
        seen = {
            "N*": (world.best(TOP)[0], found[TOP].ci["N"]),
            "L*": (world.best(TOP)[2], found[TOP].ci["L"]),
            "N* at ten times": (world.best(BEYOND * TOP)[0], found[BEYOND * TOP].ci["N"]),
            "L* at the reach": (world.best(far)[2], found[far].ci["L"]),
        }
        _count(hits, seen)
        hits.setdefault("reach / top", []).append(result.verdict.reach / TOP)
        hits.setdefault("width of L*", []).append(float(np.ptp(np.log(found[far].ci["L"]))))
    return hits


Fault = Callable[[dict[str, Array], World, np.random.Generator], Array]


def _mistuned_sizes(runs: dict[str, Array], world: World, rng: np.random.Generator) -> Array:
    return np.asarray(runs["loss"] * (1 + 0.02 * np.maximum(np.log10(runs["params"] / 3e8), 0.0)))


def _mistuned_budgets(runs: dict[str, Array], world: World, rng: np.random.Generator) -> Array:
    levels = np.unique(runs["budget"])
    excess = 0.02 * (runs["budget"] == levels[-1]) + 0.01 * (runs["budget"] == levels[-2])
    return np.asarray(runs["loss"] * (1 + excess))


def _epochs(runs: dict[str, Array], world: World, rng: np.random.Generator) -> Array:
    repeated = np.maximum(runs["tokens"] / UNIQUE - 1, 0.0)
    worth = np.minimum(runs["tokens"], UNIQUE) + UNIQUE * WORTH * (1 - np.exp(-repeated / WORTH))
    row, log_n = world.row, np.log(runs["params"])[None]
    one, other = (world.law.predict(row, log_n, np.log(v)[None])[0] for v in (worth, runs["tokens"]))
    return np.asarray(runs["loss"] * one / other)


def _diverged(runs: dict[str, Array], world: World, rng: np.random.Generator) -> Array:
    lost = rng.permutation(len(runs["loss"])) < round(0.04 * len(runs["loss"]))
    return np.asarray(runs["loss"] * np.where(lost, rng.uniform(1.1, 1.5, len(runs["loss"])), 1.0))


def _none(runs: dict[str, Array], world: World, rng: np.random.Generator) -> Array:
    return runs["loss"]


FAULTS: dict[str, tuple[str, Fault]] = {
    "none": ("chinchilla", _none),
    "none, diffusion": ("diffusion", _none),
    "large sizes mistuned": ("chinchilla", _mistuned_sizes),
    "top budgets mistuned": ("chinchilla", _mistuned_budgets),
    "floor hardly seen": ("floor", _none),
    "hidden epochs": ("chinchilla", _epochs),
    "diverged runs": ("chinchilla", _diverged),
}


def faults(worlds: int, seed: int, name: str) -> Hits:
    """Intervals of the combined law, of N* and L* at the top budget, at three and at ten times it."""
    truth, spoil = FAULTS[name]
    world, hits = World(truth), {}
    for k in range(worlds):
        rng = np.random.default_rng((seed, k))
        runs = world.runs(rng, budgets=6, sizes=7, width=5.0, own=0.005)
        runs["loss"] = spoil(runs, world, rng)
        result = judge(bootstrap(fit_combined(**runs), replicates=300, seed=k), replicates=300)
        assert result.verdict is not None
        for times in (1.0, 3.0, 10.0):
            found, best = optimum.own_optimum(result, times * TOP, 0.95), world.best(times * TOP)
            _count(hits, {f"{key}* x{times:g}": (best[j], found.ci[key]) for key, j in (("N", 0), ("L", 2))})
        hits.setdefault("reach / top", []).append(result.verdict.reach / TOP)
        ten = optimum.own_optimum(result, BEYOND * TOP, 0.95)
        hits.setdefault("width of L*", []).append(float(np.ptp(np.log(ten.ci["L"]))))
    return hits


def _count(hits: Hits, truth: dict[str, tuple[float, tuple[float, float]]]) -> None:
    """1 if the interval holds the truth, 0 if not, NaN if there is no interval."""
    for name, (value, (low, high)) in truth.items():
        hits.setdefault(name, []).append(float(low <= value <= high) if np.isfinite(low + high) else np.nan)


def rows(names: list[str], worlds: int, seed: int) -> Iterator[tuple[str, Hits]]:
    """Yield (name, hits) of every row that was asked for."""
    if "surface" in names:
        for norm in ("huber", "mse"):
            for budgets, sizes in ((5, 7), (4, 5)):
                yield f"surface, {norm}, n = {budgets * sizes}", surface(worlds, seed, norm, budgets, sizes)
    if "gate" in names:
        few = max(worlds // 20, 1)
        plain: dict[str, Any] = {"own": 0.005}
        trunks: dict[str, Any] = {"own": 0.003, "trunk": 0.005}
        for truth in TRUTHS:
            yield f"gate, {truth}", gate(few, seed, truth, **plain)
        for truth in ("chinchilla", "diffusion"):
            yield f"gate, {truth}, under-tuned", gate(few, seed, truth, **plain, under_tuned=falling)
            yield f"gate, {truth}, under-tuned unseen", gate(few, seed, truth, **plain, under_tuned=straight)
            yield f"gate, {truth}, trunks", gate(few, seed, truth, **trunks)
            yield f"gate, {truth}, under-tuned, trunks", gate(few, seed, truth, **trunks, under_tuned=falling)
    if "faults" in names:
        for fault in FAULTS:
            yield f"faults, {fault}", faults(max(worlds // 20, 1), seed, fault)


def main() -> None:
    """Print the table row by row; with --write also store it in benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="surface,gate", help="which, with commas between")
    parser.add_argument("--worlds", type=int, default=4000, help="a twentieth of them for each row of gate and faults")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    args = parser.parse_args()
    table: dict[str, Any] = {}
    began = time.perf_counter()
    for what, hits in rows(args.rows.split(","), args.worlds, args.seed):
        shown = {name: _summary(name, values) for name, values in hits.items()}
        table[what] = {"worlds": len(next(iter(hits.values()))), "seconds": time.perf_counter() - began, **shown}
        began = time.perf_counter()
        print(f"{what} ({table[what]['worlds']} worlds, {table[what]['seconds']:.0f} s):", flush=True)
        print("   " + ", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    if args.write:
        names = args.rows.replace(",", "_")
        path = Path(__file__).parent / "results" / f"coverage_{names}_{date.today()}.json"
        path.write_text(json.dumps({"seed": args.seed, "rows": table}, indent=2) + "\n")
        print(path)


def _summary(name: str, values: list[float]) -> Any:
    """The share of the given intervals that hold the truth; of other quantities the median."""
    column = np.array(values)
    if name in ("reach / top", "width of L*"):
        return round(float(np.median(column)), 3)
    given = column[np.isfinite(column)]
    share = round(float(given.mean()), 4) if len(given) else None
    return share if len(given) == len(column) else {"covered": share, "given": round(len(given) / len(column), 4)}


if __name__ == "__main__":
    main()
