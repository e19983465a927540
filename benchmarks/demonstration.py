"""What finished sweeps of one design say: minima, exponents, whether two methods agree, and the proof run.

    python benchmarks/demonstration.py workdir/demo OTHER/demo ...

Every folder holds a sweep that `make sweep` has finished, for example with other seeds (`--set seeds=[1]`). The rows
"ln ratio" compare N* of the surface with N* of the isoFLOP curves by a paired bootstrap: every resampled set of losses
gives both, so that noise which moves both alike cancels.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

from dlm.core import text
from dlm.fit import optimum
from dlm.fit.draws import ends
from dlm.fit.engine import newton
from dlm.fit.isoflop import curves
from dlm.fit.points import Array
from dlm.fit.result import FitResult
from dlm.fit.surface.resample import starts
from dlm.fit.table import fit_runs

RESAMPLES = 1000


def noise_of_runs(log_loss: Array, cell: Array) -> tuple[Array, Array]:
    """The mean log loss of the cell of each run, (n,), and the noise of the runs of cells that were run again, (m,).

    The noise is enlarged, because the mean of k runs of a cell takes up 1/k of their variance.
    """
    runs = np.bincount(cell)[cell]
    mean = (np.bincount(cell, weights=log_loss) / np.bincount(cell))[cell]
    return mean, ((log_loss - mean) * np.sqrt(runs / np.maximum(runs - 1, 1)))[runs > 1]


def agreement(line: FitResult, surface: FitResult) -> dict[float, tuple[float, float, float]]:
    """ln N*(surface) - ln N*(isoFLOP) at each budget with a minimum: the value and its 95 % interval.

    A resampled loss is the mean of the runs of its cell plus the noise of any run of the sweep. The value is that of
    the means themselves. A sample without a fit, or without a minimum inside the sizes, counts in both tails.
    """
    points, law = surface.points, surface.surface
    assert points is not None and points.budget is not None and law is not None
    cell = pd.DataFrame({"N": points.params, "D": points.tokens}).groupby(["N", "D"]).ngroup().to_numpy()
    mean, noise = noise_of_runs(np.log(points.loss), cell)
    rng = np.random.default_rng(0)
    drawn = np.concatenate([mean[None], mean + noise[rng.integers(len(noise), size=(RESAMPLES, len(points)))]])
    problem, weight = newton.problem_of(points, law, surface.how, surface.fixed), points.weight[None]
    theta = law.theta(optimum.as_rows(law, surface.params), problem.centre)
    residual = newton.target_of(problem, points.loss) - newton.predict(problem, theta)[0]
    found, _, done = newton.minimise(problem, starts(problem, theta, residual, drawn, weight), drawn, weight)
    rows = np.where(done[:, None], law.rows(found, problem.centre), np.nan)
    result = {}
    for minimum in line.usable:
        here = points.budget == minimum.budget
        x = np.log(points.params[here])
        place, _ = curves.turning(curves.polynomial(x - x.mean(), np.exp(drawn[:, here]), weight[:, here], 2))
        place = np.where((place > (x - x.mean()).min()) & (place < (x - x.mean()).max()), place + x.mean(), np.nan)
        differs = np.log(optimum.best(law, rows, minimum.budget, surface.cost)[:, 0]) - place
        result[minimum.budget] = (float(differs[0]), *ends(float(differs[0]), differs[1:], 0, optimum.LEVEL))
    return result


def column_of(folder: Path) -> dict[str, str]:
    """One column of the table. A law that was refused shows as its reason."""
    runs = pd.read_csv(folder / "runs.csv")
    line, surface, combined = (fit_runs(runs, law=law) for law in ("isoflop", "chinchilla", "combined"))
    column = {"seed": str(runs[runs.role.isna()].seed.min()), "cells": str(int(runs.role.isna().sum()))}
    for minimum in line.minima:
        column[f"N* at {text.flops(minimum.budget)}"] = (
            f"{text.count(minimum.N)} ({text.interval(minimum.ci['N'], 'count')})" if minimum.usable else minimum.reason
        )
    for name, fit in (("isoFLOP", line), ("surface", surface), ("combined", combined)):
        for exponent in ("a", "b"):
            low, high = fit.ci.get(exponent, (np.nan, np.nan))
            value = getattr(fit.allocation, exponent) if fit.params else np.nan
            column[f"{exponent} by {name}"] = f"{value:.2f} ({low:.2f} to {high:.2f})"
        column[f"{name} is"] = "; ".join([fit.status, *fit.warnings])
    if line.params and surface.params:
        for budget, (value, low, high) in agreement(line, surface).items():
            ends_of_it = (
                f"({low:+.2f} to {high:+.2f})" if np.isfinite(low + high) else "(too many samples without a minimum)"
            )
            column[f"ln ratio at {text.flops(budget)}"] = f"{value:+.2f} {ends_of_it}"
    path = folder / "proof.json"
    for forecast in json.loads(path.read_text())["forecasts"] if path.exists() else ():
        proof = forecast["proof"]
        run, straight = proof["runs"][len(proof["runs"]) // 2], proof["line"]
        column["predicted"] = f"{run['predicted']:.3f} ({run['low']:.3f} to {run['high']:.3f})"
        measured = runs[(runs.role == "proof") & (runs.params == run["params"])].loss
        column["measured"] = f"{measured.iloc[0]:.3f}" if len(measured) else "not yet"
        column["straight line"] = "none" if straight is None else f"{straight['L']:.3f}"
    return column


def main() -> None:
    """Print the table, a column for each folder, and write it to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of finished sweeps")
    columns = [column_of(folder) for folder in parser.parse_args().folders]
    print(pd.DataFrame(columns).set_index("seed").T.to_string(na_rep="-"))
    path = Path(__file__).parent / "results" / f"demonstration_{date.today()}.json"
    path.write_text(json.dumps(columns, indent=2) + "\n")


if __name__ == "__main__":
    main()
