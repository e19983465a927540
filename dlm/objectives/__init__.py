"""objectives: tokens -> corrupted tokens -> loss and NELBO, pure functions. Called by models and datamodules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from dlm.errors import unknown

Batch = dict[str, Any]


class Objective(Protocol):
    """What an objective offers; see CONTRIBUTING for adding one.

    Shapes: B sequences of T tokens. Batches are dicts of arrays or tensors with a leading B.
    """

    name: str
    causal: bool
    estimator: str

    def corrupt(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """What the model is given, from the text and its noise; t in (0, 1), uniform in [0, 1)."""
        ...

    def nll(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """(B,) estimates of the bound on -log p, in nats per token; their mean is the loss."""
        ...


def make_objective(config: Mapping[str, Any], *, vocab_size: int, bos_id: int) -> Objective:
    """The objective that ``config`` (the node ``objective``) names."""
    from dlm.objectives.autoregressive import Autoregressive
    from dlm.objectives.masked_diffusion import MaskedDiffusion

    kinds: dict[str, Any] = {
        "masked_diffusion": lambda options: MaskedDiffusion(vocab_size=vocab_size, **options),
        "autoregressive": lambda options: Autoregressive(bos_id=bos_id, **options),
    }
    if config["name"] not in kinds:
        raise unknown("objective.name", config["name"], kinds)
    objective: Objective = kinds[config["name"]]({key: v for key, v in config.items() if key != "name"})
    return objective
