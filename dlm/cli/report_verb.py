"""`dlm report`: the report of a sweep, of a table of runs, or of several of them side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlm.cli import gather
from dlm.cli import targets as found
from dlm.cli.memory import PAGE
from dlm.core import terminal
from dlm.core.errors import UserError

if TYPE_CHECKING:
    from dlm.cli.targets import Sweep
    from dlm.report.look import Paper

LEAST_WAIT_SEC = 5.0  # between two reports of --watch


def report(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="A definition, the folder of a sweep or of tables, or a CSV file of runs. Two or more are compared.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write to this folder. Default: the sweep's; FILE_report beside FILE.csv; workdir/compare/A_B for "
            "several."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Renew the report until no cell runs or waits; the page reloads itself.")
    ] = False,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=LEAST_WAIT_SEC, help="With --watch: how often to renew it.")
    ] = 30.0,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Also write the figures for one and two columns of a paper, and for slides."),
    ] = False,
    style: Annotated[
        str | None, typer.Option(help="A matplotlib style (a .mplstyle file, or a name) for the figures of --paper.")
    ] = None,
) -> None:
    """Collect the runs of a sweep, fit the laws and write report/report.html with its figures.

    The sweep may still run. A CSV file needs the columns that `dlm fit` needs. In the folder of `dlm collect --wandb
    ENTITY/PROJECT --out DIR`, the report is of the tables as they were collected.
    """
    from dlm.report.look import asked_for

    extra = asked_for(wanted=paper, style=style)
    if len(targets) > 1:
        if watch:
            raise UserError(f"--watch follows one sweep, and {len(targets)} are given: leave it out, or name one")
        from dlm.cli.versus import compare_reports

        compare_reports(targets, out=out, paper=extra)
        return
    (target,) = targets
    table = found.table_of(target)
    if table is not None:
        if watch:
            raise UserError(f"--watch follows the cells of a sweep, and {target} is a table of runs: leave it out")
        gather.report_tables(table, out or found.default_folder(table), paper=extra)
        return
    sweep = found.existing_sweep(target)
    if watch:
        _watch(sweep, every_sec=every, out=out, paper=extra)
    else:
        gather.report(sweep, out=out, paper=extra)


def _watch(sweep: Sweep, *, every_sec: float, out: Path | None, paper: Paper | None) -> None:
    """Renew the report of a sweep until no cell runs or waits and no job looks after it.

    A report whose tables have not changed is left as it is. At the end, also by Ctrl-C, the page stops to reload.
    """
    from dlm.report.page import stop_reloading

    page = (sweep.folder if out is None else out) / PAGE
    try:
        while True:
            is_live = _is_live(sweep)  # before the tables are read, so that the last ones are complete
            gather.report(sweep, anew=False, out=out, paper=paper, reload_sec=every_sec if is_live else None)
            if not is_live:
                return
            print(f"made at {time.strftime('%H:%M:%S')}; the next in {every_sec:g} s; Ctrl-C ends this", flush=True)
            time.sleep(every_sec)
            terminal.console().clear()  # on a terminal only
            sweep = found.existing(str(sweep.folder))  # it may have grown
    except KeyboardInterrupt:
        print(f"the report stays as it was made last: {page}", flush=True)
        raise
    finally:
        stop_reloading(page)


def _is_live(sweep: Sweep) -> bool:
    from dlm.submit.follower import is_under_way
    from dlm.submit.table import sweep_now

    cells, warnings = sweep_now(sweep.folder, sweep.plan)
    for warning in warnings:
        found.warn(warning)
    return is_under_way(cells, sweep.folder)
