"""Say what is to be done about the tuning cells of a sweep once they are trained."""

from __future__ import annotations

import shlex

from dlm.cli.targets import Sweep, is_sweep_dir, warn
from dlm.plan.recipes import RECIPE_FILE
from dlm.plan.tuning import one_sided, tuning_sets
from dlm.record.run import read_result, run_directory


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
