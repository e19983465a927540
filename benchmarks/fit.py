"""Measure the surface fit and its bootstrap beside other tools, with one thread.

    DLM_REFERENCE_DATA=DIR python benchmarks/fit.py [--peers DIR] [--full]

The points are the 240 of Hoffmann et al. (arXiv 2203.15556) that Besiroglu et al. (2404.10102) fitted:
epoch_chinchilla.csv in DIR without the rows excluded_by_epoch. They have no licence and are not part of the project.
All tools run in turn in one process, after one round that does not count; results are medians. Beside dlm:

* Epoch's protocol, from its description in 2404.10102: the Huber norm with delta = 1e-3 of the log loss, summed over
  the points, the law by log-sum-exp, BFGS from 4500 starts, then 4000 bootstraps, each from the best optimum; the
  same with L-BFGS-B. A part of both is measured and scaled up; with --full everything is run, once (two minutes). The
  gradient is exact here and by automatic differentiation there, so the protocol takes at least these seconds.
* scipy's BFGS and L-BFGS-B on the same objective, as well scaled as ours (centred logs, divided by delta). The script
  also checks whether our optimum is ever above the lowest that they find, on the points and on resamples of them.
* simple-scaling-laws, from a folder outside the repository (its metadata requires Python 3.12, but it runs on 3.11):

    python -m pip install --no-deps --ignore-requires-python --target DIR simple-scaling-laws==0.2.0
    python -m pip install --target DIR polars

The result goes to benchmarks/results/ and is printed as a table.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
os.environ["POLARS_MAX_THREADS"] = "1"

import argparse
import datetime
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import WINDOWS, Side, write_result
from dlm.fit import FitResult, bootstrap, fit_surface

Array = npt.NDArray[np.float64]
T = TypeVar("T")
DELTA, REPLICATES, STARTS = 1e-3, 4000, 4500
PART_STARTS, PART_REPLICATES, RESAMPLES = 100, 40, 20
METHODS = ("BFGS", "L-BFGS-B")
ROUNDING = 1e-9  # of the objective: what two sums of 240 terms may differ by
PEER = "simple_scaling_laws"
NAMES = ("E", "A", "B", "alpha", "beta")  # of the rows of `FitResult.draws`
_minimize: Any = minimize


@dataclass(frozen=True, eq=False)
class Points:
    """N parameters, D tokens, L nats/token, one entry per run."""

    n: Array
    d: Array
    loss: Array

    def fit(self, **how: Any) -> FitResult:
        """dlm's fit. With two budgets there are no hold-outs, because the lower one alone cannot be fitted."""
        return fit_surface(self.n, self.d, self.loss, **how)

    @property
    def two_budgets(self) -> Array:
        cost = self.n * self.d
        return np.where(cost > np.median(cost), 2e21, 1e21)


def read(folder: str | None) -> Points:
    """Read the 240 points. Exits with code 2 where they are absent."""
    path = Path(folder or "") / "epoch_chinchilla.csv"
    if not folder or not path.is_file():
        where = f"DLM_REFERENCE_DATA={folder} holds no {path.name}" if folder else "DLM_REFERENCE_DATA is not set"
        print(f"fit: absent: {where}, the published points; nothing was measured", file=sys.stderr)
        raise SystemExit(2)
    frame = pd.read_csv(path)
    kept = frame[~frame["excluded_by_epoch"].astype(bool)]
    return Points(*(kept[name].to_numpy(dtype=np.float64) for name in ("params", "tokens", "loss")))


