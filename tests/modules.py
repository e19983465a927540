"""A Lightning module without a run around it."""

from typing import Any

from dlm.models.lightning_module import DiffusionLMLightningModule
from dlm.objectives import Objective
from dlm.objectives.masked_diffusion import MaskedDiffusion
from dlm.plan import cell_config
from dlm.recipe import derive, fill

GROUPS = {"model": "8k", "data": "stdlib", "objective": "masked_diffusion", "optimizer": "adamw", "scheduler": "cosine"}
TRAINER = {"attention": "auto", "compile": False, "activation_checkpointing": False, "strategy": "auto"}


def make_module(
    changes: dict[str, Any] | None = None, objective: Objective | None = None
) -> DiffusionLMLightningModule:
    """That of the 8k model on bytes; ``changes`` by their dotted keys, those of trainer included."""
    changes = dict(changes or {})
    trainer = {key: changes.pop(f"trainer.{key}", value) for key, value in TRAINER.items()}
    config = {**fill(cell_config(GROUPS, changes)), "trainer": trainer}
    return DiffusionLMLightningModule(derive(config), objective or MaskedDiffusion(vocab_size=256), config)
