"""Make a Lightning module outside a run."""

from typing import Any

from dlm.core.recipe import derive, fill
from dlm.plan.grid import cell_config
from dlm.train.models.lightning_module import DiffusionLMLightningModule
from dlm.train.objectives import Objective
from dlm.train.objectives.masked_diffusion import MaskedDiffusion

GROUPS = {"model": "8k", "data": "stdlib", "objective": "masked_diffusion", "optimizer": "adamw", "scheduler": "cosine"}
TRAINER = {"attention": "auto", "compile": False, "activation_checkpointing": False, "strategy": "auto"}


def make_module(
    changes: dict[str, Any] | None = None, objective: Objective | None = None
) -> DiffusionLMLightningModule:
    """Make the module of the 8k model on bytes. ``changes`` maps dotted config keys, also of the trainer, to values."""
    changes = dict(changes or {})
    trainer = {key: changes.pop(f"trainer.{key}", value) for key, value in TRAINER.items()}
    config = {**fill(cell_config(GROUPS, changes)), "trainer": trainer}
    return DiffusionLMLightningModule(derive(config), objective or MaskedDiffusion(vocab_size=256), config)
