"""Describe runs that no definition planned, such as those of `python -m dlm.launch -m`, as the cells of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dlm.core.configs import load_yaml
from dlm.core.errors import UserError
from dlm.core.recipe import derive
from dlm.plan.cells import Cell, Plan
from dlm.plan.definition import SweepSpec
from dlm.plan.grid import described
from dlm.record.run import run_directory


def plan_of_runs(folder: Path, names: Iterable[str]) -> Plan:
    """Return a plan of the runs in a sweep's folder that has no plan.json.

    Args:
        folder: The folder.
        names: The ids of the runs. Of one that has not started, only its id is known: it has no steps and no FLOPs.

    Raises:
        UserError: There is no run.
    """
    cells = tuple(_cell(folder, name) for name in sorted(names))
    if not cells:
        raise UserError(f"{folder} holds neither a plan nor runs: plan a sweep, or start runs with `dlm.launch`")
    budgets = sorted({cell.budget_flops for cell in cells if cell.budget_flops})
    models = tuple(dict.fromkeys(cell.model for cell in cells))
    spec = SweepSpec.model_construct(name=folder.name, budgets=tuple(budgets), models=models, seeds=(0,), proof=None)
    return Plan(spec=spec, convention=cells[0].convention, data="-", data_hash=None, cells=cells, dropped=())


def _cell(folder: Path, name: str) -> Cell:
    path = run_directory(folder, name) / "config.yaml"
    config: Mapping[str, Any] = load_yaml(path) if path.is_file() else {}
    try:
        recipe = derive(config) if config else None
    except (UserError, KeyError, TypeError):  # an unfinished or foreign file describes nothing
        recipe = None
    if recipe is None:
        return Cell(
            cell_id=name, model="-", objective="-", seed=0, num_params=0, num_params_total=0, budget_flops=0.0,
            convention="6n", tokens=0, steps=0, warmup_steps=0, global_batch_size=0, block_size=0, learning_rate=0.0,
            schedule="-", flops={"6n": 0.0}, budget_error_pct=0.0, tokens_per_param=0.0, epochs=None, groups={},
            overrides={},
        )  # fmt: skip
    budget = recipe.budget_flops or recipe.flops[recipe.convention]
    error = recipe.budget_error_pct or 0.0  # without a budget, the FLOPs of the run are taken for it
    own: dict[str, Any] = {
        "budget_flops": budget,
        "budget_error_pct": error,
        "epochs": None,
        "groups": {},
        "overrides": {},
    }
    return described(config, recipe, cell_id=name, **own)
