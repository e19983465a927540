"""Write the plan of a sweep to its folder, and read it back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dlm.core import text
from dlm.core.configs import nest
from dlm.core.errors import UserError
from dlm.core.files import dump_json, read_json, write_if_changed
from dlm.core.names import inside
from dlm.core.power_recipe import PowerRecipe, check_recipe
from dlm.core.typed import MisfitError, read_typed, typed
from dlm.plan.cells import NOT_ESTIMATED, TUNE, Cell, Estimate, Plan, check_planned
from dlm.plan.cost import estimated_like
from dlm.plan.definition import LIMITS_OF_CELLS, SweepSpec, parse_sweep
from dlm.plan.grid import make_plan, with_shared_trunks
from dlm.plan.proof import proof_cells
from dlm.plan.trunks import kept_steps


def with_earlier_cells(sweep_dir: Path, plan: Plan) -> Plan:
    """Return the plan with the cells of the folder's earlier plan that have been started, and with its proof runs.

    Raises UserError if the earlier plan came from another definition or other data.
    """
    before = read_plan(sweep_dir) if (sweep_dir / "plan.json").is_file() else None
    if before is not None:
        _check_same(sweep_dir, before, plan)
        here = {cell.cell_id for cell in plan.cells}
        kept = [cell for cell in before.grid if cell.cell_id not in here and _started(sweep_dir, cell.cell_id)]
        if kept:  # in the order of make_plan, so that growing a sweep in steps gives the bytes of one plan
            whole = _plan_with(kept, plan.spec, before.spec)
            place = {cell.cell_id: number for number, cell in enumerate(whole.cells)}
            cells = sorted([*plan.grid, *kept], key=lambda cell: place.get(cell.cell_id, len(place)))
            cells = list(with_shared_trunks(cells)) if plan.spec.branches else cells
            plan = dataclasses.replace(plan, spec=whole.spec, cells=tuple(cells), dropped=whole.dropped)
    return with_proof_cells(sweep_dir, plan)


def write_plan(sweep_dir: Path, plan: Plan) -> Plan:
    """Write plan.json, estimate.json and cell/*.yaml.

    Returns:
        The plan that was written: that of ``with_earlier_cells``.

    Raises:
        UserError: The earlier plan in the folder came from another definition or other data.
    """
    plan = with_earlier_cells(sweep_dir, plan)
    keep = kept_steps(plan.cells)
    for cell in plan.cells:
        content = cell_yaml(plan.spec.name, cell, keep_steps=keep.get(cell.cell_id, ()))
        write_if_changed(inside(sweep_dir / "cell", f"{cell.cell_id}.yaml"), content)
    planned = {cell.cell_id for cell in plan.cells}
    for path in (sweep_dir / "cell").glob("*.yaml"):
        if path.stem not in planned:  # a cell of an earlier plan that was never started
            path.unlink()
    estimated = [cell for cell in plan.cells if cell.estimate != NOT_ESTIMATED]
    rows = {cell.cell_id: dataclasses.asdict(cell.estimate) for cell in estimated}
    write_if_changed(sweep_dir / "estimate.json", dump_json(rows))
    write_if_changed(sweep_dir / "plan.json", dump_json(plan.to_json(estimates=False)))
    return plan


def _plan_with(kept: Sequence[Cell], spec: SweepSpec, before: SweepSpec) -> Plan:
    """Plan a definition together with the cells that are kept from the definition ``before``."""
    models = {*spec.models, *(cell.groups["model"] for cell in kept)}
    seeds = {*spec.seeds, *(cell.seed for cell in kept)}
    grown = {
        "models": tuple(name for name in _longer(spec.models, before.models) if name in models),
        "seeds": tuple(seed for seed in _longer(spec.seeds, before.seeds) if seed in seeds),
    }
    spec = spec.model_copy(update=grown).with_budgets({*spec.budgets, *(cell.budget_flops for cell in kept)})
    whole = make_plan(spec)
    law_cells = {cell.cell_id for cell in kept if cell.role != TUNE}  # tuning cells of earlier ends of the budgets stay
    if law_cells <= {cell.cell_id for cell in whole.cells}:
        return whole
    return make_plan(spec.model_copy(update={key: getattr(before, key) for key in LIMITS_OF_CELLS}))


def _longer(one: Sequence[Any], other: Sequence[Any]) -> Sequence[Any]:
    return one if len(one) >= len(other) else other


def _started(sweep_dir: Path, cell: str) -> bool:
    return (sweep_dir / "runs" / cell).is_dir()


def _check_same(sweep_dir: Path, before: Plan, plan: Plan) -> None:
    old, new = before.spec.identity(), plan.spec.identity()
    for key in ("models", "seeds"):  # one list may be the other one with more entries
        one, other = list(getattr(before.spec, key)), list(getattr(plan.spec, key))
        if not (set(one) <= set(other) or set(other) <= set(one)):
            old, new = {**old, key: one}, {**new, key: other}
    changed = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in new if old.get(key) != new[key]]
    if not changed and before.recipe not in (None, plan.recipe):
        changed = [f"the recipe {plan.spec.recipe} was {_laws(before.recipe)}, is {_laws(plan.recipe)}"]
    if not changed and before.data_hash not in (None, plan.data_hash):
        changed = [f"the data {plan.data} had hash {before.data_hash}, have {plan.data_hash}"]
    if changed:
        raise UserError(
            f"{sweep_dir} holds the plan of another definition ({'; '.join(changed)}): give this one another name, "
            "or move the folder away"
        )


def _laws(recipe: PowerRecipe | None) -> str:
    """Write the laws of a recipe in one line."""
    if recipe is None:
        return "absent"
    laws = {"lr": recipe.lr, "batch": recipe.batch_tokens}
    words = [f"{name} {law.factor:.4g} N^{law.params:.4g} D^{law.tokens:.4g}" for name, law in laws.items() if law]
    return text.listed(words)


def cell_yaml(sweep: str, cell: Cell, *, keep_steps: Sequence[int] = ()) -> str:
    """Return the Hydra config of one cell as YAML: the choices of its groups, and the keys that it sets.

    Args:
        sweep: The name of the sweep.
        cell: The cell.
        keep_steps: The steps at which branches start from the checkpoints of the cell.
    """
    overrides = {key: list(value) if isinstance(value, tuple) else value for key, value in cell.overrides.items()}
    content = {
        "defaults": [{f"override /{group}": choice} for group, choice in cell.groups.items()],
        "sweep": sweep,
        "planned_cell_id": cell.cell_id,
        **({"forecast": cell.forecast} if cell.is_proof else {}),
        **({"role": cell.role} if cell.role is not None else {}),
        **({"keep_steps": list(keep_steps)} if keep_steps else {}),
        **({"parent": cell.parent, "branch_step": cell.branch_step} if cell.parent is not None else {}),
        **nest(overrides),
    }
    return "# @package _global_\n" + yaml.safe_dump(content, sort_keys=False)


def read_plan(sweep_dir: Path) -> Plan:
    """Read the plan of a sweep folder, with its estimates and its proof runs.

    Raises UserError if the plan is missing or damaged.
    """
    path = sweep_dir / "plan.json"
    if not path.is_file():
        raise UserError(f"{sweep_dir} holds no plan.json: run `dlm plan` or `dlm sweep` with its definition first")
    stored = read_typed(path, _Stored, what="plan", otherwise="move it away and plan again")
    estimates = read_estimates(sweep_dir)
    for cell in stored.cells:
        check_planned(cell, path)
    if stored.recipe is not None:
        check_recipe(stored.recipe, str(path), "plan again")
    cells = [dataclasses.replace(one, estimate=estimates.get(one.cell_id, NOT_ESTIMATED)) for one in stored.cells]
    spec = parse_sweep(dict(stored.spec), str(path))
    plan = Plan(**{**vars(stored), "spec": spec, "cells": tuple(cells)})
    return with_proof_cells(sweep_dir, plan)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The content of plan.json."""

    spec: Mapping[str, Any]
    convention: str
    data: str
    data_hash: str | None
    cells: tuple[Cell, ...]
    dropped: tuple[Mapping[str, Any], ...]
    recipe: PowerRecipe | None = None


def with_proof_cells(sweep_dir: Path, plan: Plan) -> Plan:
    """Return the plan with the proof runs of the forecasts that are frozen in the folder, after the other cells."""
    known = {cell.cell_id: cell for cell in plan.cells if cell.is_proof and cell.estimate != NOT_ESTIMATED}
    proofs = [known.get(cell.cell_id) or estimated_like(cell, plan.grid) for cell in proof_cells(sweep_dir)]
    return dataclasses.replace(plan, cells=(*plan.grid, *proofs)) if proofs else plan


def read_estimates(sweep_dir: Path) -> dict[str, Estimate]:
    """Read the estimates of a sweep: cell id -> estimate.

    The result is empty if the file is missing or damaged; the next plan writes it again.
    """
    try:
        return typed(dict[str, Estimate], read_json(sweep_dir / "estimate.json"), "estimate.json")
    except (OSError, UserError, MisfitError):
        return {}
