"""Collect the runs of a sweep or a W&B project, and write the report of a sweep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.cli.memory import PAGE, remember, said_before
from dlm.cli.targets import Sweep, is_sweep_dir, run_folder, warn
from dlm.core.errors import UserError
from dlm.core.text import counted

if TYPE_CHECKING:
    from dlm.cli.options import CollectOptions
    from dlm.collect.tables import Collected
    from dlm.collect.wandb_server import Project


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

    _check_writable(folder)
    own = {} if options.target is None else {"group": {"$in": sweep_names(folder)}}
    example = "give KEY=VALUE, for instance state=finished"
    filters = own | dict(parse_setting(word, "--filter", otherwise=example) for word in options.filter or ())
    server = Project(project, filters=filters)
    if not server.runs and options.target is None:
        raise UserError(f"{project} has no run that matches {filters or 'the request'}: nothing was written")
    return server


def _check_writable(folder: Path) -> None:
    """Raise UserError if the tables could not be written to ``folder``; called before the server is queried."""
    parents = (folder.absolute(), *folder.absolute().parents)
    nearest = next(path for path in parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        problem = "not writable" if nearest.is_dir() else "no folder"
        raise UserError(f"the tables were to go to {folder}, but {nearest} is {problem}: give a folder to write to")


def show_collected(collected: Collected, folder: Path) -> None:
    """Print the warnings of the collection, which runs were left out and why, and the path of the table of runs."""
    for warning in collected.warnings:
        warn(warning)
    for row in collected.excluded.to_dict("records"):
        print(f"left out {row['run_id']}: {row['reason']}")
    print(f"collected {counted(len(collected.runs), 'run')}, left out {len(collected.excluded)}: {folder / 'runs.csv'}")


def report(sweep: Sweep, *, anew: bool = True) -> None:
    """Collect the runs of a sweep, fit the laws, write the report, and print the laws and the path of the report.

    Args:
        sweep: The sweep.
        anew: Fit and write even if nothing has changed since the last report. Otherwise what that report said is
            printed again.
    """
    from dlm.collect.tables import collect as collect_runs

    folder = sweep.folder
    collected = collect_runs(folder)
    show_collected(collected, folder)
    if collected.runs.empty:
        raise UserError(f"no run of {folder} can be used: see the reasons in {folder / 'excluded.csv'}")
    said = None if anew else said_before(folder)
    if said is None:
        print("fitting ...", flush=True)
        said = _fit_and_write(sweep, collected)
        remember(folder, said)
    print(*said, sep="\n")
    print(f"report: {folder / PAGE}")


def report_tables(folder: Path) -> None:
    """Fit the laws to the tables of a folder that has neither a plan nor runs, and write and print the report."""
    import pandas as pd

    from dlm.fit.table import fit_sweep, read_runs
    from dlm.report.page import write_fits, write_report

    path, left_out = folder / "runs.csv", folder / "excluded.csv"
    runs = read_runs(path, proofs=True)
    excluded = pd.read_csv(left_out) if left_out.is_file() else runs.iloc[:0]
    print(f"{path} has {len(runs)} runs, left out are {len(excluded)}; `dlm collect` brings it up to date")
    print("fitting ...", flush=True)
    fits = fit_sweep(path)
    write_fits(folder, fits)
    data = sorted(runs["data"].dropna().astype(str).unique()) if "data" in runs else []
    facts = {"data": ", ".join(data)} if data else {}
    write_report(folder, runs, excluded, fits, title=folder.absolute().name, facts=facts)
    print(*(fit.report() for fit in fits.values()), f"report: {folder / PAGE}", sep="\n")


def _fit_and_write(sweep: Sweep, collected: Collected) -> list[str]:
    """Fit the laws to the runs of a sweep, write fits.json and the report, and return the lines to print."""
    from dlm.cli.advice import advice
    from dlm.cli.fits import fits_of
    from dlm.cli.proof import outcomes
    from dlm.report.page import write_fits, write_report

    plan, fits = sweep.plan, fits_of(collected.runs)
    write_fits(sweep.folder, fits)
    proofs = outcomes(sweep, collected.runs, collected.excluded, fits)
    settling = advice(sweep, collected.runs, fits) if is_sweep_dir(sweep.folder) else {}  # it changes a definition
    write_report(
        sweep.folder,
        collected.runs,
        collected.excluded,
        fits,
        title=plan.spec.description or plan.spec.name,
        facts={"budgets": len(plan.spec.budgets), "cells": len(plan.grid), "data": plan.data},
        proofs=proofs,
        advice=settling,
    )
    return [
        *(fit.report() for fit in fits.values()),
        *(f"what would settle it: {' '.join(filter(None, one))}" for found in settling.values() for one in found),
        *(proof.report() for proof in proofs.values()),
    ]
