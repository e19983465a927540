"""Collect runs and write the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.cli.targets import run_folder, warn
from dlm.core.errors import UserError

if TYPE_CHECKING:
    from dlm.collect.tables import Collected


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where `dlm collect` looks beside a sweep's folder."""

    project: str | None  # ENTITY/PROJECT on a W&B server
    filters: Sequence[str]  # KEY=VALUE
    mapping: Path | None
    out: Path | None


def collect(target: str | None, source: Source, *, verify: bool) -> tuple[Path, Collected]:
    """(folder, what was collected into it): of a sweep, of a W&B project, or of both."""
    from dlm.collect.found import sweep_names
    from dlm.collect.tables import collect as collect_runs
    from dlm.collect.tables import collect_mapped
    from dlm.core.configs import parse_yaml

    if source.project is None:
        for name, value in (("--mapping", source.mapping), ("--filter", source.filters), ("--out", source.out)):
            if value:
                raise UserError(f"{name} is for the runs of a W&B project: give --wandb ENTITY/PROJECT too")
    if source.mapping is not None and verify:
        raise UserError("--verify is for runs that dlm launched: with --mapping there is nothing to compare them with")
    if (target is None) != (source.out is not None) or (target and source.mapping):
        raise UserError(
            "give a sweep, or --wandb ENTITY/PROJECT with --out DIR (and --mapping FILE for runs that dlm did not "
            "launch)"
        )
    folder = run_folder(target) if target is not None else Path(str(source.out))
    if source.project is None:
        return folder, collect_runs(folder, verify=verify)
    _check_out(folder)
    filters = {"group": {"$in": sweep_names(folder)}} if target is not None else {}
    for word in source.filters:
        key, separator, value = word.partition("=")
        if not separator:
            raise UserError(f"--filter {word}: give KEY=VALUE, for instance state=finished")
        filters[key] = parse_yaml(value, f"--filter {word}")
    if source.mapping is not None:
        from dlm.collect.mapping import check_keys, load_mapping

        mapping = load_mapping(source.mapping)
    from dlm.collect.wandb_server import Project

    server = Project(source.project, filters=filters)
    if not server.runs and target is None:
        raise UserError(f"{source.project} has no run that {filters or 'it was asked for'} names: nothing was written")
    if source.mapping is not None:
        check_keys(mapping, server.runs.values(), source.project)
        return folder, collect_mapped(server, mapping, folder)
    return folder, collect_runs(folder, verify=verify, server=server)


def _check_out(folder: Path) -> None:
    """Raises UserError when the tables could not be written once everything has been asked for."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "no folder" if not there.is_dir() else "not writable"
        raise UserError(f"the tables were to go to {folder}, but {there} is {what}: give a folder to write to")


def report(sweep_dir: Path, *, bootstrap: int = 4000) -> Path:
    """Collect, fit and write the report; says what was left out and where the report is."""
    from dlm.collect.tables import collect
    from dlm.fit.table import fit_sweep
    from dlm.plan.store import read_plan
    from dlm.report.page import write_fits, write_report

    plan = read_plan(sweep_dir)
    collected = collect(sweep_dir)
    for warning in collected.warnings:
        warn(warning)
    for row in collected.excluded.to_dict("records"):
        print(f"left out {row['run_id']}: {row['reason']}")
    print(f"collected {len(collected.runs)} runs, left out {len(collected.excluded)}: {sweep_dir / 'runs.csv'}")
    if collected.runs.empty:
        raise UserError(f"no run of {sweep_dir} can be used: see the reasons in {sweep_dir / 'excluded.csv'}")
    print("fitting ...", flush=True)
    fits = fit_sweep(collected.runs, bootstrap=bootstrap)
    write_fits(sweep_dir, fits)
    facts = {"budgets": len(plan.spec.budgets), "cells": len(plan.cells), "data": plan.data}
    path = write_report(
        sweep_dir,
        collected.runs,
        collected.excluded,
        fits,
        title=plan.spec.description or plan.spec.name,
        facts=facts,
    )
    for fit in fits.values():
        print(fit.report())
    print(f"report: {path}")
    return path
