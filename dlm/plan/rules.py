"""The parts of a sweep definition that hold several keys: its proof run, and its rules for cells and jobs."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from dlm.core.errors import UserError
from dlm.plan.values import Extent, Factor, Frozen, Number, Value, Whole, no_switch


class Proof(Frozen):
    """The proof run: the compute-optimal model above the top budget, whose loss is predicted before it is trained."""

    factor: Annotated[Number, Field(ge=1, le=1e6)] = 3.0
    """Its budget over the top budget."""
    sizes: Annotated[Literal[1, 3], BeforeValidator(no_switch)] = 1
    """With 3, half and twice the best size are trained too; the minimum of the three tests N* itself."""


class Replicates(Frozen):
    """A rule for further runs of cells.

    Short runs vary more between seeds than long ones, and cost less. The smallest and the largest size of a budget say
    most about where its minimum lies.
    """

    below: Annotated[Number, Field(gt=0)]
    """The rule holds for cells at budgets below this multiple of the top budget."""
    runs: Annotated[Whole, Field(ge=2, le=100)]
    """How often each of these cells is trained, with the seeds s, s + 1000, s + 2000, ... If several rules hold, the
    highest number counts."""
    sizes: Literal["all", "ends"] = "all"
    """With `ends`, the rule holds only for the smallest and the largest size of each budget."""

    @model_serializer(mode="wrap")
    def _plain(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the rule as plain values, without `sizes` if it is the default, which earlier versions do not know."""
        plain: dict[str, Any] = dump(self)
        return plain if self.sizes == "ends" else {key: value for key, value in plain.items() if key != "sizes"}


class Tune(Frozen):
    """Further cells that vary the learning rate and the batch at one size of some budgets."""

    lr: tuple[Factor, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    """Factors of the learning rate of the recipe; 1 is one of them."""
    batch: tuple[Factor, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    """Factors of its batch; 1 is one of them."""
    at: tuple[Literal["lowest", "highest"], ...] = Field(default=("lowest", "highest"), min_length=1)
    """The budgets."""
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The size at each of these budgets, by its name. Null: the middle one of the budget."""
    replicates: Annotated[Whole, Field(ge=0, le=100)] = 3
    """How many of the cells are trained with a second seed too."""

    @model_validator(mode="after")
    def _fits_together(self) -> Tune:
        for name, factors in (("lr", self.lr), ("batch", self.batch)):
            if 1.0 not in factors:
                raise UserError(f"tune.{name} is {[*factors]}: it must hold 1, the recipe itself")
        if self.models is not None and len(self.models) != len(self.at):
            raise UserError(
                f"tune.models names {len(self.models)} sizes, and tune.at {len(self.at)} budgets: name one for each"
            )
        return self

    @model_serializer(mode="wrap")
    def _plain(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the plain values, without `models` if it is null."""
        plain: dict[str, Any] = dump(self)
        return {key: value for key, value in plain.items() if key != "models" or value is not None}


class LauncherRule(Frozen):
    """Keys of hydra.launcher for the jobs of some cells, such as another partition for large models."""

    at_least: Annotated[Number, Field(ge=0)] = 0.0
    """The rule holds for models with at least this many parameters N."""
    below: Annotated[Extent, Field(gt=0)] = math.inf
    """The rule holds for models with fewer parameters N."""
    set: dict[str, Value] = Field(min_length=1)
    """Keys of `hydra.launcher` and their values."""

    def holds_for(self, num_params: int) -> bool:
        """Whether the rule holds for a model with ``num_params`` parameters, embeddings not counted."""
        return self.at_least <= num_params < self.below

    @model_serializer(mode="wrap")
    def _plain(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the rule as plain values, without an infinite size, which JSON cannot hold."""
        plain: dict[str, Any] = dump(self)
        return {key: value for key, value in plain.items() if key != "below" or self.below < math.inf}
