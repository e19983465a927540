"""What finished sweeps of one design say, side by side: minima, exponents, the agreement of two methods, the proof run.

    python benchmarks/demonstration.py workdir/demo OTHER/demo ...

Every folder holds a sweep that `make sweep` has finished, for example with other seeds (`--set seeds=[1]`). The last
columns compare N* of the surface with N* of the isoFLOP curves by a paired bootstrap: every resampled set of losses
gives both, so that noise which moves both alike cancels.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from dlm.cli.fits import fits_of
from dlm.core import text
from dlm.fit import optimum
from dlm.fit.engine import newton
from dlm.fit.isoflop import curves
from dlm.fit.result import FitResult

RESAMPLES = 1000


def agreement(line: FitResult, surface: FitResult, rng: np.random.Generator) -> dict[float, tuple[float, float, float]]:
    """ln N*(surface) - ln N*(isoFLOP) at each budget with a minimum: the value and its 95 % interval.

    A resampled loss is the mean of the runs of its cell plus the noise of a run drawn from all cells that were run more
    than once. A sample without a minimum inside the sizes counts as beyond both ends.
    """
    points = surface.points
    assert points is not None and surface.surface is not None and line.points is not None
    cell = pd.DataFrame({"N": points.params, "D": points.tokens}).groupby(["N", "D"]).ngroup().to_numpy()
    runs = np.bincount(cell)[cell]
    log_loss = np.log(points.loss)
    mean = (np.bincount(cell, weights=log_loss) / np.bincount(cell))[cell]
    noise = ((log_loss - mean) * np.sqrt(runs / np.maximum(runs - 1, 1)))[runs > 1]
    drawn = mean + noise[rng.integers(len(noise), size=(RESAMPLES, len(points)))]
    problem = newton.problem_of(points, surface.surface, surface.how, surface.fixed)
    start = surface.surface.theta(optimum.as_rows(surface.surface, surface.params), problem.centre)
    begin = np.repeat(start, RESAMPLES, axis=0)
    found, _, done = newton.minimise(problem, begin, drawn, points.weight[None])
    rows = np.where(done[:, None], surface.surface.rows(found, problem.centre), np.nan)
    result = {}
    for minimum in line.usable:
        here = points.budget == minimum.budget
        assert here is not None
        x = np.log(points.params[here])
        place, _ = curves.turning(curves.polynomial(x - x.mean(), np.exp(drawn[:, here]), points.weight[None, here], 2))
        inside = np.abs(place + x.mean() - (x.min() + x.max()) / 2) < np.ptp(x) / 2
        log_n = np.log(optimum.best(surface.surface, rows, minimum.budget, surface.cost)[:, 0])
        value = math.log(optimum.own_optimum(surface, minimum.budget, optimum.LEVEL).N / minimum.N)
        differs = np.where(inside & np.isfinite(log_n), log_n - (place + x.mean()), np.nan)
        lost = int(np.isnan(differs).sum())
        known = np.sort(differs[~np.isnan(differs)])
        beyond = int(0.025 * RESAMPLES) - lost
        ends = (known[beyond], known[-1 - beyond]) if beyond >= 0 else (-math.inf, math.inf)
        result[minimum.budget] = (value, *map(float, ends))
    return result


def rows_of(folder: Path, rng: np.random.Generator) -> dict[str, str]:
    """One row of the table."""
    runs = pd.read_csv(folder / "runs.csv")
    fits = fits_of(runs)
    line, surface = (next(fit for fit in fits.values() if fit.law == law) for law in ("isoflop", "chinchilla"))
    row = {"seed": str(runs[runs.role.isna()].seed.min()), "cells": str(int(runs.role.isna().sum()))}
    for minimum in line.minima:
        row[f"N* at {text.flops(minimum.budget)}"] = (
            f"{text.count(minimum.N)} ({text.interval(minimum.ci['N'], 'count')})" if minimum.usable else minimum.reason
        )
    for name, fit in (("isoFLOP", line), ("surface", surface)):
        low, high = fit.ci["a"]
        row[f"a by {name}"] = f"{fit.allocation.a:.2f} ({low:.2f} to {high:.2f})"
        row[f"{name} is"] = fit.status
    for budget, (value, low, high) in agreement(line, surface, rng).items():
        row[f"ln ratio at {text.flops(budget)}"] = f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
    for forecast in json.loads((folder / "proof.json").read_text())["forecasts"]:
        (run,) = forecast["proof"]["runs"]
        row["predicted"] = f"{run['predicted']:.3f} ({run['low']:.3f} to {run['high']:.3f})"
        measured = runs[runs.role == "proof"].loss
        row["measured"] = f"{measured.iloc[0]:.3f}" if len(measured) else "not yet"
        row["straight line"] = f"{forecast['proof']['line']['L']:.3f}"
    return row


def main() -> None:
    """Print the table in Markdown, a column for each folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of finished sweeps")
    rng = np.random.default_rng(0)
    table = pd.DataFrame([rows_of(folder, rng) for folder in parser.parse_args().folders]).set_index("seed").T
    print(table.to_string(na_rep="-"))


if __name__ == "__main__":
    main()
