"""Say what is to be done about the tuning cells of a sweep once they are trained."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlm.cli.targets import Sweep, is_sweep_dir, warn
from dlm.plan.recipes import RECIPE_FILE
from dlm.plan.tuning import one_sided, tuning_sets
from dlm.record.run import read_result, run_directory

if TYPE_CHECKING:
    from dlm.fit.result import FitResult
    from dlm.plan.cells import Plan


def open_ends(sweep: Sweep) -> dict[str, list[tuple[str, str]]]:
    """Return what the tuning cells do not enclose, by objective: (a sentence, the command that adds cells)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for cells in tuning_sets(sweep.plan) if is_sweep_dir(sweep.folder) else ():
        results = {cell.cell_id: read_result(run_directory(sweep.folder, cell.cell_id)) for cell in cells}
        losses = {name: result.loss for name, result in results.items() if result is not None}
        for sentence, setting in one_sided(sweep.plan.spec, cells, losses):
            command = f"dlm sweep {shlex.quote(str(sweep.folder))} --set {setting}"
            lead = "The tuning cells lie on one side of the best:"
            found.setdefault(cells[0].objective, []).append((f"{lead} {sentence}. This adds cells:", command))
    return found


def recipe_notes(plan: Plan, fits: Sequence[FitResult]) -> list[str]:
    """Say that a forecast of well tuned runs is tested by a run that may not be, if that is so."""
    is_tuned = any(fit.tuning is not None and fit.tuning["tuned"] for fit in fits)
    if not is_tuned or (plan.recipe is not None and plan.recipe.runs is not None):
        return []
    return [
        "the forecast is of the loss at the best settings that the tuning runs show, and the proof run follows the "
        "recipe of the sweep: the loss that this recipe leaves on the table counts as an error of the forecast; a "
        "sweep with recipe: fitted avoids this"
    ]


def warn_open_ends(sweep: Sweep) -> None:
    """Warn of tuning cells that all lie on one side of the best."""
    for found in open_ends(sweep).values():
        for one in found:
            warn(" ".join(one))


def next_step(sweep: Sweep) -> str:
    """Say how the recipe of a sweep is fitted to its tuning cells, for a plan that waits for it."""
    runs, recipe = (shlex.quote(str(sweep.folder / name)) for name in ("runs.csv", RECIPE_FILE))
    return (
        f"these are the tuning cells: fit the recipe with `dlm hparams {runs} --out {recipe}`, then repeat the same "
        "command, which trains the other cells"
    )
