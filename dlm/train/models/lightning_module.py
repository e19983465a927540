"""Train a model on an objective: training steps, validation, the optimiser and dlm's entries in checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from dlm.core.checks import SHARDED
from dlm.core.errors import UserError
from dlm.core.identity import shared_identity
from dlm.core.recipe import Recipe
from dlm.core.schedule import rates_of
from dlm.core.typed import MisfitError, typed
from dlm.train.checkpoint_files import check_format
from dlm.train.models.attention_check import working_kernels
from dlm.train.models.cross_entropy import cross_entropy_named
from dlm.train.models.encoder import TransEncoder
from dlm.train.objectives import Batch, Objective
from dlm.train.optim import check_branch, make_optimizer
from dlm.train.sharding import ShardedStrategy, shard

FORMAT = 1  # version of the entry `dlm` in checkpoints and weights files


class DiffusionLMLightningModule(L.LightningModule):
    """Trains a TransEncoder on an objective.

    ``observed`` collects the measurements of the monitors at a logged step; RecordWriter writes and clears it.

    Args:
        recipe: The shape of the model and the number of steps.
        objective: The objective whose loss is used for training and validation.
        config: The complete config; this class reads the nodes optimizer, scheduler, trainer, cell_id and seed.
    """

    def __init__(self, recipe: Recipe, objective: Objective, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.recipe, self.objective, self.config = recipe, objective, config
        how = config["trainer"]
        self.model = TransEncoder(
            recipe.shape,
            causal=recipe.causal,
            checkpointing=how["activation_checkpointing"],
        )
        self.model.init_weights(torch.Generator().manual_seed(config["seed"]))
        self.compute_loss = objective.loss
        self.configured = False
        self.observed: dict[str, Any] = {}
        self.loss_sum = torch.zeros(())  # since the last logged step; kept on the device, to avoid waiting for it
        self.loss_count = 0
        self.overflows = 0  # micro-batches since the last logged step with more masked tokens than their capacity
        self.grad_norm = torch.zeros(())
        self.validation_loss = (math.nan, math.nan)  # mean and Monte Carlo standard error of the mean, nats/token
        self.validated_step = -1  # the step that validation_loss belongs to

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the mean loss of one micro-batch, nats/token."""
        self.overflows += int(batch.pop("overflow", False))
        with self.kernels():
            loss = self.compute_loss(self.model, batch).mean()
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach()
        self.loss_count += 1
        return loss

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients. With activation checkpointing, the blocks attend again here, with the same kernels."""
        with self.kernels():
            super().backward(loss, *args, **kwargs)

    def take_logged(self) -> tuple[float, float]:
        """Return the mean training loss, nats/token, and the number of overflows since the last call, and reset both.

        Both values are computed over all processes. Reading them waits for the device.
        """
        reduce = self.trainer.strategy.reduce
        loss = reduce(self.loss_sum / self.loss_count, reduce_op="mean").item()
        overflows = reduce(torch.tensor(float(self.overflows), device=self.device), reduce_op="sum").item()
        self.loss_sum.zero_()
        self.loss_count, self.overflows = 0, 0
        return loss, overflows

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip the global gradient norm to ``optimizer.gradient_clip_val`` and keep the norm for the monitors."""
        limit = self.config["optimizer"]["gradient_clip_val"]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), math.inf if limit is None else limit, foreach=True)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def setup(self, stage: str) -> None:
        """Choose the attention kernels and the cross-entropy. Raises UserError if the device does not support one.

        A validation after the training calls this again, and keeps what the training used.
        """
        if hasattr(self, "kernels"):
            return
        how, device, precision = self.config["trainer"], self.trainer.strategy.root_device, str(self.trainer.precision)
        self.model.cross_entropy = cross_entropy_named(how.get("cross_entropy", "auto"), device, precision=precision)
        self.attention, self.kernels = working_kernels(
            how["attention"],
            self.recipe.shape,
            causal=self.recipe.causal,
            device=device,
            precision=precision,
        )
        self.model.use_flash_attn(self.attention == "flash_attn")

    def configure_model(self) -> None:
        """Compile the loss if trainer.compile is set. Under fsdp, shard the model in units of trainer.fsdp_wrap.

        Under fsdp, the blocks are compiled instead of the loss. Lightning calls this method several times.
        """
        if self.configured:
            return
        self.configured = True
        how = self.config["trainer"]
        compiled = how["compile"]
        if how["strategy"] not in SHARDED:
            if compiled:
                self.compute_loss = torch.compile(self.objective.loss, dynamic=False)
            return
        if compiled:
            for block in self.model.blocks:  # each alone, so that gathering the next block's parameters is not compiled
                block.compile(dynamic=False)
        strategy = self.trainer.strategy
        assert isinstance(strategy, ShardedStrategy)
        wrap, precision = how.get("fsdp_wrap", "block"), str(self.trainer.precision)
        shard(self.model, strategy.shard_mesh, wrap=wrap, precision=precision)

    def on_validation_epoch_start(self) -> None:
        """Make a row for every sequence of the fixed set: the loss and the Monte Carlo variance of the loss."""
        count = len(self.trainer.datamodule.validation_rows())  # type: ignore[attr-defined]
        self.validation_terms = torch.zeros(count, 2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Fill the rows of the sequences in ``batch``, which holds all draws of a sequence in consecutive rows."""
        draws = batch["draws"]
        with self.kernels():
            nll_SK = self.compute_loss(self.model, batch).double().view(-1, draws)
        variance_S = nll_SK.var(dim=1) / draws if draws > 1 else torch.zeros_like(nll_SK[:, 0])
        self.validation_terms[batch["sequence"]] = torch.stack([nll_SK.mean(dim=1), variance_S], dim=1)

    def on_validation_epoch_end(self) -> None:
        """Compute the validation loss and its standard error over the noise, given the sequences.

        The draws of a sequence are stratified in t, so the error from their sample variance is an upper bound.
        """
        self.validation_terms = self.trainer.strategy.reduce(self.validation_terms, reduce_op="sum")
        loss_S, variance_S = self.validation_terms.unbind(dim=1)
        self.validation_loss = (loss_S.mean().item(), variance_S.sum().sqrt().item() / len(variance_S))
        self.validated_step = self.trainer.global_step
        self.log("val/loss", self.validation_loss[0], logger=False)

    def configure_optimizers(self) -> Any:
        """Return the optimiser and the schedule, which advances at every optimiser step."""
        optimizer = make_optimizer(self.model, self.config["optimizer"], self.recipe.shape)
        schedule = LambdaLR(optimizer, self.recipe.rates.multiplier)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the entry `dlm`: a description of this run, and the loss not yet logged.

        From the description, a run with another model rejects the checkpoint with a message of one line.
        """
        checkpoint["dlm"] = {
            "format": FORMAT,
            "shape": dataclasses.asdict(self.recipe.shape),
            "objective": self.objective.name,
            "cell_id": self.config["cell_id"],
            "optimizer": dict(self.config["optimizer"]),
            "scheduler": dict(self.config["scheduler"]),
            "steps": self.recipe.steps,
            "shared": self._shared(),
            "loss_sum": self.trainer.strategy.reduce(self.loss_sum, reduce_op="mean").item(),
            "loss_count": self.loss_count,
        }
        for state in checkpoint["optimizer_states"]:
            self._name_parameters(state)

    def _shared(self) -> dict[str, Any]:
        """Return what a branch must share with this run; ``dlm.core.identity.shared_identity`` lists the values."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return shared_identity(self.config, data_hash=data.data_set.hash)

    def _name_parameters(self, state: dict[str, Any]) -> None:
        """Replace the numbers of parameters in an optimiser's state by names, which do not depend on the strategy.

        PyTorch numbers parameters in the order of the optimiser's groups; under fsdp, in the order of the model. For a
        sharded model, only rank 0 holds the state.
        """
        if not state.get("state"):
            return
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        groups = self.trainer.optimizers[0].param_groups
        order = list(names.values())
        if not isinstance(groups[0]["params"][0], DTensor):
            order = [names[id(parameter)] for group in groups for parameter in group["params"]]
        state["state"] = {order[number]: value for number, value in state["state"].items()}
        for group in state["param_groups"]:
            group["params"] = [order[number] for number in group["params"]]

    def check_checkpoint(self, checkpoint: Mapping[str, Any], *, data_hash: str) -> None:
        """Raise UserError if this run cannot start from the checkpoint.

        The checkpoint must not have a newer format, another model, objective or optimiser, or a step after the last
        step of this run. A wsd run that starts from the checkpoint of another run must also end as it would from
        nothing: everything that decides the losses up to the checkpoint must be the same for both runs.

        Args:
            checkpoint: The checkpoint.
            data_hash: The hash of this run's data.
        """
        try:
            typed(_Checkpoint, checkpoint)
        except MisfitError as error:
            raise UserError(f"the checkpoint is no checkpoint of a run ({error}): change ckpt_path") from error
        stated = checkpoint.get("dlm", {})
        check_format("the checkpoint", stated.get("format", FORMAT), readable=FORMAT)
        theirs = {**stated.get("shape", {}), "objective": stated.get("objective")}
        ours = {**dataclasses.asdict(self.recipe.shape), "objective": self.objective.name}
        del ours["name"]  # two names may denote the same shape
        differing = [
            f"{key} {theirs.get(key)} is not {value}" for key, value in ours.items() if theirs.get(key) != value
        ]
        if differing:
            raise UserError(f"the checkpoint is of another model ({'; '.join(differing)}): change ckpt_path or model")
        optimizer = dict(self.config["optimizer"])
        if stated.get("optimizer") != optimizer:  # the saved state would override the config without a message
            raise UserError(
                f"the checkpoint was trained with optimizer {stated.get('optimizer')}, the config says {optimizer}: "
                "change ckpt_path or optimizer"
            )
        step = checkpoint["global_step"]
        if step > self.recipe.steps:
            raise UserError(
                f"the checkpoint is at step {step}, this run ends at {self.recipe.steps}: change ckpt_path, or raise "
                "training.budget or training.steps"
            )
        if stated.get("cell_id") == self.config["cell_id"] or self.config["scheduler"]["name"] != "wsd":
            return  # only a wsd run that goes on from another run has to end as it would from nothing
        self._check_shared(stated, data_hash)
        sizes = {"num_params": self.recipe.shape.num_params, "tokens_per_step": self.recipe.tokens_per_step}
        trunk = rates_of(stated["scheduler"], steps=stated["steps"], **sizes)
        check_branch(self.recipe.rates, trunk=trunk, at=step)

    def _check_shared(self, stated: Mapping[str, Any], data_hash: str) -> None:
        """Raise UserError if this run and the run of a checkpoint differ in a value that decides the losses of both."""
        ours = _flat(shared_identity(self.config, data_hash=data_hash))
        theirs = _flat(stated["shared"]) if "shared" in stated else ours  # earlier versions of dlm did not store it
        differing = [
            f"{name} {theirs.get(name)} is not {ours.get(name)}"
            for name in theirs | ours
            if theirs.get(name) != ours.get(name)
        ]
        if differing:
            raise UserError(
                f"the run of the checkpoint had other values ({'; '.join(differing)}), so this wsd run would not end "
                "as it would from nothing: change ckpt_path or these values"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the loss not yet logged, and convert Lightning's progress to the micro-batches of this run.

        Lightning counts micro-batches. A run that resumes with other devices or another micro-batch size has a
        different number of micro-batches for the same optimiser steps.
        """
        self.loss_sum, self.loss_count = torch.tensor(checkpoint["dlm"]["loss_sum"]), checkpoint["dlm"]["loss_count"]
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for span in ("total", "current"):
            progress[span].update(dict.fromkeys(("ready", "started", "processed", "completed"), done))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stated:
    """What a checkpoint says of its run, as far as ``check_checkpoint`` reads it; early versions wrote less."""

    format: int = FORMAT
    shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    steps: int | None = None
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    global_step: int
    dlm: _Stated = dataclasses.field(default_factory=_Stated)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values under dotted names, one level deep: {"data": {"hash": 1}} -> {"data.hash": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat
