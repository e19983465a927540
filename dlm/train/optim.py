"""optim: config, model and Recipe -> optimiser and learning-rate schedule. Called by models.lightning_module."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dlm.core import schedule
from dlm.core.checks import NAMES
from dlm.core.errors import UserError, unknown
from dlm.core.recipe import Recipe
from dlm.core.shape import ModelShape

Group = dict[str, Any]


def make_optimizer(model: nn.Module, config: Mapping[str, Any], shape: ModelShape) -> torch.optim.Optimizer:
    """The optimiser that the config node ``optimizer`` names, over the parameters of a TransEncoder.

    The first parameter group has the learning rate of the config itself, which is the one that is logged. Raises
    UserError for an unknown name and for Muon under completep, whose rules are AdamW's.
    """
    for key in ("name", "decay"):
        if config[key] not in NAMES[f"optimizer.{key}"]:
            raise unknown(f"optimizer.{key}", config[key], NAMES[f"optimizer.{key}"])
    if config["name"] == "adamw":
        return _adamw(model.named_parameters(), config, shape)
    if shape.parametrisation != "sp":
        raise UserError(
            f"optimizer.name muon has no rules for model.parametrisation {shape.parametrisation}: "
            "set optimizer=adamw or model.parametrisation=sp"
        )
    parameters = dict(model.named_parameters())
    hidden = {name: p for name, p in parameters.items() if kind_of(name, p) == "hidden"}
    rest = {name: p for name, p in parameters.items() if name not in hidden}
    return MuonAndAdamW(
        torch.optim.Muon(
            hidden.values(),
            lr=config["lr"],
            weight_decay=config["weight_decay"],
            momentum=config["momentum"],
            adjust_lr_fn="match_rms_adamw",  # one learning rate serves both (Liu et al. 2502.16982)
        ),
        _adamw(rest.items(), config, shape),
    )


def kind_of(name: str, parameter: nn.Parameter) -> str:
    """What a parameter of TransEncoder is: embedding, hidden (a matrix of a block), norm or head."""
    if parameter.dim() == 1:
        return "norm"
    return next((kind for kind in ("embedding", "head") if kind in name.split(".")), "hidden")


def factors(kind: str, shape: ModelShape) -> dict[str, float]:
    """What learning rate, weight decay and eps of a kind of parameter are multiplied with; all 1 under sp.

    Under completep as table 1 of Dey et al. (2505.01618, alpha = 1) has it for AdamW, with the width ratio m_N and
    the depth ratio m_L to the base.
    """
    width, depth = shape.width_ratio, shape.depth_ratio
    return {
        "embedding": {"lr": 1.0, "weight_decay": 1.0, "eps": 1 / width},
        "hidden": {"lr": 1 / width, "weight_decay": width, "eps": 1 / (width * depth)},
        "norm": {"lr": 1.0, "weight_decay": 1.0, "eps": 1 / (width * depth)},
        "head": {"lr": 1.0, "weight_decay": 1.0, "eps": 1 / width},
    }[kind]


def _adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], config: Mapping[str, Any], shape: ModelShape
) -> torch.optim.AdamW:
    """Fused AdamW, parameters of equal settings in one group."""
    groups: dict[tuple[tuple[str, float], ...], Group] = {}
    for name, parameter in parameters:  # the embedding comes first, and with it the learning rate of the config
        kind = kind_of(name, parameter)
        settings = {key: config[key] * factor for key, factor in factors(kind, shape).items()}
        if config["decay"] == "matrices" and kind == "norm":
            settings["weight_decay"] = 0.0
        groups.setdefault(tuple(settings.items()), {"params": [], **settings})["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), betas=tuple(config["betas"]), fused=True)


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimisers as one, over one state and one list of groups: Muon's first, then AdamW's.

    Lightning steps, schedules and saves a single optimiser, so a checkpoint of this is like any other.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = list(itertools.islice(groups, len(part.param_groups)))
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict with new groups and a new state, which both parts must have too."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both; the closure's result."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


def make_schedule(
    optimizer: torch.optim.Optimizer, config: Mapping[str, Any], recipe: Recipe
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule that the config node ``scheduler`` names, over the steps of ``recipe``."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier_of(config, recipe.steps))


def multiplier_of(config: Mapping[str, Any], steps: int) -> Callable[[int], float]:
    """Optimiser step -> factor on the peak learning rate, for ``steps`` under the config node ``scheduler``."""
    known = inspect.signature(schedule.multiplier).parameters
    shape = {key: value for key, value in config.items() if key in known}
    warmup = schedule.warmup_steps(steps, fraction=config["warmup_fraction"], minimum=config["warmup_min_steps"])
    return functools.partial(schedule.multiplier, steps=steps, warmup=warmup, **shape)


def check_branch(config: Mapping[str, Any], steps: int, *, trunk: Mapping[str, Any], trunk_steps: int, at: int) -> None:
    """Refuse a wsd run of ``steps`` that starts from step ``at`` of another run, unless both hold the peak there.

    A cooldown branch is a run like any other: the steps of its trunk count as its own, so what it ends with is what a
    run of as many steps from nothing would end with. A run that goes on with itself has one schedule and passes.
    """
    if config["name"] != "wsd" or (dict(config), steps) == (dict(trunk), trunk_steps):
        return
    if trunk["name"] != "wsd" or not _holds(trunk, trunk_steps, at):
        raise UserError(
            f"the checkpoint at step {at} is not from the constant part of a wsd run: choose another ckpt_path"
        )
    if not _holds(config, steps, at):
        raise UserError(
            f"the checkpoint at step {at} lies outside the constant part of a run of {steps} steps: choose another "
            f"ckpt_path or training.steps={_shortest_branch(config, at)}"
        )


def _holds(config: Mapping[str, Any], steps: int, at: int) -> bool:
    return multiplier_of(config, steps)(at) > 1 - 1e-6


def _shortest_branch(config: Mapping[str, Any], at: int) -> int:
    """The fewest steps of a run that still holds the peak ``at`` this step."""
    warmup, cooldown = config["warmup_min_steps"], min(config["decay_fraction"], 0.99)
    steps = max(at + 1, math.floor((at - warmup) / (1 - cooldown)))
    while not _holds(config, steps, at):
        steps += 1
    return steps
