"""The verbs of the `dlm` command that fit laws and use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlm.cli import options
from dlm.cli.hparams_verb import hparams
from dlm.cli.options import AsJson, Replicates, RunsFile, Seed, takes
from dlm.cli.table import say
from dlm.core import terminal
from dlm.core.errors import UserError
from dlm.core.files import check_writable

if TYPE_CHECKING:
    from dlm.fit.result import FitResult

MOST_REASONS = 4  # of a refused fit that the error names


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command, in the order of the flow."""
    for verb in (fit, predict, score, compare, reconcile, hparams):
        app.command()(verb)


@takes(options.FitOptions)
def fit(given: options.FitOptions) -> None:
    """Fit a law to a table of runs, from dlm or elsewhere, and state how far the law can be trusted."""
    from dlm.fit.table import fit_runs

    result = fit_runs(given.runs, **given.keywords())
    if result.status == "refused":
        more = len(result.warnings) - MOST_REASONS
        reasons = [*result.warnings[:MOST_REASONS], *([f"and {more} more"] if more > 0 else [])]
        raise UserError(f"{given.law}: {'; '.join(reasons)}")
    _show_law(result, given)


@takes(options.PredictOptions)
def predict(given: options.PredictOptions) -> None:
    """Predict larger runs before they exist; `dlm score` grades the predictions afterwards."""
    from dlm.fit.table import predict_runs

    if given.freeze is not None:
        check_writable(given.freeze.parent)  # before the fit
    result, written = predict_runs(given.runs, **given.keywords())
    _show_law(result, given)
    if written and not given.as_json:
        say(f"frozen in {given.freeze}: sha256 {written['sha256']}, made {written['made']}")


def score(
    frozen: Annotated[Path, typer.Argument(help="The file that `dlm predict --freeze` wrote.")],
    runs: RunsFile,
    as_json: AsJson = False,
) -> None:
    """Grade frozen predictions against the runs that exist now."""
    from dlm.fit.table import score_runs

    _show_result(score_runs(frozen, runs), as_json=as_json)


def compare(
    runs: RunsFile,
    other: Annotated[
        Path | None, typer.Argument(help="A second CSV file; without it, two objectives of the first are compared.")
    ] = None,
    law: Annotated[str, typer.Option(help="chinchilla, skaling, isoflop, or a law of repeated data.")] = "chinchilla",
    objective: Annotated[
        list[str] | None, typer.Option(help="Give it twice: the objective of the first and of the second runs.")
    ] = None,
    bootstrap: Replicates = 4000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Estimate how many times as much compute the second runs need as the first runs to reach the same loss."""
    from dlm.fit.multiplier import Multiplier
    from dlm.fit.table import compare_runs

    names = list(objective or ())
    if len(names) == 1 and other is not None:
        names *= 2
    if len(names) not in (0, 2):
        raise UserError(f"--objective is given {len(names)} times: name two, that of the first runs and of the second")
    first, second = names or (None, None)
    found = compare_runs(runs, other, first=first, second=second, law=law, bootstrap=bootstrap, seed=seed)
    _show_result(found, as_json=as_json, **({"width": terminal.width()} if isinstance(found, Multiplier) else {}))


def reconcile(
    runs: Annotated[list[Path], typer.Argument(help="CSV files of runs, or folders with runs.csv: two sets or more.")],
    objective: Annotated[
        list[str] | None, typer.Option(help="Use this objective only; each objective is a set. Repeatable.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COLUMN",
            help="Read COLUMN as NAME in the tables that lack NAME; FILE:NAME=COLUMN: in one table. Repeatable.",
        ),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(help="isoflop, chinchilla, skaling or tied; by default the first three. Repeatable."),
    ] = None,
    bootstrap: Annotated[int, typer.Option(help="How often the losses are redrawn, to find the noise.")] = 200,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Refit several sets of runs under each count of N and C, and split the spread of their exponents."""
    from dlm.fit.reconciliation import USUAL
    from dlm.fit.reconciliation import reconcile as reconcile_sets

    found = reconcile_sets(
        list(runs),
        objectives=objective or (),
        columns=column or (),
        forms=form or USUAL,
        replicates=bootstrap,
        seed=seed,
    )
    _show_result(found, as_json=as_json, width=terminal.width())


def _show_law(result: FitResult, given: options.FitOptions | options.PredictOptions) -> None:
    """Print a law: in ten lines, whole with --verbose, as JSON with --json."""
    from dlm.fit.brief import WIDTH

    if given.as_json or given.verbose:
        _show_result(result, as_json=given.as_json, width=terminal.width())
    else:
        say(*result.summary(at=given.at or (), width=terminal.width() or WIDTH, rest="--verbose").splitlines())


def _show_result(result: Any, *, as_json: bool, **how: Any) -> None:
    """Print a result; ``how`` goes to its report, which has tables if it takes the width of the terminal."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    else:
        say(*result.report(**how).split("\n"))
