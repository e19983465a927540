"""Collect the runs of a sweep or a W&B project, and write the report of a sweep."""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.cli.memory import FIGURES, PAGE, remember, said_before
from dlm.cli.table import say
from dlm.cli.targets import Sweep, is_sweep_dir, run_folder, warn
from dlm.core import terminal
from dlm.core.errors import UserError
from dlm.core.files import check_writable
from dlm.core.names import from_cell
from dlm.core.text import counted

if TYPE_CHECKING:
    from dlm.cli.options import CollectOptions
    from dlm.collect.tables import Collected
    from dlm.collect.wandb_server import Project
    from dlm.fit.result import FitResult
    from dlm.report.look import Paper


def collect(options: CollectOptions) -> tuple[Path, Collected]:
    """Collect the runs of a sweep, of a W&B project, or of both.

    Returns:
        (the folder to which the tables were written, the collected runs).
    """
    from dlm.collect import tables
    from dlm.collect.mapping import check_keys, load_mapping

    _check_combination(options)
    folder = run_folder(options.target) if options.target is not None else Path(str(options.out))
    mapping = None if options.mapping is None else load_mapping(options.mapping)
    server = None if options.wandb is None else _server(options, options.wandb, folder)
    if server is None or mapping is None:
        return folder, tables.collect(folder, verify=options.verify, server=server)
    check_keys(mapping, server.runs.values(), str(options.wandb))
    return folder, tables.collect_mapped(server, mapping, folder)


def _check_combination(options: CollectOptions) -> None:
    """Raise UserError for options that cannot be combined."""
    if options.wandb is None:
        for name, value in (("--mapping", options.mapping), ("--filter", options.filter), ("--out", options.out)):
            if value:
                raise UserError(f"{name} is for the runs of a W&B project: give --wandb ENTITY/PROJECT too")
    if options.mapping is not None and options.verify:
        raise UserError("--verify is for runs that dlm launched: with --mapping there is nothing to compare them with")
    if (options.target is None) != (options.out is not None) or (options.target and options.mapping):
        raise UserError(
            "give a sweep, or --wandb ENTITY/PROJECT with --out DIR (and --mapping FILE for runs that dlm did not "
            "launch)"
        )


def _server(options: CollectOptions, project: str, folder: Path) -> Project:
    """Query the runs of a W&B project that match --filter and, if a sweep is given, belong to it."""
    from dlm.collect.found import sweep_names
    from dlm.collect.wandb_server import Project
    from dlm.core.configs import parse_setting

    check_writable(folder)
    own = {} if options.target is None else {"group": {"$in": sweep_names(folder)}}
    example = "give KEY=VALUE, for instance state=finished"
    filters = own | dict(parse_setting(word, "--filter", otherwise=example) for word in options.filter or ())
    server = Project(project, filters=filters)
    if not server.runs and options.target is None:
        raise UserError(f"{project} has no run that matches {filters or 'the request'}: nothing was written")
    return server


def show_collected(collected: Collected, folder: Path) -> None:
    """Print the warnings of the collection, which runs were left out and why, and the path of the table of runs."""
    for warning in collected.warnings:
        warn(warning)
    for row in collected.excluded.to_dict("records"):
        say(f"left out {row['run_id']}: {row['reason']}")
    say(f"collected {counted(len(collected.runs), 'run')}, left out {len(collected.excluded)}: {folder / 'runs.csv'}")


