"""`dlm hparams`: fit the best learning rate and batch to runs that vary them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dlm.cli.options import AsJson, RunsFile, Seed
from dlm.cli.table import say
from dlm.core import terminal


def hparams(
    runs: RunsFile,
    out: Annotated[
        Path | None, typer.Option(help="Write the laws to this file, as a recipe that a plan reads.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="Fit runs of this training objective only.")] = None,
    bootstrap: Annotated[int, typer.Option(help="Draws for the intervals, 100 or more.")] = 2000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit the best learning rate and batch as laws of size and tokens, from runs of any table that vary them."""
    from dlm.core.errors import UserError
    from dlm.core.files import check_writable, write_json
    from dlm.fit.hparams.fit import fit_hparams

    if out is not None:
        if out.is_dir():
            raise UserError(f"--out {out} is a folder: give the name of a file in it, such as {out / 'recipe.json'}")
        check_writable(out.parent)
    found = fit_hparams(runs, objective=objective, replicates=bootstrap, seed=seed)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        say(*found.report(width=terminal.width()).split("\n"))
    if out is not None:
        write_json(out, found.recipe())
        if not as_json:
            print(f"recipe: {out}")
