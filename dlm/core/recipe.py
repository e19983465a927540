"""Derive steps, warm-up, batch, accumulation and FLOPs from the config of a run.

Planning and training both use this module, so they agree. It only does arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dlm.core import flops, schedule
from dlm.core.checks import NAMES, check_values, whole
from dlm.core.errors import UserError, unknown
from dlm.core.objectives import objective_info
from dlm.core.power_recipe import BATCH_LAW, RATE_LAW
from dlm.core.shape import ModelShape, shape_from_config

MIN_STEPS = 20  # a run needs at least this many optimiser steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The quantities of a run that are derived from its config."""

    shape: ModelShape
    causal: bool
    steps: int
    rates: schedule.Rates
    global_batch_size: int  # sequences per optimiser step
    block_size: int  # tokens per sequence
    budget_flops: float | None  # None if training.steps is set
    convention: flops.Convention
    flops: Mapping[flops.Convention, float]  # actual FLOPs of all steps, under every convention

    @property
    def warmup_steps(self) -> int:
        """The optimiser steps of the warm-up."""
        return self.rates.warmup

    @property
    def tokens_per_step(self) -> int:
        """The tokens of one optimiser step on all devices together."""
        return self.global_batch_size * self.block_size

    @property
    def tokens(self) -> int:
        """The tokens of the complete run (D)."""
        return self.steps * self.tokens_per_step

    @property
    def budget_error_pct(self) -> float | None:
        """100 (actual - target) / target FLOPs: the deviation from the budget by whole steps. None without a budget."""
        if self.budget_flops is None:
            return None
        return 100 * (self.flops[self.convention] - self.budget_flops) / self.budget_flops


def derive(config: Mapping[str, Any]) -> Recipe:
    """Derive the recipe from a config.

    Args:
        config: A config after ``fill``, with the nodes model, data, objective, scheduler and training.
            ``training.steps`` takes precedence over ``training.budget``.

    Raises:
        UserError: The values do not describe a valid run.
    """
    shape = shape_from_config(config["model"])
    data, training = config["data"], config["training"]
    objective = objective_info(config["objective"]["name"])
    check_values(config)
    batch_size = whole("data.batch_size", data["batch_size"])
    block_size = whole("data.block_size", data["block_size"])
    if block_size > shape.block_size:
        raise UserError(
            f"data.block_size {block_size} is longer than the model's block of {shape.block_size}: "
            "lower data.block_size or raise model.block_size"
        )
    convention = flops.check_convention(training["convention"])
    per_token = flops.flops_per_token(shape, convention=convention, block_size=block_size, objective=objective)
    steps, budget = _steps(training, per_token, batch_size * block_size)
    return Recipe(
        shape=shape,
        causal=objective.causal,
        steps=steps,
        rates=schedule.rates_of(
            config["scheduler"], steps=steps, num_params=shape.num_params, tokens_per_step=batch_size * block_size
        ),
        global_batch_size=batch_size,
        block_size=block_size,
        budget_flops=budget,
        convention=convention,
        flops=flops.all_conventions(
            shape, tokens=steps * batch_size * block_size, block_size=block_size, objective=objective
        ),
    )


def fill(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in data.batch_size and optimizer.lr, where they are null, by the ``recipe`` of the config.

    Every reader of a composed config calls this function first, so that ids and runs use numbers. The recipes:

    * smdm: 256 sequences and 2e-4 for every size (2410.18514, pretrain/train_mdm.py);
    * power_law: BATCH_LAW and RATE_LAW, with N non-embedding parameters and D the tokens that the budget pays for; the
      batch as whole sequences, above 16 a multiple of 16.

    Returns:
        A new config.

    Raises:
        UserError: The recipe is unknown, or it is power_law and D does not follow from a budget.
    """
    name, data, optimizer = config["recipe"], dict(config["data"]), dict(config["optimizer"])
    if name not in NAMES["recipe"]:
        raise unknown("recipe", name, NAMES["recipe"])
    smdm = name == "smdm"
    if data.get("batch_size") is None:
        data["batch_size"] = 256 if smdm else _batch_law(config)
    if optimizer.get("lr") is None:
        optimizer["lr"] = 2e-4 if smdm else _lr_law(config)
    return {**config, "data": data, "optimizer": optimizer}


def _affordable_tokens(config: Mapping[str, Any]) -> float:
    """Return D, the tokens that training.budget pays for, before rounding down to whole steps."""
    training = config["training"]
    if training.get("steps") is not None or training.get("budget") is None:
        raise UserError(
            "recipe power_law follows from training.budget, and training.steps is set or there is no budget: set "
            "data.batch_size and optimizer.lr, or training.budget alone"
        )
    per_token = flops.flops_per_token(
        shape_from_config(config["model"]),
        convention=flops.check_convention(training["convention"]),
        block_size=whole("data.block_size", config["data"]["block_size"]),
        objective=objective_info(config["objective"]["name"]),
    )
    return float(flops.check_budget(training["budget"]) / per_token)


def _batch_law(config: Mapping[str, Any]) -> int:
    sequences: float = BATCH_LAW.at(*size_and_length(config)) / config["data"]["block_size"]
    unit = 16 if sequences > 16 else 1
    return max(round(sequences / unit), 1) * unit


def _lr_law(config: Mapping[str, Any]) -> float:
    return RATE_LAW.at(*size_and_length(config))


def size_and_length(config: Mapping[str, Any]) -> tuple[int, float]:
    """Return N, and D before rounding down to whole steps: the arguments of a recipe that follows both."""
    return shape_from_config(config["model"]).num_params, _affordable_tokens(config)


def _steps(training: Mapping[str, Any], per_token: Fraction, tokens_per_step: int) -> tuple[int, float | None]:
    """Return the optimiser steps of a run and the budget, which is None if training.steps is set."""
    budget = None if training.get("budget") is None else flops.check_budget(training["budget"])
    if training.get("steps") is not None:
        return whole("training.steps", training["steps"]), None
    if budget is None:
        raise UserError("neither training.budget (FLOPs) nor training.steps is set: set one, e.g. training.budget=1e19")
    return flops.budget_to_steps(budget, per_token, tokens_per_step), budget


def accumulation(*, batch_size: int, micro_batch_size: int | None, world_size: int, limit: int) -> tuple[int, int]:
    """Divide the batch of an optimiser step into micro-batches over devices and time.

    Args:
        batch_size: Sequences of an optimiser step, on all devices together.
        micro_batch_size: Sequences that a device processes at once. None: the largest divisor of the sequences of a
            device that is at most ``limit``.
        world_size: Number of devices.
        limit: How many sequences a device computes at once at most (dlm.core.memory.micro_batch_limit).

    Returns:
        (micro-batch, accumulation): the sequences that a device processes at once, and the number of micro-batches that
        it processes before an optimiser step.

    Raises:
        UserError: The batch cannot be divided without a remainder. No sequence is ever dropped.
    """
    if batch_size % world_size:
        raise UserError(
            f"data.batch_size {batch_size} does not divide evenly over {world_size} devices: change data.batch_size, "
            "trainer.devices or trainer.num_nodes"
        )
    per_device = batch_size // world_size
    if micro_batch_size is None:
        micro = max(size for size in range(1, min(limit, per_device) + 1) if per_device % size == 0)
        return micro, per_device // micro
    micro = whole("data.micro_batch_size", micro_batch_size)
    if per_device % micro:
        raise UserError(
            f"data.micro_batch_size {micro} does not divide the {per_device} sequences of a device "
            f"(data.batch_size {batch_size} over {world_size}): change one of them"
        )
    return micro, per_device // micro
