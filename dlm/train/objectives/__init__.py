"""objectives: tokens -> corrupted tokens -> loss and NELBO, pure functions. Called by models and datamodules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from dlm.core.errors import unknown

Batch = dict[str, Any]


class Objective(Protocol):
    """What an objective offers; see CONTRIBUTING for adding one.

    Shapes: B sequences of T tokens. Batches are dicts of arrays or tensors with a leading B.
    """

    name: str
    causal: bool
    estimator: str

    def corrupt(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """A training batch, from the text and its noise; t and uniform in [0, 1)."""
        ...

    def probe(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """A validation batch, from the text and its noise: its loss is an unbiased estimate of the bound on -log p."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """(B,) losses in nats per token; their mean is trained on, or is the validation loss."""
        ...


def make_objective(config: Mapping[str, Any], *, vocab_size: int, bos_id: int, estimator: str = "mc") -> Objective:
    """The objective that ``config`` (the node ``objective``) names; ``estimator`` is that of its validation loss.

    The autoregressive loss is exact and has no estimator to choose.
    """
    from dlm.train.objectives.autoregressive import Autoregressive
    from dlm.train.objectives.masked_diffusion import MaskedDiffusion

    kinds: dict[str, Any] = {
        "masked_diffusion": lambda options: MaskedDiffusion(vocab_size=vocab_size, estimator=estimator, **options),
        "autoregressive": lambda options: Autoregressive(bos_id=bos_id, **options),
    }
    if config["name"] not in kinds:
        raise unknown("objective.name", config["name"], kinds)
    objective: Objective = kinds[config["name"]]({key: v for key, v in config.items() if key != "name"})
    return objective
