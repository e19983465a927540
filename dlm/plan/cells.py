"""What a plan is made of: cells, their estimates, the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlm.plan.definition import SweepSpec


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One planned run, with everything derived. Targets and actual values stand side by side."""

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
    estimate: Estimate | None = None

    def __getattr__(self, name: str) -> Any:
        """The estimate's columns read like the cell's own; None where nothing was estimated."""
        if name in {field.name for field in dataclasses.fields(Estimate)}:
            return None if self.estimate is None else getattr(self.estimate, name)
        raise AttributeError(name)

    def decisions(self) -> dict[str, Any]:
        """What plan.json holds of the cell."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "estimate"}

    def row(self) -> dict[str, Any]:
        """Decisions and estimate together, as `dlm plan --json` prints them."""
        estimate = {} if self.estimate is None else dataclasses.asdict(self.estimate)
        return {**self.decisions(), **estimate}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every cell of a sweep, and what was dropped and why."""

    spec: SweepSpec
    convention: str
    data: str
    data_hash: str | None  # None while the data are not prepared: the ids are a preview
    cells: tuple[Cell, ...]
    dropped: tuple[Mapping[str, Any], ...]

    def to_json(self, *, estimates: bool) -> dict[str, Any]:
        """Plain values: with the estimates for people and programs, without for plan.json."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "convention": self.convention,
            "data": self.data,
            "data_hash": self.data_hash,
            "cells": [cell.row() if estimates else cell.decisions() for cell in self.cells],
            "dropped": list(self.dropped),
        }


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one cell costs; None is not known."""

    hours: float | None  # wall time
    gpu_hours: float | None
    memory_gib: float  # of one device
    nodes: int
    gpus_per_node: int
    device: str
    basis: str  # where the hours come from
