"""Build the proof runs of a sweep, and store the forecasts that they test in proof.json.

A proof run trains the model that the law of the sweep calls best at a budget above the runs. Its loss is predicted and
frozen in proof.json before the run starts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.core import text
from dlm.core.configs import choices
from dlm.core.errors import UserError
from dlm.core.files import read_json, temporary_beside, write_json
from dlm.core.shape import ModelShape, load_shape
from dlm.core.sizes import NEAR, shape_near
from dlm.core.typed import read_typed, typed
from dlm.data.manifest import DataSet, read_data
from dlm.plan.cells import TUNE, Cell, Plan, Point, check_planned
from dlm.plan.data_sets import resolved
from dlm.plan.definition import SweepSpec
from dlm.plan.grid import point_of, recipe_cell
from dlm.plan.recipes import check_cells

PROOF_FILE = "proof.json"
BUILT = ("n_layer", "n_head", "n_embd", "intermediate_size")  # the keys of a shape that determine its size
USUAL_GROWTH = 0.5  # N* ~ C^.5, to estimate the cost of a proof run before there is a law


def proof_budget(spec: SweepSpec) -> float:
    """Return the budget of the proof run in FLOPs. The definition must ask for a proof run."""
    assert spec.proof is not None
    return spec.proof.factor * max(spec.budgets)


def proof_seed(spec: SweepSpec) -> int:
    """Return the seed of the proof run: one above the seeds of the sweep, because equal seeds share data and noise."""
    return max(seed for budget in spec.budgets for seed in spec.seeds_at(budget)) + 1


def build_proof(plan: Plan, *, objective: str, best: float, varied: Mapping[str, Any]) -> tuple[list[Cell], list[str]]:
    """Build the proof runs of one objective.

    Args:
        plan: The plan of the sweep, whose definition asks for a proof run.
        objective: The objective of the runs.
        best: N* at the budget of the proof run.
        varied: The value that the proof run takes for each key of ``vary`` in the definition.

    Returns:
        (the cells, a note for each size that cannot be built). The cells have one size, or with ``sizes: 3`` half of
        N*, N* and twice N*. Everything else is as for a cell of the definition at this budget and size, except the seed
        (``proof_seed``) and ``tokens_per_param``, which limits the grid only.

    Raises:
        UserError: A run of this budget and size cannot be trained.
    """
    spec = plan.spec
    assert spec.proof is not None
    sizes = [best] if spec.proof.sizes == 1 else [best / 2, best, 2 * best]
    cells, notes = dict[str, Cell](), list[str]()
    for size in sizes:
        shape = shape_near(size, _shapes(spec, varied, size))
        if abs(shape.num_params / size - 1) > NEAR:
            reached = text.count(shape.num_params)
            notes.append(f"no shape between the sizes of configs/model has {text.count(size)} parameters: {reached} do")
        cell = _cell(plan, objective, varied, shape)
        cells[cell.cell_id] = cell
    return list(cells.values()), notes


def expected_proof(plan: Plan) -> list[Cell]:
    """Return proof runs of about the size that those which are still to be planned will have, to estimate their cost.

    The size is the middle one of the top budget times the root of the factor. The list is empty if the definition asks
    for no proof run. Objectives whose proof runs are in the plan are left out.
    """
    spec, cells = plan.spec, list[Cell]()
    if spec.proof is None:
        return []
    varied = {key: values[0] for key, values in spec.vary.items()}
    known = {cell.groups["objective"] for cell in plan.cells if cell.is_proof}
    for objective in spec.objectives:
        own = [cell for cell in plan.grid if cell.groups["objective"] == objective and cell.role != TUNE]
        if objective in known or not own:
            continue
        top = max(cell.budget_flops for cell in own)
        sizes = sorted(cell.num_params for cell in own if cell.budget_flops == top)
        best = sizes[len(sizes) // 2] * spec.proof.factor**USUAL_GROWTH
        cells += build_proof(plan, objective=objective, best=best, varied=varied)[0]
    return cells


def _shapes(spec: SweepSpec, varied: Mapping[str, Any], size: float) -> list[ModelShape]:
    """Return the sizes to build a proof run between, with the ``model`` keys of the cells of the sweep.

    They are the models of the sweep, because its law holds for their manner of growing. If ``size`` lies outside them,
    they are all sizes of configs/model that have the vocabulary of the sweep.
    """
    given = {**spec.set, **varied}
    keys = {key.removeprefix("model."): value for key, value in given.items() if key.startswith("model.")}
    keys.pop("name", None)
    own = [dataclasses.replace(load_shape(name), **keys, name=name) for name in spec.models]
    if min(shape.num_params for shape in own) <= size <= max(shape.num_params for shape in own):
        return own
    return [
        dataclasses.replace(shape, **keys, name=name)
        for name, shape in ((name, load_shape(name)) for name in choices("model"))
        if (shape.vocab_size, shape.block_size) == (own[0].vocab_size, own[0].block_size)
        and shape.n_head % (keys.get("n_query_groups") or 1) == 0
    ]


def _cell(plan: Plan, objective: str, varied: Mapping[str, Any], shape: ModelShape) -> Cell:
    """Return the proof run with this shape, whose name is that of the nearest size of configs/model."""
    spec, budget = plan.spec, proof_budget(plan.spec)
    point = point_of(spec, model=shape.name, objective=objective, varied=varied, seed=proof_seed(spec), budget=budget)
    built = {f"model.{key}": getattr(shape, key) for key in BUILT}
    name = f"proof-{text.count(shape.num_params, digits=2)}"
    point = Point(point.groups, {**point.overrides, "model.name": name, **built})
    unlimited = spec.model_copy(update={"tokens_per_param": None})
    found = recipe_cell(spec, point, plan.recipe, _data_of, limits=unlimited)
    if isinstance(found, Cell):
        if plan.recipe is not None:
            check_cells(spec, plan.recipe, [found])
        return found
    raise UserError(
        f"the proof run of {text.flops(budget)} FLOPs at {text.count(shape.num_params)} parameters: {found}; lower "
        "proof.factor, or leave the proof run out with --set proof=null"
    )


def _data_of(config: Mapping[str, Any]) -> DataSet | None:
    return read_data(resolved(config["data"]))


def read_forecasts(sweep_dir: Path) -> list[dict[str, Any]]:
    """Read the frozen forecasts of a sweep, one for each objective. There are none before the other cells are done.

    Raises:
        UserError: proof.json is damaged, or a cell in it sets what no definition can set.
    """
    path = sweep_dir / PROOF_FILE
    if not path.is_file():
        return []
    stored = read_typed(path, _Forecasts, what="file of forecasts", otherwise="restore it from a copy")
    for cell in (cell for one in stored.forecasts for cell in one.proof.cells):
        check_planned(cell, path)
    found: list[dict[str, Any]] = read_json(path)["forecasts"]
    return found


@dataclass(frozen=True, kw_only=True)
class _Cells:
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class _Forecast:
    """What is read from a forecast here; dlm/fit/frozen.py reads the rest."""

    label: str | None
    sha256: str
    proof: _Cells


@dataclass(frozen=True, kw_only=True)
class _Forecasts:
    """The content of proof.json."""

    forecasts: tuple[_Forecast, ...]


def write_forecasts(sweep_dir: Path, forecasts: Sequence[Mapping[str, Any]], *, before: int) -> None:
    """Write proof.json.

    Args:
        sweep_dir: The folder of the sweep.
        forecasts: All forecasts of the sweep.
        before: How many of them the file holds already.

    Raises:
        FileExistsError: The file was to be new, and another process has written it meanwhile.
    """
    path = sweep_dir / PROOF_FILE
    if before:
        write_json(path, {"forecasts": list(forecasts)})
        return
    own = temporary_beside(path)
    write_json(own, {"forecasts": list(forecasts)})
    try:
        os.link(own, path)  # unlike a rename, this never replaces a file
    finally:
        own.unlink()


def proof_cells(sweep_dir: Path) -> list[Cell]:
    """Return the proof runs of the frozen forecasts of a sweep."""
    found = []
    for forecast in read_forecasts(sweep_dir):
        found += [typed(Cell, {**cell, "forecast": forecast["sha256"]}) for cell in forecast["proof"]["cells"]]
    return found
