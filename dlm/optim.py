"""optim: config and Recipe -> optimiser and learning-rate schedule. Called by models.lightning_module."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dlm import schedule
from dlm.errors import unknown
from dlm.recipe import Recipe


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimiser that the config node ``optimizer`` names; fused, one pass over all parameters."""
    if config["name"] != "adamw":
        raise unknown("optimizer.name", config["name"], ["adamw"])
    return torch.optim.AdamW(
        parameters,
        lr=config["lr"],
        betas=tuple(config["betas"]),
        eps=config["eps"],
        weight_decay=config["weight_decay"],
        fused=True,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, config: Mapping[str, Any], recipe: Recipe
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule that the config node ``scheduler`` names, over the steps of ``recipe``."""
    known = inspect.signature(schedule.multiplier).parameters
    shape = {key: value for key, value in config.items() if key in known}
    multiplier = functools.partial(schedule.multiplier, steps=recipe.steps, warmup=recipe.warmup_steps, **shape)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
