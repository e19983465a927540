"""Define arguments and options of the `dlm` command that several verbs share, and dataclasses of options.

A verb with many options takes one dataclass; ``takes`` turns the fields of the dataclass into arguments and options.
This file does not use ``from __future__ import annotations``, because typer needs the annotations as objects.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dlm.core.errors import UserError

Target = Annotated[str, typer.Argument(help="A definition (sweeps/demo.yaml, or demo) or a folder (workdir/demo).")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
RunsFile = Annotated[
    Path, typer.Argument(help="A CSV file of runs (params, tokens, loss, flops, ...), or a folder with runs.csv.")
]
Replicates = Annotated[
    int,
    typer.Option(
        help="Bootstrap replicates for the intervals; 0 gives no intervals. The combined law takes 1000 at most."
    ),
]
Seed = Annotated[int, typer.Option(help="The random seed of the bootstrap.")]


@dataclass(frozen=True, kw_only=True)
class DefinitionOptions:
    """The sweep that a verb acts on, and changes to its definition."""

    target: Target
    budget: Annotated[list[str] | None, typer.Option(help="FLOPs of one cell, as in 1e19. Repeatable.")] = None
    top_budget: Annotated[
        str | None, typer.Option(help="The highest budget in FLOPs; the definition says which lower ones go with it.")
    ] = None
    allow_target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PKG",
            help="Let configs name callbacks and loggers of this package, or this class: its code runs. Repeatable.",
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE sets a key of the definition, or a config key of all cells. Repeatable."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PlanOptions(DefinitionOptions):
    """The options of `dlm plan`: the sweep, and what is shown and written."""

    as_json: AsJson = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False


@dataclass(frozen=True, kw_only=True)
class StartOptions(DefinitionOptions):
    """The options of `dlm submit` and `dlm sweep`: the sweep, and how its cells are started."""

    launcher: Annotated[
        str, typer.Option(help="submitit_slurm, submitit_local, or auto: SLURM if its controller answers.")
    ] = "auto"
    yes: Yes = False
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also start cells that diverged, have a bad config or failed often.")
    ] = False
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Submit uncommitted code to SLURM; the sweep keeps its diff.")
    ] = False
    then: Annotated[
        str | None,
        typer.Option(
            metavar="report",
            help="On SLURM, a small job submits cells again if need be, and writes the report at the end. "
            "The default of `dlm sweep`.",
        ),
    ] = None
    no_then: Annotated[bool, typer.Option("--no-then", help="With `dlm sweep` on SLURM: no such job.")] = False
    mail: Annotated[str | None, typer.Option(help="With --then: SLURM mails to this address at the end.")] = None
    webhook: Annotated[str | None, typer.Option(help="With --then: this URL gets a POST with the verdict.")] = None
    cell: Annotated[
        list[str] | None, typer.Option(help="Start only this cell: its id, or a part that no other has. Repeatable.")
    ] = None
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Start the cheapest cell first, and the others when a cell is done.")
    ] = False
    max_gpus: Annotated[
        int | None, typer.Option(min=1, help="On SLURM, the most GPUs that the sweep uses at once.")
    ] = None
    max_gpu_hours: Annotated[
        float | None,
        typer.Option(
            min=0, help="Refuse a sweep that costs more; on SLURM, stop starting cells there. Default: as defined."
        ),
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(
            help="A Hydra override of all jobs that changes no result, or hydra.launcher.KEY=VALUE. Repeatable."
        ),
    ] = None

    @property
    def overrides(self) -> list[str]:
        """The words of --override, and the limit of --max-gpus as one of them."""
        limit = [] if self.max_gpus is None else [f"hydra.launcher.max_gpus={self.max_gpus}"]
        return [*(self.override or ()), *limit]


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The options of `dlm doctor`: the launcher to check, and the job that does it."""

    launcher: Annotated[str, typer.Option(help="submitit_slurm, or a file of yours in configs/hydra/launcher.")] = (
        "submitit_slurm"
    )
    override: Annotated[list[str] | None, typer.Option(help="hydra.launcher.KEY=VALUE. Repeatable.")] = None
    gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs of the job. Default: one, if the partition has GPUs.")
    ] = None
    no_job: Annotated[bool, typer.Option("--no-job", help="Look from the login node only.")] = False
    timeout: Annotated[
        float, typer.Option(metavar="MINUTES", min=0.05, help="Cancel the job if it has not ended by then.")
    ] = 10.0


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """The options of `dlm collect`: where the runs are read from, and where their tables are written."""

    target: Annotated[str | None, typer.Argument(help="A sweep's definition or folder; or give --wandb and --out.")] = (
        None
    )
    wandb: Annotated[
        str | None, typer.Option(metavar="ENTITY/PROJECT", help="Also read this project on a W&B server.")
    ] = None
    filter: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE selects runs in W&B's terms, as in state=finished. Repeatable.")
    ] = None
    mapping: Annotated[Path | None, typer.Option(help="A YAML file that translates runs dlm did not launch.")] = None
    out: Annotated[Path | None, typer.Option(help="The folder for the tables, if no sweep is given.")] = None
    verify: Annotated[bool, typer.Option("--verify", help="Compare each history with W&B's, number by number.")] = False


