"""How far the best learning rate drifts in a sweep that varies it in every cell, and what one rate for all does to a.

    python benchmarks/tuned.py workdir/tuned/runs.csv

The first part is what `dlm hparams` prints. The table that follows has a line for every learning rate: the exponent a
of the runs with this rate alone, by isoFLOP curves and by a surface, and the same with the loss left on the table as a
term, where all other runs count as tuning runs. The last line takes in each cell the run with the rate nearest to the
fitted best one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_hparams
from dlm.fit.hparams.excess import TUNE
from dlm.fit.layout import text_table
from dlm.fit.points import Array
from dlm.fit.result import FitResult
from dlm.fit.rows import read_runs
from dlm.fit.table import fit_runs

LAWS = ("isoflop", "chinchilla")
REPLICATES = 1000


def exponent(runs: pd.DataFrame, law: str) -> FitResult | None:
    """The fit of a law to runs, or None if they do not support it."""
    try:
        return bootstrap(fit_runs(runs, law=law, bootstrap=0), replicates=REPLICATES)
    except UserError:
        return None


def shown(found: FitResult | None) -> str:
    """The exponent a with its interval, and the number of isoFLOP minima."""
    if found is None or not np.isfinite(found.allocation.a):
        return "not found"
    minima = f", {len(found.usable)} minima" if found.law == "isoflop" else ""
    return f"{found.allocation.a:.3f} ({text.interval(found.ci.get('a'))}{minima})"


def line(name: str, runs: pd.DataFrame, kept: Array) -> tuple[str, ...]:
    """A line of the table for the runs where `kept`, (n,), is true; all others are tuning runs."""
    alone, tuned = runs[kept], runs.assign(role=np.where(kept, None, TUNE))
    cells = [shown(exponent(table, law)) for law in LAWS for table in (alone, tuned)]
    return (name, str(int(kept.sum())), *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    runs = read_runs(parser.parse_args().runs)
    found = fit_hparams(runs)
    print(found.report())
    rate, law = np.log(runs["learning_rate"].to_numpy(dtype=float)), found.powers["lr"]
    size, tokens = (np.log(runs[name].to_numpy(dtype=float)) for name in ("params", "tokens"))
    off = pd.Series(np.abs(rate - law.logs(size, tokens)), index=runs.index)
    nearest = off.groupby([runs["params"], runs["tokens"]]).transform("min") == off
    rows = [line(f"{np.exp(one):.3g}", runs, np.isclose(rate, one)) for one in np.unique(rate)]
    rows.append(line("nearest to the best", runs, nearest.to_numpy()))
    heads = [f"a, {law}{how}" for law in LAWS for how in ("", " with the term")]
    print(*text_table([("rate", "runs", *heads), *rows]), sep="\n")


if __name__ == "__main__":
    main()
