"""The plan of a sweep, its cells and their estimates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlm.plan.definition import SweepSpec


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one cell costs on the hardware of its definition. None: not known."""

    hours: float | None = None  # wall time
    gpu_hours: float | None = None
    memory_gib: float | None = None  # of one device
    nodes: int = 1
    gpus_per_node: int = 0
    device: str = "cpu"
    basis: str = "not estimated"  # where the hours come from


NOT_ESTIMATED = Estimate()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One planned run: what is asked for, and everything that follows from it."""

    cell_id: str
    model: str
    objective: str
    seed: int
    num_params: int  # N, non-embedding
    num_params_total: int
    budget_flops: float  # target
    convention: str
    tokens: int  # actual, D
    steps: int
    warmup_steps: int
    global_batch_size: int  # sequences
    block_size: int  # tokens
    learning_rate: float
    schedule: str
    flops: Mapping[str, float]  # actual, under every convention
    budget_error_pct: float
    tokens_per_param: float
    epochs: float | None  # None while the data are not prepared
    groups: Mapping[str, str]
    overrides: Mapping[str, Any]  # dotted config keys: what the cell sets beyond its groups
    estimate: Estimate = NOT_ESTIMATED

    def decisions(self) -> dict[str, Any]:
        """The fields that plan.json holds: all but the estimate."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "estimate"}

    def row(self) -> dict[str, Any]:
        """Decisions and estimate in one dict, as `dlm plan --json` prints them."""
        return {**self.decisions(), **dataclasses.asdict(self.estimate)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of a sweep, and the combinations that were dropped, each with its reason."""

    spec: SweepSpec
    convention: str
    data: str
    data_hash: str | None  # None while the data are not prepared: the ids are a preview
    cells: tuple[Cell, ...]
    dropped: tuple[Mapping[str, Any], ...]

    def to_json(self, *, estimates: bool) -> dict[str, Any]:
        """Plain values: with the estimates as `dlm plan --json` prints them, without them as plan.json holds them."""
        cells = [cell.row() if estimates else cell.decisions() for cell in self.cells]
        spec = self.spec.model_dump(mode="json")
        return {**vars(self), "spec": spec, "cells": cells, "dropped": list(self.dropped)}
