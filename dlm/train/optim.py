"""Build the optimiser and the learning-rate schedule of a run from its config."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from dlm.core.errors import UserError
from dlm.core.schedule import Rates
from dlm.core.shape import ModelShape

Group = dict[str, Any]


def make_optimizer(model: nn.Module, config: Mapping[str, Any], shape: ModelShape) -> torch.optim.Optimizer:
    """Build the optimiser of a model.

    Args:
        model: A TransEncoder.
        config: The config node ``optimizer``.
        shape: The shape of the model, for the factors of completep.

    Returns:
        The optimiser. Its first parameter group has the unscaled learning rate of the config, which is logged.

    Raises:
        UserError: The config combines Muon with completep, whose scaling rules are for AdamW.
    """
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
        Muon(
            hidden.values(),
            lr=config["lr"],
            weight_decay=config["weight_decay"],
            momentum=config["momentum"],
            adjust_lr_fn="match_rms_adamw",  # so one learning rate suits both (Liu et al. 2502.16982)
        ),
        _adamw(rest.items(), config, shape),
    )


def kind_of(name: str, parameter: nn.Parameter) -> str:
    """Return the kind of a parameter of TransEncoder: embedding, hidden (a matrix inside a block), norm or head."""
    if parameter.dim() == 1:
        return "norm"
    return next((kind for kind in ("embedding", "head") if kind in name.split(".")), "hidden")


def factors(kind: str, shape: ModelShape) -> dict[str, float]:
    """Return the factors on lr, weight_decay and eps of AdamW for one kind of parameter; under sp all factors are 1.

    Under completep the factors follow table 1 of Dey et al. (2505.01618) for alpha = 1. The table's ratios to the base
    model, m_N and m_L, are width_ratio and depth_ratio.
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
    """Build a fused AdamW with one parameter group for each distinct setting."""
    groups: dict[tuple[tuple[str, float], ...], Group] = {}
    for name, parameter in parameters:  # the embedding, whose factor on lr is 1, comes first
        kind = kind_of(name, parameter)
        settings = {key: config[key] * factor for key, factor in factors(kind, shape).items()}
        if config["decay"] == "matrices" and kind == "norm":
            settings["weight_decay"] = 0.0
        groups.setdefault(tuple(settings.items()), {"params": [], **settings})["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), betas=tuple(config["betas"]), fused=True)


class Muon(torch.optim.Muon):
    """PyTorch's Muon; a matrix that is sharded over processes gets the update that it would get in one process.

    PyTorch's own step would orthogonalise the shards together in bfloat16. As sums of bfloat16 numbers depend on how
    they are split, its updates differ from those of one process by some percent.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters and return the value of ``closure``, which computes the loss and its gradients."""
        if not any(isinstance(parameter, DTensor) for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_sharded(parameter, group)
        return loss

    def _step_sharded(self, parameter: torch.Tensor, group: Group) -> None:
        """Update one matrix. Momentum stays sharded; every process orthogonalises the whole matrix."""
        # These are the functions of PyTorch's own step, so both ways to compute stay the same.
        from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

        gradient: Any = parameter.grad
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        whole = update.bfloat16().full_tensor()  # orthogonalised in bfloat16, so no more has to be sent
        whole = _zeropower_via_newtonschulz(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        mesh = gradient.device_mesh
        change = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
        parameter.add_(change.redistribute(mesh, gradient.placements), alpha=-rate)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimiser, with one state and one list of parameter groups: Muon's, then AdamW's.

    Lightning sees a single optimiser, so the checkpoints have the same format as with any other optimiser.
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
        """Pass the groups and the state that load_state_dict has replaced to both parts."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step both parts and return the value of ``closure``, which computes the loss and its gradients."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


def check_branch(run: Rates, *, trunk: Rates, at: int) -> None:
    """Check that a wsd run may start from a checkpoint of another run.

    The run that starts there (the cooldown branch) counts the steps of the run that wrote the checkpoint (the trunk) as
    its own. Up to the step of the checkpoint, both runs must have the same learning rates, so the branch ends with the
    same losses as a run from scratch of its length.

    Args:
        run: The schedule of this run.
        trunk: The schedule of the trunk.
        at: The step of the checkpoint.

    Raises:
        UserError: The two warm-ups differ, or at step ``at`` one of the two runs is not in the constant part of a wsd
            schedule.
    """
    if not trunk.holds(at):
        raise UserError(
            f"the checkpoint at step {at} is not from the constant part of a wsd run: choose another ckpt_path"
        )
    if run.warmup != trunk.warmup:
        raise UserError(
            f"the run of the checkpoint warmed up for {trunk.warmup} steps, this run warms up for {run.warmup}, so it "
            "would not end as it would from nothing: set the same scheduler.warmup_tokens_per_param for both runs"
        )
    if not run.holds(at):
        raise UserError(
            f"the checkpoint at step {at} lies outside the constant part of a run of {run.steps} steps: choose another "
            f"ckpt_path or training.steps={_shortest_branch(run, at)}"
        )


def _shortest_branch(run: Rates, at: int) -> int:
    """Return the smallest number of steps of a run that is still at its peak learning rate at step ``at``."""
    cooldown = min(run.config["decay_fraction"], 0.99)
    enough = max(at + 1, math.floor((at - run.warmup) / (1 - cooldown)))
    return next(steps for steps in itertools.count(enough) if dataclasses.replace(run, steps=steps).holds(at))