@dataclass(frozen=True, kw_only=True)
class LawOptions:
    """The options that `dlm fit` and `dlm predict` share: the runs, the law, and how it is fitted."""

    runs: RunsFile
    law: Annotated[
        str,
        typer.Option(
            help="combined, chinchilla, skaling, tied, isoflop or envelope; of repeated data: repeated, epochs, "
            "data-constrained, penalty or onset."
        ),
    ] = "combined"
    loss: Annotated[str, typer.Option(help="The norm of a surface fit: huber, mse or l1.")] = "huber"
    delta: Annotated[
        float | None, typer.Option(help="The residual at which the Huber norm turns linear: 1e-3 by default.")
    ] = None
    space: Annotated[str, typer.Option(help="Residuals of the log or of the raw loss.")] = "log"
    bootstrap: Replicates = 4000
    seed: Seed = 0
    objective: Annotated[str | None, typer.Option(help="Fit runs of this training objective only.")] = None
    pin: Annotated[list[str] | None, typer.Option(help="A parameter to hold fixed, as in E=1.7. Repeatable.")] = None
    holdout: Annotated[
        bool, typer.Option("--holdout/--no-holdout", help="Hold out the top budgets, to check and to weight the law.")
    ] = True
    drop_outliers: Annotated[
        bool, typer.Option("--drop-outliers", help="Fit again without the runs that lie far from the law.")
    ] = False
    budget_tolerance: Annotated[
        float, typer.Option(help="Budgets that differ by at most this share are one; 0: only equal ones.")
    ] = 0.05
    as_json: AsJson = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print all parameters, checks, warnings and notes, not ten lines.")
    ] = False

    def keywords(self) -> dict[str, Any]:
        """Return the options as keyword arguments of ``fit_runs`` or ``predict_runs``.

        Options that are None, ``runs`` and how to print are left out. Raises UserError for a malformed --pin.
        """
        others = ("runs", "as_json", "verbose", "pin")
        given = {name: value for name, value in vars(self).items() if value is not None and name not in others}
        return {**given, "fixed": dict(_pinned(word) for word in self.pin or ())}


@dataclass(frozen=True, kw_only=True)
class FitOptions(LawOptions):
    """The options of `dlm fit`."""

    at: Annotated[list[float] | None, typer.Option(help="FLOPs at which to give N*, D* and L*. Repeatable.")] = None
    under_tuned: Annotated[float, typer.Option(help="Below 1: how much less points above the law count.")] = 1.0
    weights: Annotated[str | None, typer.Option(help="'compute' weighs each run by its FLOPs.")] = None
    curve: Annotated[str, typer.Option(help="The curve of isoflop: parabola, cubic or akima.")] = "parabola"
    unique: Annotated[
        float | None, typer.Option(help="The unique tokens for which laws of repeated data give optima.")
    ] = None
    axis: Annotated[str, typer.Option(help="The axis of isoflop: log 'params' or log 'tokens'.")] = "params"


@dataclass(frozen=True, kw_only=True)
class PredictOptions(LawOptions):
    """The options of `dlm predict`."""

    at: Annotated[list[float], typer.Option(help="FLOPs at which to predict N*, D* and L*. Repeatable.")]
    freeze: Annotated[
        Path | None, typer.Option(help="A new file for the predictions; commit it to version control.")
    ] = None


def _pinned(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--pin {word}: write NAME=NUMBER, for example --pin E=1.7") from None


def takes(options: type[Any]) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Return a decorator for a verb whose only parameter is a dataclass of options.

    Each field of the dataclass becomes an argument or an option of the command line.
    """

    def decorate(verb: Callable[[Any], None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def command(**values: Any) -> None:
            verb(options(**values))

        command.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]  # typer reads it
        return command

    return decorate
