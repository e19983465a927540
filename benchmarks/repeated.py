"""Leave out unique-token budgets and sizes of published curves, and print how well each law decides the epochs there.

    DLM_REFERENCE_DATA=FOLDER python benchmarks/repeated.py [--file NAME.csv] [--law penalty,onset] [--json]

FOLDER holds the CSV file, by default the curves of masked diffusion of Quokka (2510.03280, figure 4). One row of the
table is one law under one hold-out: each number of unique tokens is left out once, and each of up to eight groups of
neighbouring sizes. Every number is of curves that the fit did not see:

`excess` is the measured loss at the predicted best number of epochs over the lowest measured loss of the curve, less 1
(median, worst, and the number of curves above 1 %). `ln e` is the error of the log of the best number of epochs
(median of its size, and root mean square). `below` is the root-mean-square error of the log loss over the log of the
epochs, up to twice the best number of epochs (median and worst curve, and over all curves). A law with `+` is corrected
by its residuals on the curves that it was fitted to. `sec` is the processor time
of the refits, and in the first row of a law also that of its fit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd

from dlm.core.errors import UserError
from dlm.fit.choice import Score
from dlm.fit.curves import weighed
from dlm.fit.engine.newton import Norm
from dlm.fit.laws import UNIQUE
from dlm.fit.laws.epochs import Epochs
from dlm.fit.left_out import groups, score
from dlm.fit.points import Points, as_points
from dlm.fit.surface.fit import fit_points, law_of
from dlm.fit.surface.repeated import DELTA

FILE = "quokka_data_constrained_masked.csv"
HOLDOUTS = {"unique": "each U", "params": "each size"}
GOAL = 0.01
HEAD = f"{'law':<17} {'left out':<9} {'curves':>6}  {'excess':<20}  {'ln e':<11}  {'below 2 x best':<20}  sec"


def main() -> None:
    """Print the table of every law."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default=FILE)
    parser.add_argument("--law", default=",".join(UNIQUE))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    points = read(os.environ.get("DLM_REFERENCE_DATA"), given.file)
    rows = [row for name in given.law.split(",") for row in measured(points, name)]
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    print(HEAD)
    for row in rows:
        print(line(row))


def read(folder: str | None, name: str) -> Points:
    """The points of the file, weighed as `--law repeated` weighs them."""
    path = Path(folder or "") / name
    if not folder or not path.is_file():
        where = f"DLM_REFERENCE_DATA={folder} holds no {name}" if folder else "DLM_REFERENCE_DATA is not set"
        print(f"repeated: absent: {where}", file=sys.stderr)
        sys.exit(2)
    frame = pd.read_csv(path)
    columns = {k: frame[k] for k in ("params", "tokens", "loss", "flops", "unique_tokens")}
    return weighed(as_points(**columns))


def measured(points: Points, name: str) -> list[dict[str, Any]]:
    """The errors of one law under each hold-out, or the reason why it cannot be fitted."""
    start, how = time.process_time(), Norm(delta=DELTA)
    try:
        fit = fit_points(points, law_of(name, points, how, {}), how, {}, holdout=False)
    except UserError as error:
        return [{"law": name, "refused": str(error)}]
    found = []
    for correct in (False, True) if isinstance(fit.surface, Epochs) else (False,):
        for key, said in HOLDOUTS.items():
            errors = score(fit, groups(points, by=[key]), correct=correct)
            law = f"{name} +" if correct else name
            found.append({"law": law, "left_out": said, **numbers(errors), "sec": time.process_time() - start})
            start = time.process_time()
    return found


def numbers(errors: Score) -> dict[str, float]:
    """The numbers of one row of the table."""
    log_error = np.abs(errors.log_error[np.isfinite(errors.log_error)])
    return {
        "curves": len(errors.excess),
        "excess_median": float(np.median(errors.excess)),
        "excess_worst": float(errors.excess.max()),
        "excess_above_goal": int((errors.excess > GOAL).sum()),
        "log_epochs_median": float(np.median(log_error)) if len(log_error) else float("nan"),
        "log_epochs_rms": errors.log_epochs_error,
        "rms_median": float(np.median(errors.rms)),
        "rms_worst": float(errors.rms.max()),
        "rms": float(np.sqrt((errors.rms**2).mean())),
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table as text."""
    if "refused" in row:
        return f"{row['law']:<17} cannot be fitted: {row['refused']}"
    excess = f"{row['excess_median']:.2%} {row['excess_worst']:.2%} {row['excess_above_goal']}"
    epochs = f"{row['log_epochs_median']:.2f} {row['log_epochs_rms']:.2f}"
    below = f"{row['rms_median']:.2%} {row['rms_worst']:.2%} {row['rms']:.2%}"
    head = f"{row['law']:<17} {row['left_out']:<9} {row['curves']:>6}"
    return f"{head}  {excess:<20}  {epochs:<11}  {below:<20}  {row['sec']:.1f}"


if __name__ == "__main__":
    main()
