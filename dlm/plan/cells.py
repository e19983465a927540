"""The data classes of a plan: the plan of a sweep, its cells and their estimates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.core.data_only import check_cell
from dlm.core.errors import UserError
from dlm.core.flops import CONVENTIONS
from dlm.core.names import printable
from dlm.core.power_recipe import PowerRecipe
from dlm.plan.definition import FITTED, SweepSpec


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimated cost of one cell on given hardware. None: not known."""

    hours: float | None = None  # wall time
    gpu_hours: float | None = None
    memory_gib: float | None = None  # per device
    nodes: int = 1
    gpus_per_node: int = 0
    device: str = "cpu"
    basis: str = "not estimated"  # how the hours were estimated


NOT_ESTIMATED = Estimate()
TUNE = "tune"  # the role of a cell that tunes the recipe
LATER_FIELDS = ("role", "batch_target_tokens")  # fields of Cell that plan.json holds only if they are not None
TRUNK_FIELDS = ("parent", "branch_step")  # fields of Cell that only the plans of sweeps with shared trunks hold


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One planned run: the values that its definition sets, and the values derived from them."""

    cell_id: str
    model: str
    objective: str
    seed: int
    num_params: int  # N, non-embedding
    num_params_total: int
    budget_flops: float  # target FLOPs
    convention: str
    tokens: int  # D, actual training tokens
    steps: int
    warmup_steps: int
    global_batch_size: int  # sequences per optimiser step
    block_size: int  # tokens per sequence
    learning_rate: float
    schedule: str
    flops: Mapping[str, float]  # actual FLOPs, under every convention
    budget_error_pct: float
    tokens_per_param: float
    epochs: float | None  # None while the data are not prepared
    groups: Mapping[str, str]
    overrides: Mapping[str, Any]  # dotted config key -> value, set in addition to the groups
    parent: str | None = None  # the trunk: this cell starts from a checkpoint of that cell; None: from nothing
    branch_step: int | None = None  # the step of that checkpoint
    role: str | None = None  # TUNE: the cell varies the recipe, or is a further run of a cell that does
    batch_target_tokens: float | None = None  # what the recipe gives before it is rounded to whole sequences
    estimate: Estimate = NOT_ESTIMATED
    forecast: str | None = None  # of a proof run: the SHA-256 of the forecast that it tests

    @property
    def is_proof(self) -> bool:
        """Whether this is a proof run, which tests the law of the sweep and never enters a fit."""
        return self.forecast is not None

    @property
    def own_share(self) -> float:
        """The share of the steps that this cell trains itself; the others are those of its trunk."""
        return 1 - (self.branch_step or 0) / self.steps

    @property
    def batch_error_pct(self) -> float | None:
        """100 (actual - target) / target of the tokens of a step: the rounding of the batch. None without a target."""
        if self.batch_target_tokens is None:
            return None
        return 100 * (self.global_batch_size * self.block_size / self.batch_target_tokens - 1)

    def decisions(self) -> dict[str, Any]:
        """Return the fields that plan.json holds: all except the estimate and the forecast."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        absent = {name for name in LATER_FIELDS if values[name] is None}
        return {name: value for name, value in values.items() if name not in {"estimate", "forecast", *absent}}

    def row(self) -> dict[str, Any]:
        """Return the decisions and the estimate in one dict, as `dlm plan --json` prints them."""
        return {**self.decisions(), **dataclasses.asdict(self.estimate)}


def check_planned(cell: Cell, path: Path) -> None:
    """Raise UserError for a cell in the file ``path`` that no definition can give."""
    source = f"{path}, cell {printable(cell.cell_id)}"
    check_cell(cell.groups, cell.overrides, source, names=(cell.cell_id, cell.model, cell.parent))
    for key in ("num_params", "num_params_total", "budget_flops", "tokens", "steps", "global_batch_size", "block_size"):
        if getattr(cell, key) <= 0:
            raise UserError(f"{source}: {key} is {getattr(cell, key):g}, and must be above 0: plan again")
    for convention in CONVENTIONS:
        if convention not in cell.flops:
            raise UserError(f"{source}: flops.{convention} is missing: plan again")


@dataclass(frozen=True)
class Point:
    """The choices of a cell's groups, and the config keys that the cell sets."""

    groups: Mapping[str, str]
    overrides: Mapping[str, Any]

    def dropped(self, reason: str) -> dict[str, Any]:
        """Return the row of ``Plan.dropped`` for this combination."""
        return {
            "model": self.groups["model"],
            "objective": self.groups["objective"],
            "seed": self.overrides["seed"],
            "budget_flops": self.overrides["training.budget"],
            "reason": reason,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of a sweep, and the combinations that were dropped, each with a reason.

    Once the forecast of the sweep is frozen, its proof runs follow the cells of the definition.
    """

    spec: SweepSpec
    convention: str
    data: str
    data_hash: str | None  # None while the data are not prepared; the cell ids are then provisional
    cells: tuple[Cell, ...]
    dropped: tuple[Mapping[str, Any], ...]
    recipe: PowerRecipe | None = None  # the laws that `recipe` of the definition names, as they were read

    @property
    def waits_for_recipe(self) -> bool:
        """Whether these are the tuning cells only, because the recipe that the other cells follow is not fitted yet."""
        return self.spec.recipe == FITTED and self.recipe is None

    @property
    def grid(self) -> tuple[Cell, ...]:
        """The cells that follow from the definition: all except the proof runs."""
        return tuple(cell for cell in self.cells if not cell.is_proof)

    def to_json(self, *, estimates: bool) -> dict[str, Any]:
        """Return the plan as plain values.

        Args:
            estimates: Whether to include the estimates and the proof runs, as `dlm plan --json` does. plan.json holds
                neither.
        """
        cells = [cell.row() for cell in self.cells] if estimates else [cell.decisions() for cell in self.grid]
        if not self.spec.branches:
            cells = [{key: value for key, value in cell.items() if key not in TRUNK_FIELDS} for cell in cells]
        recipe = {} if self.recipe is None else {"recipe": dataclasses.asdict(self.recipe)}
        own = {key: value for key, value in vars(self).items() if key != "recipe"}
        return {**own, "spec": self.spec.plain(), "cells": cells, "dropped": list(self.dropped), **recipe}
