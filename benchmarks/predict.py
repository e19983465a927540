"""Hide the top budgets of published sets of runs, predict them from the others, and print how far off each method is.

    DLM_REFERENCE_DATA=FOLDER python benchmarks/predict.py [--sets mdm_prime,porian] [--methods combined] [--write]

FOLDER holds the CSV files that its README names. A set is the runs of one source and one recipe; sets of one source
are one family, and the means are over sets. Three cuts hide the top budget, the runs above a tenth, and those above a
thirtieth of the highest C. A set with fewer than three budgets or ten runs below a cut is left out there.

`error` is the mean over the hidden runs of |predicted / measured - 1| and `bias` that of the signed error. `best` is
the error of the run with the lowest loss at each hidden budget. `compute` is the median of |log of the C at which the
law reaches this lowest loss, over the real C|. `inside` is the share of the hidden budgets whose mean log error
lies inside the 95 % interval of the law, with the 95 % interval of Clopper and Pearson for this share among the hidden
budgets of all sets. `score` is the mean interval score (Gneiting and Raftery, J. Am. Stat. Assoc. 102, 359, 2007) of
the log loss: the width, and 40 times the distance to the interval if the budget lies outside. `runs` is the share
of the hidden runs inside the interval of a run, and `width` the median
width of the interval of the law at the highest hidden budget. `skill` is 1 - error of L* / that of the straight
log-log line through the isoFLOP minima, over the sets that have such a line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
from scipy.stats import beta

from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_surface, judge, optimum
from dlm.fit.combined.fit import fit_combined
from dlm.fit.combined.origins import levels_of
from dlm.fit.isoflop.fit import fit_groups
from dlm.fit.points import Points, as_points
from dlm.fit.predict import predict
from dlm.fit.result import FitResult

LEVEL = 0.95  # nominal coverage of the intervals
CUTS: dict[str, float | None] = {"top": None, "x10": 10.0, "x30": 30.0}
LEAST_LEVELS, LEAST_RUNS, ONE_EPOCH = 3, 10, 1.05
METHODS = ("combined", "chinchilla", "skaling")
SEVERAL = {  # file: the column whose values are sets, and rows to leave out
    "epoch_chinchilla.csv": (None, "excluded_by_epoch"),
    "isoflop_ml_scalefit.csv": (None, None),
    "isoflop_llama_3_raw_loss.csv": (None, None),
    "porian_main.csv": ("run_id", None),
    "gadre_overtraining.csv": ("dataset", None),
    "datablations_182.csv": (None, "repeated"),
    "mdm_prime_v2_isoflop.csv": ("source", None),
    "quokka_isoflop_masked.csv": (None, None),
    "scaling_dllms_isoflop_digitised.csv": ("objective", None),
}


def sets(folder: Path) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield (family, set, rows). A file that is absent is named and skipped."""
    for name, (column, left_out) in SEVERAL.items():
        path = folder / name
        if not path.is_file():
            print(f"absent: {path}", file=sys.stderr)
            continue
        frame, family = pd.read_csv(path), path.stem
        if "epochs" in frame:
            frame["repeated"] = frame["epochs"] > ONE_EPOCH
        if left_out:
            frame = frame[~frame[left_out].astype(bool)]
        for value, rows in [(family, frame)] if column is None else frame.groupby(column):
            yield family, f"{family}:{value}" if column else family, rows


def points_of(rows: pd.DataFrame) -> Points:
    """The runs; equal FLOPs are budgets if they repeat."""
    spent = rows["flops"].to_numpy(dtype=np.float64)
    budget = spent if len(np.unique(spent)) <= len(spent) / 3 else None
    return as_points(rows["params"], rows["tokens"], rows["loss"], flops=spent, budget=budget)


def divided(points: Points, factor: float | None) -> tuple[Points, Points] | None:
    """The runs that are kept and those that are hidden; None if too few are kept."""
    level = levels_of(points)
    kept = level < level.max() if factor is None else points.flops <= points.top_flops / factor * (1 + 1e-9)
    enough = len(np.unique(level[kept])) >= LEAST_LEVELS and np.count_nonzero(kept) >= LEAST_RUNS
    return (points.take(kept), points.take(~kept)) if enough and not kept.all() else None


def fitted(method: str, points: Points, replicates: int) -> FitResult:
    """Fit with intervals and the verdict."""
    columns: Any = {name: getattr(points, name) for name in ("params", "tokens", "loss", "flops", "budget")}
    fit = fit_combined(**columns) if method == "combined" else fit_surface(**columns, law=method)
    return judge(bootstrap(fit, replicates=replicates), replicates=replicates)


def measure(fit: FitResult, hidden: Points) -> dict[str, float]:
    """How one fit predicts the hidden runs."""
    seen = predict(fit, hidden.params, hidden.tokens)
    error, level = seen.loss / hidden.loss - 1, levels_of(hidden)
    lowest = np.array([np.flatnonzero(level == c)[hidden.loss[level == c].argmin()] for c in np.unique(level)])
    inside, scores = [], []
    for c in np.unique(level):
        at, off = level == c, np.log(hidden.loss / seen.loss)[level == c].mean()
        low, high = (np.log(seen.ci[at, k] / seen.loss[at]).mean() for k in (0, 1))
        inside.append(float(low <= off <= high) if np.isfinite(low + high) else np.nan)
        scores.append(high - low + 2 / (1 - LEVEL) * max(low - off, off - high, 0.0))
    top = hidden.flops >= hidden.top_flops * (1 - 1e-9)
    given = np.isfinite(seen.pi).all(axis=1)
    held = (seen.pi[:, 0] <= hidden.loss) & (hidden.loss <= seen.pi[:, 1])
    return {
        "error": float(np.abs(error).mean()),
        "bias": float(error.mean()),
        "best": float(np.abs(error[lowest]).mean()),
        "compute": float(np.median([abs(_equivalent(fit, hidden.flops[k], hidden.loss[k])) for k in lowest])),
        "inside": float(np.mean(inside)),
        "budgets": float(len(inside)),
        "score": float(np.mean(scores)),
        "runs": float(held[given].mean()) if given.any() else np.nan,
        "width": float(np.median(np.log(seen.ci[top, 1] / seen.ci[top, 0]))),
    }