def report(
    sweep: Sweep,
    *,
    anew: bool = True,
    out: Path | None = None,
    paper: Paper | None = None,
    reload_sec: float | None = None,
) -> None:
    """Collect the runs of a sweep, fit the laws, write the report, and print the laws and the path of the report.

    The sweep may still grow: the report says what is missing. Without a run that can be used, it says only that.

    Args:
        sweep: The sweep.
        anew: Fit and write even if nothing has changed since the last report. Otherwise what that report said is
            printed again.
        out: The folder for the tables, the fits and the report. None: the folder of the sweep.
        paper: Figures to write besides those of the page.
        reload_sec: A browser that shows the page loads it again after so many seconds. None: it does not.

    Raises:
        UserError: The folder cannot be written to, or is that of another sweep, or no run can be used and none is to
            come.
    """
    from dlm.cli.standing import standing_of
    from dlm.cli.tuned import next_step, open_ends
    from dlm.collect.tables import collect as collect_runs

    folder = sweep.folder if out is None else out
    _check_report_folder(sweep, folder)
    collected = collect_runs(sweep.folder, out=folder)
    show_collected(collected, folder)
    standing = standing_of(sweep, collected)
    say(*standing.lines)
    if collected.runs.empty and not standing.to_come:
        raise UserError(f"no run of {folder} can be used: see the reasons in {folder / 'excluded.csv'}")
    if sweep.plan.waits_for_recipe:
        say(*(line for found in open_ends(sweep).values() for line in _advised(found)), next_step(sweep))
        return
    said = None if anew else said_before(folder)
    if said is None:
        if not collected.runs.empty:
            print("fitting ...", flush=True)
        said = _fit_and_write(sweep, collected, folder, paper, standing.lines, reload_sec)
        remember(folder, said)
    _say_all(said)
    say(f"report: {folder / PAGE}")


def report_tables(source: Path, out: Path, *, paper: Paper | None = None) -> None:
    """Fit the laws to tables without a plan and without runs, and write the report to ``out``.

    Args:
        source: A CSV file of runs, or a folder that holds runs.csv and perhaps excluded.csv.
        out: The folder for the fits and the report.
        paper: As in ``report``.
    """
    from dlm.cli.fits import tables_fits
    from dlm.fit.csv_file import read_csv
    from dlm.fit.rows import load_table, read_runs
    from dlm.report.page import write_fits, write_report

    if is_sweep_dir(out):
        raise UserError(f"{out} is the folder of a sweep, whose report would be lost: give another --out")
    check_writable(out)
    check_writable(out / FIGURES)
    path, left_out = (source / "runs.csv", source / "excluded.csv") if source.is_dir() else (source, None)
    runs = read_runs(path, proofs=True)
    has_left_out = left_out is not None and left_out.is_file()
    excluded = read_csv(left_out) if has_left_out and left_out is not None else runs.iloc[:0]
    unusable = len(load_table(path)[0]) - len(runs)
    found = [f"{path} has {counted(len(runs), 'usable run')}"]
    why = "not done, without a finite loss, or the same as another"
    found += [f"{counted(unusable, 'other row')} cannot be used ({why})"] if unusable else []
    found += [f"{left_out} names {counted(len(excluded), 'run')} that `dlm collect` left out"] if len(excluded) else []
    found += ["`dlm collect` brings the tables up to date"] if source.is_dir() else []
    say("; ".join(found), "fitting ...")
    fits, repeats = tables_fits(path)
    write_fits(out, {**fits, **repeats})
    data = sorted(runs["data"].dropna().astype(str).unique()) if "data" in runs else []
    facts = {"data": ", ".join(data)} if data else {}
    title = source.absolute().name
    write_report(out, runs, excluded, fits, title=title, facts=facts, paper=paper, repeats=repeats)
    _say_all([*_summaries({**fits, **repeats}), f"report: {out / PAGE}"])


