"""`dlm report A B`: read several sweeps or tables of runs, fit their laws, and write the page that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.cli import targets as found
from dlm.cli.memory import FIGURES
from dlm.cli.table import say
from dlm.cli.targets import is_sweep_dir
from dlm.core import paths
from dlm.core.errors import UserError
from dlm.core.files import check_writable
from dlm.core.names import slug

if TYPE_CHECKING:
    import pandas as pd

    from dlm.report.look import Paper


def compare_reports(targets: Sequence[str], *, out: Path | None, paper: Paper | None) -> None:
    """Write the page that compares the runs of several targets, and print its verdict and its path.

    Args:
        targets: Sweeps, folders of tables or CSV files.
        out: The folder for the page. None: workdir/compare/A_B.
        paper: Figures to write besides those of the page.

    Raises:
        UserError: A target has no run that can be used, two are the same, or the folder cannot be written to.
    """
    from dlm.fit.table import fit_sweep
    from dlm.report.versus import RunSet, write_comparison

    places = [place_of(target) for target in targets]
    for k, place in enumerate(places):
        if place.resolve() in [other.resolve() for other in places[:k]]:
            raise UserError(f"{targets[k]} is given twice: a comparison needs different sets of runs")
    names = names_of(places)
    folder = paths.workdir() / "compare" / "_".join(slug(name) for name in names) if out is None else out
    if is_sweep_dir(folder):
        raise UserError(f"{folder} is the folder of a sweep, whose report would be lost: give another --out")
    read = [_read(target, place) for target, place in zip(targets, places, strict=True)]
    check_writable(folder)
    check_writable(folder / FIGURES)
    sets = []
    for name, place, (runs, definition) in zip(names, places, read, strict=True):
        say(f"fitting {name} ...")
        sets.append(RunSet(name=name, place=str(place), runs=runs, fits=fit_sweep(runs), definition=definition))
    page, verdict = write_comparison(folder, sets, paper=paper)
    say(*verdict, f"report: {page}")


def place_of(target: str) -> Path:
    """Return the table of runs, the folder of tables or the folder of the sweep that a target names."""
    return found.table_of(target) or found.existing_sweep(target).folder


def names_of(places: Sequence[Path]) -> list[str]:
    """Return short names of the sets, which differ: those of files and folders, with their folders if need be."""
    full = [place.absolute() for place in places]
    short = [place.name.removesuffix(".csv") if place.name != "runs.csv" else place.parent.name for place in full]
    if len(set(short)) == len(short):
        return short
    longer = [f"{place.parent.name}-{name}" for place, name in zip(full, short, strict=True)]
    return longer if len(set(longer)) == len(longer) else [f"{k + 1}-{name}" for k, name in enumerate(longer)]


def _read(target: str, place: Path) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    """Return the usable runs of a target, and the definition of a sweep. Nothing is written."""
    from dlm.collect.tables import collect
    from dlm.fit.table import read_runs

    if found.table_of(target) is not None:
        return read_runs(place), None
    sweep = found.existing_sweep(target)
    runs = collect(sweep.folder, write=False).runs
    if runs.empty:
        raise UserError(f"no run of {sweep.folder} can be used yet: `dlm status {sweep.folder}` says how far it is")
    return read_runs(runs), sweep.plan.spec.plain()
