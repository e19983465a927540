"""Make a Lightning module and its batches outside a run."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dlm.core.recipe import derive, fill
from dlm.data.noise import stratified_t, uniforms
from dlm.plan.grid import cell_config
from dlm.train.models.lightning_module import DiffusionLMLightningModule
from dlm.train.objectives import Batch, Objective
from dlm.train.objectives.autoregressive import Autoregressive
from dlm.train.objectives.masked_diffusion import MaskedDiffusion

GROUPS = {"model": "8k", "data": "stdlib", "objective": "masked_diffusion", "optimizer": "adamw", "scheduler": "cosine"}
TRAINER = {
    "attention": "auto",
    "cross_entropy": "auto",
    "compile": False,
    "activation_checkpointing": False,
    "strategy": "auto",
    "fsdp_wrap": "block",
}


def make_module(
    changes: dict[str, Any] | None = None, objective: Objective | None = None
) -> DiffusionLMLightningModule:
    """Make the module of the 8k model on bytes. ``changes`` maps dotted config keys, also of the trainer, to values."""
    changes = dict(changes or {})
    trainer = {key: changes.pop(f"trainer.{key}", value) for key, value in TRAINER.items()}
    config = {**fill(cell_config(GROUPS, changes)), "trainer": trainer}
    return DiffusionLMLightningModule(derive(config), objective or MaskedDiffusion(vocab_size=256), config)


def objective_named(name: str) -> Objective:
    """Make an objective for the module of ``make_module``."""
    return Autoregressive(bos_id=0) if name == "autoregressive" else MaskedDiffusion(vocab_size=256)


def make_batch(objective: Objective, *, step: int = 0, sequences: int = 4, length: int = 32) -> Batch:
    """Make the training batch of a step from random bytes."""
    tokens_BT = np.random.default_rng(step).integers(0, 256, (sequences, length))
    noise = stratified_t(0, step, np.arange(sequences)), uniforms(0, step * sequences, sequences, length)
    batch = objective.corrupt(tokens_BT, *noise)
    return {name: torch.as_tensor(value) if name != "overflow" else value for name, value in batch.items()}


def set_up(module: DiffusionLMLightningModule) -> DiffusionLMLightningModule:
    """Set up a module for training on a CPU without a trainer, and return it."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(strategy=strategy, precision="32-true")  # type: ignore[assignment]
    module.setup("fit")
    return module