def _of_plan(sweep: Sweep) -> dict[str, Any]:
    """Return what the plan and the files beside it add to the report, as arguments of ``write_report``."""
    import yaml

    from dlm import __version__
    from dlm.plan.store import read_estimates
    from dlm.report.charts.curves import read_history

    estimates = read_estimates(sweep.folder)
    shares = {cell.cell_id: cell.own_share for cell in sweep.plan.cells if cell.steps}
    return {
        "plan": [
            {
                "run_id": cell.cell_id,
                "objective": cell.objective,
                "model": cell.model,
                "params": cell.num_params,
                "tokens": cell.tokens,
                "budget": cell.budget_flops,
                "steps": cell.steps,
            }
            for cell in sweep.plan.grid
        ],
        "estimate": {
            name: {**dataclasses.asdict(cell), "own_share": shares.get(name, 1.0)} for name, cell in estimates.items()
        },
        "history": read_history(sweep.folder),
        "definition": yaml.safe_dump(sweep.plan.spec.plain(), sort_keys=False, allow_unicode=True),
        "versions": {"dlm": __version__, "report made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())},
    }


def _check_report_folder(sweep: Sweep, folder: Path) -> None:
    """Raise UserError if the report of a sweep cannot be written to ``folder``; called before the fits."""
    if folder.resolve() != sweep.folder.resolve():
        if is_sweep_dir(folder):
            raise UserError(
                f"{folder} is the folder of another sweep, whose runs.csv would be lost: give another --out"
            )
        own = {cell.cell_id for cell in sweep.plan.cells} | {path.name for path in sweep.folder.glob("runs/*")}
        if not _run_ids(folder / "runs.csv") <= own:
            raise UserError(
                f"{folder / 'runs.csv'} holds other runs than those of {sweep.folder} and would be lost: "
                "give another --out, or move the file away"
            )
    try:
        check_writable(folder)
        check_writable(folder / FIGURES)
    except UserError as error:
        raise UserError(f"{error}; `dlm report {sweep.folder} --out FOLDER` writes the report elsewhere") from error


def _run_ids(path: Path) -> set[str | None]:
    """Return the ids of the runs in a file that may not be dlm's, with None for a row that has no id."""
    if not path.is_file():
        return set()
    with open(path, newline="", encoding="utf-8", errors="replace") as stream:
        try:
            ids = (row.get("run_id") for row in csv.DictReader(stream))
            return {None if run_id is None else from_cell(run_id) for run_id in ids}
        except csv.Error:  # it is no table, so it is not dlm's
            return {None}


def _fit_and_write(
    sweep: Sweep,
    collected: Collected,
    folder: Path,
    paper: Paper | None,
    standing: Sequence[str],
    reload_sec: float | None,
) -> list[str]:
    """Fit the laws to the runs of a sweep, write fits.json and the report, and return the lines to print."""
    from dlm.cli.advice import advice
    from dlm.cli.fits import fits_of, repeats_of
    from dlm.cli.proof import outcomes
    from dlm.cli.tuned import open_ends
    from dlm.report.page import write_fits, write_report

    plan, fits, repeats = sweep.plan, fits_of(collected.runs), repeats_of(collected.runs)
    write_fits(folder, {**fits, **repeats})
    proofs = outcomes(sweep, collected.runs, collected.excluded, fits)
    settling = advice(sweep, collected.runs, fits) if is_sweep_dir(sweep.folder) else {}  # it changes a definition
    for label, found in open_ends(sweep).items():
        settling[label] = [*settling.get(label, []), *found]
    write_report(
        folder,
        collected.runs,
        collected.excluded,
        fits,
        title=plan.spec.description or plan.spec.name,
        facts={"budgets": len(plan.spec.budgets), "cells": len(plan.grid), "data": plan.data},
        proofs=proofs,
        advice=settling,
        paper=paper,
        **_of_plan(sweep),
        repeats=repeats,
        standing=standing,
        reload_sec=reload_sec,
    )
    return [
        *_summaries({**fits, **repeats}),
        *(line for found in settling.values() for line in _advised(found, lead="what would settle it: ")),
        *(proof.report() for proof in proofs.values()),
    ]


def _advised(found: Iterable[tuple[str, str]], *, lead: str = "") -> list[str]:
    """Return each sentence and, on a line of its own, the command that it is about, if any."""
    return [line for words, command in found for line in (f"{lead}{words}", *([f"  {command}"] if command else []))]


def _say_all(said: Iterable[str]) -> None:
    """Print texts of one or several lines."""
    say(*(line for words in said for line in words.splitlines()))


def _summaries(fits: Mapping[str, FitResult]) -> list[str]:
    """Return each law in ten lines."""
    from dlm.fit.brief import WIDTH

    return [fit.summary(width=terminal.width() or WIDTH, rest="see the report") for fit in fits.values()]