def clocked(call: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What the call returns, its wall seconds and its seconds of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def in_turn(sides: dict[str, Side], windows: int, *, warm: int = 1) -> dict[str, dict[str, Any]]:
    """Run every tool once in each window. Returns the medians of what each measured, and the spread of its seconds."""
    kept: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for window in range(warm + windows):
        for name, side in sides.items():
            measured = side()
            if window >= warm:
                kept[name].append(measured)
    return {name: _median(measured) for name, measured in kept.items()}


def _median(windows: list[dict[str, float]]) -> dict[str, Any]:
    seconds = [window["seconds"] for window in windows]
    row: dict[str, Any] = {key: statistics.median(window[key] for window in windows) for key in windows[0]}
    return row | {"spread": [min(seconds), max(seconds)], "windows": len(windows)}


def ours(points: Points) -> dict[str, Side]:
    """The jobs of dlm. All bootstraps resample pairs."""
    fits: dict[str, dict[str, Any]] = {
        "huber": {"norm": "huber", "delta": DELTA},
        "mse": {"norm": "mse", "space": "raw"},
        "mse of log loss": {"norm": "mse"},
    }
    sides: dict[str, Side] = {}
    for name, how in fits.items():
        sides[f"point fit, {name}"] = _fit(points, how | {"budget": points.two_budgets})
        sides[f"bootstraps, {name}"] = _bootstrap(points.fit(**how))
    sides["point fit and both hold-outs, huber"] = _fit(points, fits["huber"])
    return sides


def _fit(points: Points, how: dict[str, Any]) -> Side:
    def window() -> dict[str, float]:
        result, seconds = clocked(lambda: points.fit(**how))
        return seconds | {"objective": result.value, "holdouts": len(result.holdout)}

    return window


def _bootstrap(result: FitResult) -> Side:
    def window() -> dict[str, float]:
        drawn, seconds = clocked(lambda: bootstrap(result, replicates=REPLICATES, method="pairs", seed=0))
        return seconds | {"failed": drawn.failed}

    return window


@dataclass(frozen=True, eq=False)
class Objective:
    """sum of counts * huber(log L - LSE(a - alpha log N, b - beta log D, e)) / scale, with its gradient."""

    log_n: Array
    log_d: Array
    log_loss: Array
    counts: Array
    scale: float = 1.0

    def __call__(self, x: Array) -> tuple[float, Array]:
        """x: (a, b, e, alpha, beta)."""
        a, b, e, alpha, beta = x
        terms = np.stack([a - alpha * self.log_n, b - beta * self.log_d, np.full_like(self.log_n, e)])
        top = terms.max(axis=0)
        parts = np.exp(terms - top)
        total = parts.sum(axis=0)
        residual = top + np.log(total) - self.log_loss
        inner = np.clip(residual, -DELTA, DELTA)
        by_term = self.counts * inner * parts / total
        slope = np.array([*by_term.sum(axis=1), -(by_term[0] @ self.log_n), -(by_term[1] @ self.log_d)])
        value = self.counts @ (inner * (residual - 0.5 * inner))
        return float(value) / self.scale, slope / self.scale

    def least(self, starts: Iterable[Array], method: str, **options: float) -> tuple[float, Array]:
        """The lowest value that scipy finds from the starts, and its place."""
        with np.errstate(all="ignore"):
            found = [_minimize(self, x, jac=True, method=method, options=options) for x in starts]
        best = min((one for one in found if np.isfinite(one.fun)), key=lambda one: float(one.fun))
        return float(best.fun) * self.scale, best.x


def plain(points: Points, counts: Array) -> Objective:
    """The objective as published, where every point counts as often as it was drawn."""
    return Objective(np.log(points.n), np.log(points.d), np.log(points.loss), counts)


def resamples(points: Points, replicates: int) -> Array:
    """How often each resample draws each point, (replicates, points)."""
    size = len(points.n)
    drawn = np.random.default_rng(0).integers(size, size=(replicates, size))
    return np.array([np.bincount(row, minlength=size) for row in drawn], dtype=np.float64)


def epoch(points: Points, *, full: bool) -> dict[str, Side]:
    """Epoch's protocol: the grid of Hoffmann et al. (a and b 0 to 25, e -1 to 1, alpha and beta 0 to 2), in part."""
    sizes, slopes = np.arange(0.0, 30.0, 5.0), np.arange(0.0, 2.5, 0.5)
    grid = np.array(list(itertools.product(sizes, sizes, np.arange(-1.0, 1.5, 0.5), slopes, slopes)))
    assert len(grid) == STARTS
    starts = grid if full else np.random.default_rng(0).permutation(grid)[:PART_STARTS]
    drawn = resamples(points, REPLICATES if full else PART_REPLICATES)
    sides: dict[str, Side] = {}
    for method in METHODS:
        sides[f"starts, {method}"] = _epoch_starts(points, starts, method)
        sides[f"bootstraps, {method}"] = _epoch_bootstraps(points, drawn, method)
    return sides


def _epoch_starts(points: Points, starts: Array, method: str) -> Side:
    task = plain(points, np.ones(len(points.n)))

    def window() -> dict[str, float]:
        (objective, _), seconds = clocked(lambda: task.least(starts, method))
        return _scaled(seconds, len(starts) / STARTS) | {"objective": objective}

    return window


def _epoch_bootstraps(points: Points, drawn: Array, method: str) -> Side:
    """Epoch's bootstrap, from the best optimum of the points; and how its optima compare with those of ours."""
    result = points.fit()
    own = objectives_of_bootstrap(points, result, drawn)
    best = log_named(np.array([result.params[name] for name in NAMES]))

    def window() -> dict[str, float]:
        found, seconds = clocked(lambda: [plain(points, counts).least([best], method)[0] for counts in drawn])
        return _scaled(seconds, len(drawn) / REPLICATES) | ended_beside(np.array(found), own)

    return window


def ended_beside(found: Array, own: Array) -> dict[str, float]:
    """Count the peer's optima that are above ours, by more than rounding or by 0.1 %, and those below."""
    excess = found / own - 1
    counts = {"above_ours": excess > ROUNDING, "above_ours_by_.1_%": excess > 1e-3, "below_ours": excess < -ROUNDING}
    return {name: int(which.sum()) for name, which in counts.items()} | {"lowest_beside_ours": float(excess.min())}


def _scaled(seconds: dict[str, float], fraction: float) -> dict[str, float]:
    whole = {key: value / fraction for key, value in seconds.items()}
    return whole | {"fraction": fraction, "measured_seconds": seconds["seconds"]}


def centred(points: Points, counts: Array) -> Objective:
    """The objective, scaled well for scipy: centred logs and values near 1."""
    log_n, log_d = np.log(points.n), np.log(points.d)
    return Objective(log_n - log_n.mean(), log_d - log_d.mean(), np.log(points.loss), counts, scale=DELTA)


def good_starts(points: Points) -> list[Array]:
    """Nine starts: exponents 0.2, 0.4 and 0.8 each; E at 0.8 of the lowest loss; both terms share the rest."""
    floor = 0.8 * float(points.loss.min())
    half = np.log((float(points.loss.mean()) - floor) / 2)
    return [np.array([half, half, np.log(floor), *pair]) for pair in itertools.product((0.2, 0.4, 0.8), repeat=2)]


OPTIONS: dict[str, dict[str, float]] = {
    "BFGS": {"gtol": 1e-9, "maxiter": 2000},
    "L-BFGS-B": {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 5000, "maxfun": 20000, "maxls": 50},
}


def scipy_sides(points: Points) -> dict[str, Side]:
    """scipy on our objective from nine good starts."""
    task, starts = centred(points, np.ones(len(points.n))), good_starts(points)

    def side(method: str) -> Side:
        def window() -> dict[str, float]:
            (objective, _), seconds = clocked(lambda: task.least(starts, method, **OPTIONS[method]))
            return seconds | {"objective": objective, "starts": len(starts)}

        return window

    return {method: side(method) for method in METHODS}


def never_above(points: Points) -> dict[str, Any]:
    """Compare our optimum with the lowest that either method of scipy finds, on the points and on resamples of them.

    On resamples ours is what the batched bootstrap keeps, and what a fit with the resample's counts as weights reaches.
    """
    ones = np.ones(len(points.n))
    result = points.fit()
    lowest, where = lowest_of_scipy(points, ones, [])
    row = {"points": _beside(np.array([result.value]), np.array([lowest]))}
    counts = resamples(points, RESAMPLES)
    batched = objectives_of_bootstrap(points, result, counts)
    single = np.array([points.fit(weights=c, budget=points.two_budgets).value for c in counts])
    scipys = np.array([lowest_of_scipy(points, c, [where])[0] for c in counts])
    row[f"{RESAMPLES} resamples, fitted"] = _beside(single, scipys)
    if np.median(batched / single) > 1.01:
        return row | {f"{RESAMPLES} resamples, bootstrap": {"absent": "bootstrap(seed=0) draws other resamples"}}
    return row | {f"{RESAMPLES} resamples, bootstrap": _beside(batched, scipys)}


def objectives_of_bootstrap(points: Points, result: FitResult, counts: Array) -> Array:
    """The values that our bootstrap reached on the first resamples of seed 0, which are those of `resamples`."""
    drawn = bootstrap(result, replicates=max(100, len(counts)), method="pairs", seed=0).draws
    assert drawn is not None
    return np.array([plain(points, c)(log_named(d))[0] for c, d in zip(counts, drawn, strict=False)])


def log_named(row: Array) -> Array:
    """Convert a bootstrap's (E, A, B, alpha, beta) to (a, b, e, alpha, beta)."""
    return np.array([*np.log(row[[1, 2, 0]]), *row[3:]])


def lowest_of_scipy(points: Points, counts: Array, more: list[Array]) -> tuple[float, Array]:
    """The lowest value of both methods over the good starts and further ones, and its place."""
    task, starts = centred(points, counts), [*good_starts(points), *more]
    return min((task.least(starts, method, **OPTIONS[method]) for method in METHODS), key=lambda found: found[0])


def _beside(own: Array, scipys: Array) -> dict[str, Any]:
    excess = own / scipys - 1
    return {
        "never_above": bool((excess <= ROUNDING).all()),
        "above": int((excess > ROUNDING).sum()),
        "below": int((excess < -ROUNDING).sum()),
        "largest_excess": float(excess.max()),
        "ours": own.tolist(),
        "scipy": scipys.tolist(),
    }


def peer(points: Points, folder: Path | None) -> tuple[dict[str, Side], dict[str, Any]]:
    """The fit and bootstrap of simple-scaling-laws with a description, or why it is absent."""
    if folder is None or not (folder / PEER).is_dir():
        tried = "--peers was not given" if folder is None else f"ls DIR/{PEER}: no such directory under --peers"
        return {}, {"absent": tried}
    sys.path.append(str(folder))
    try:
        package, polars = importlib.import_module(PEER), importlib.import_module("polars")
    except ImportError as error:
        return {}, {"absent": f"import {PEER} from --peers DIR: {error}"}
    runs = polars.DataFrame(
        {
            "training_run_id": [f"run {k}" for k in range(len(points.n))],
            "model_size__params": points.n,
            "dataset_size__tokens": points.d,
            "test_loss__nats": points.loss,
        }
    )

    def window() -> dict[str, float]:
        _, seconds = clocked(lambda: package.fit(runs, law="separable-power", n_draws=REPLICATES, seed=0))
        return seconds

    what = "fit of squares of the raw loss and its wild cluster bootstrap, one call"
    return {"fit and draws": window}, {"version": package.__version__, "what": what}


def measured(points: Points, options: argparse.Namespace) -> dict[str, Any]:
    """Run all tools in turn; those that take minutes run once, alone."""
    peers, about = peer(points, options.peers)
    protocol = epoch(points, full=options.full)
    sides = {"ours": ours(points), "epoch": protocol, "scipy": scipy_sides(points), PEER: peers}
    flat = {f"{tool}: {job}": side for tool, jobs in sides.items() for job, side in jobs.items()
            if not (options.full and tool == "epoch")}  # fmt: skip
    found = in_turn(flat, WINDOWS)
    if options.full:
        found |= in_turn({f"epoch: {job}": side for job, side in protocol.items()}, 1, warm=0)
    rows: dict[str, Any] = {tool: {} for tool in sides} | {PEER: about}
    for name, row in found.items():
        tool, job = name.split(": ", 1)
        rows[tool][job] = row
    together = {norm: sum(rows["ours"][f"{job}, {norm}"]["seconds"] for job in ("point fit", "bootstraps"))
                for norm in ("huber", "mse")}  # fmt: skip
    rows |= {"point_fit_and_bootstraps_seconds": together, "ratios": ratios(rows)}
    return rows | {"optimum_never_above_scipys": never_above(points)}


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """How many times as long as dlm another tool takes. simple-scaling-laws fits squares and bootstraps in one call."""
    own = {job: row["seconds"] for job, row in rows["ours"].items()}
    found = {f"epoch: {job}": row["seconds"] / own[f"{'point fit' if 'starts' in job else 'bootstraps'}, huber"]
             for job, row in rows["epoch"].items()}  # fmt: skip
    found |= {f"scipy: {job}": row["seconds"] / own["point fit, huber"] for job, row in rows["scipy"].items()}
    if "absent" not in rows[PEER]:
        both = own["point fit, mse"] + own["bootstraps, mse"]
        found[f"{PEER}: fit and draws"] = rows[PEER]["fit and draws"]["seconds"] / both
    return found


def table(rows: dict[str, Any]) -> str:
    """The seconds as a Markdown table, and below it whether our optimum was ever above scipy's."""
    lines = ["| tool and job | seconds | times ours | objective reached |", "|---|---|---|---|"]
    for tool in ("ours", "epoch", "scipy", PEER):
        for job, row in rows[tool].items():
            if isinstance(row, dict):
                part = f", {row['fraction']:.2%} of it measured" if row.get("fraction", 1) < 1 else ""
                ratio = rows["ratios"].get(f"{tool}: {job}")
                reached = f"{row['objective']:.10g}" if "objective" in row else _ended(row)
                times = "" if ratio is None else f"{ratio:.3g}"
                lines.append(f"| {tool}: {job}{part} | {row['seconds']:.3g} | {times} | {reached} |")
        if "absent" in rows[tool]:
            lines.append(f"| {tool} | absent: {rows[tool]['absent']} | | |")
    for norm, seconds in rows["point_fit_and_bootstraps_seconds"].items():
        lines.append(f"\npoint fit and {REPLICATES} bootstraps, {norm}: {seconds:.3g} s")
    for where, row in rows["optimum_never_above_scipys"].items():
        lines.append(f"\noptimum never above scipy's, {where}: {_said(row)}")
    return "\n".join(lines)


def _ended(row: dict[str, Any]) -> str:
    if "above_ours" not in row:
        return ""
    resampled = round(REPLICATES * row["fraction"])
    above, far, below = (int(row[name]) for name in ("above_ours", "above_ours_by_.1_%", "below_ours"))
    return f"of {resampled} resamples {above} above ours, {far} by .1 %; {below} below"


def _said(row: dict[str, Any]) -> str:
    if "absent" in row:
        return f"absent: {row['absent']}"
    both = f"; ours {row['ours'][0]:.12g}, scipy {row['scipy'][0]:.12g}" if len(row["ours"]) == 1 else ""
    counted = f"{row['above']} above, {row['below']} below, largest excess {row['largest_excess']:.2g}"
    return f"{'yes' if row['never_above'] else 'NO'} ({counted}{both})"


def main() -> None:
    """Measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=Path, help=f"folder that holds {PEER} and polars")
    parser.add_argument("--full", action="store_true", help="all starts and bootstraps of Epoch's protocol")
    options = parser.parse_args()
    points = read(os.environ.get("DLM_REFERENCE_DATA"))
    rows = {"points": len(points.n)} | measured(points, options)
    given = f"{' --peers DIR' if options.peers else ''}{' --full' if options.full else ''}"
    command = f"DLM_REFERENCE_DATA=DIR python benchmarks/fit.py{given}"
    print(table(rows))
    name = f"fit_{datetime.date.today()}"
    print(write_result(name, rows, command=command, packages=("numpy", "scipy"), threads=1))


if __name__ == "__main__":
    main()