def _equivalent(fit: FitResult, flops: float, loss: float) -> float:
    """log of the C at which L*(C) of the law is `loss`, over `flops`; NaN if the law does not reach it nearby."""
    grid = flops * np.geomspace(0.03, 30.0, 61)
    row = optimum.as_rows(fit.surface, fit.params)
    lowest = np.array([optimum.best(fit.surface, row, c, fit.cost)[0, 2] for c in grid.tolist()])
    if not lowest.min() <= loss <= lowest.max():
        return float("nan")
    return float(np.log(np.interp(-loss, -lowest, grid) / flops))


def at_minima(fits: dict[str, FitResult], kept: Points, hidden: Points) -> dict[str, dict[str, float]]:
    """Errors of N* (log) and of L* at the hidden budgets that have a minimum; the methods and the straight line."""
    if kept.budget is None or hidden.budget is None:
        return {}
    line = fit_groups(kept)
    truth = fit_groups(hidden).usable
    if not line.params or not truth:
        return {}
    found = {}
    for name, fit in {**fits, "line": line}.items():
        best = [optimum.own_optimum(fit, m.budget, LEVEL) for m in truth]
        found[name] = {
            "N*": float(np.mean([abs(np.log(o.N / m.N)) for o, m in zip(best, truth, strict=True)])),
            "L*": float(np.mean([abs(o.L / m.L - 1) for o, m in zip(best, truth, strict=True)])),
        }
    return found


def rows_of(folder: Path, names: list[str], methods: list[str], replicates: int) -> Iterator[dict[str, Any]]:
    """Yield the measurements of every set, cut and method."""
    for family, name, frame in sets(folder):
        if names and not any(part in name for part in names):
            continue
        points = points_of(frame)
        for cut, factor in CUTS.items():
            parts = divided(points, factor)
            if parts is None:
                continue
            kept, hidden = parts
            began, fits = time.process_time(), {}
            for method in methods:
                try:
                    fits[method] = fitted(method, kept, replicates)
                except UserError as error:
                    print(f"{name}, {cut}: {method} gives nothing: {error}", file=sys.stderr)
            minima = at_minima(fits, kept, hidden)
            head = {"family": family, "set": name, "cut": cut, "n": len(kept), "hidden": len(hidden)}
            for method, fit in fits.items():
                yield {**head, "method": method, **measure(fit, hidden), **minima.get(method, {})}
            if "line" in minima:
                yield {**head, "method": "line", **minima["line"]}
            print(f"{name}, {cut}: {time.process_time() - began:.1f} s", file=sys.stderr, flush=True)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The mean over sets for each cut and method; medians for compute and width."""
    lines = []
    for (cut, method), rows in table.groupby(["cut", "method"], sort=False):
        line: dict[str, Any] = {"cut": cut, "method": method, "sets": rows["set"].nunique()}
        for name in ("error", "bias", "best", "inside", "score", "runs", "N*", "L*"):
            line[name] = rows[name].mean()
        line |= {name: rows[name].median() for name in ("compute", "width")}
        given = rows[rows["inside"].notna()]
        line["inside, 95 %"] = share_between(float((given["inside"] * given["budgets"]).sum()), given["budgets"].sum())
        line["no interval"] = int(rows["inside"].isna().sum())
        straight = table[(table["cut"] == cut) & (table["method"] == "line")].set_index("set")["L*"]
        own = rows.set_index("set")["L*"].dropna()
        shared = own.index.intersection(straight.index)
        line["skill"] = 1 - own[shared].mean() / straight[shared].mean() if len(shared) else np.nan
        lines.append(line)
    return pd.DataFrame(lines)


def share_between(held: float, count: float) -> str:
    """The interval of Clopper and Pearson (Biometrika 26, 404, 1934) for a share, from `held` of `count`."""
    if not count:
        return "-"
    tail = (1 - LEVEL) / 2
    low = beta.ppf(tail, held, count - held + 1) if held > 0 else 0.0
    high = beta.ppf(1 - tail, held + 1, count - held) if held < count else 1.0
    return f"{low:.2f} to {high:.2f}"


def main() -> None:
    """Print the table of every set and the means; with --write also store them in benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="", help="parts of the names of sets, with commas between; all by default")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--replicates", type=int, default=400)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    args = parser.parse_args()
    folder = os.environ.get("DLM_REFERENCE_DATA")
    if not folder:
        print(
            "predict: DLM_REFERENCE_DATA is not set: the published runs are absent, nothing measured", file=sys.stderr
        )
        raise SystemExit(2)
    names, methods = ([word for word in given.split(",") if word] for given in (args.sets, args.methods))
    table = pd.DataFrame(list(rows_of(Path(folder), names, methods, args.replicates)))
    short = summary(table)
    with pd.option_context("display.width", 200, "display.max_columns", 30, "display.max_rows", 500):
        print(table.round(4).to_string(index=False))
        print(short.round(4).to_string(index=False))
    if args.write:
        path = Path(__file__).parent / "results" / f"predict_{date.today()}.json"
        path.write_text(
            json.dumps({"sets": table.to_dict("records"), "means": short.to_dict("records")}, indent=1) + "\n"
        )
        print(path)


if __name__ == "__main__":
    main()
