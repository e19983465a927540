"""Turn token sequences and their noise into batches, and a model and a batch into losses.

The facts about each objective that the rest of dlm needs are in dlm/core/objectives.py.

Legend: B sequences, T tokens of a sequence, V vocabulary, M positions that are predicted.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class

from dlm.core.objectives import OBJECTIVES, ObjectiveInfo, objective_info

Batch = dict[str, Any]


class Objective(abc.ABC):
    """A training objective. CONTRIBUTING.md says how to add one.

    ``corrupt`` and ``probe`` run in the data loader's processes, so they use numpy and hold no state.
    """

    name: str  # its key in dlm.core.objectives.OBJECTIVES
    estimator = "exact"  # how the validation loss is estimated, for result.json

    @property
    def info(self) -> ObjectiveInfo:
        """Its row in the table of objectives, which says among other things whether its model is causal."""
        return OBJECTIVES[self.name]

    @abc.abstractmethod
    def corrupt(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """Make a training batch.

        Args:
            tokens_BT: The text, (B, T) integers below V.
            t_B: One diffusion time for each sequence, in [0, 1).
            uniform_BT: One uniform number for each token, in [0, 1).

        Returns:
            Arrays by name, as ``loss`` takes them.
        """

    @abc.abstractmethod
    def probe(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """Make a validation batch, whose loss is an unbiased estimate of -log p or of an upper bound on it.

        It takes and returns what ``corrupt`` does.
        """

    @abc.abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Compute the loss of every sequence.

        Args:
            model: A TransEncoder, (B, T) tokens to (B, T, V) logits or to (M, V) logits at given positions.
            batch: Tensors from ``corrupt`` or ``probe``.

        Returns:
            (B,) losses in nats/token. Their mean is the training loss or the validation loss.
        """


def make_objective(config: Mapping[str, Any], *, vocab_size: int, bos_id: int) -> Objective:
    """Build the objective that a config names.

    A class is handed ``vocab_size``, ``bos_id`` and ``validation.estimator`` if its arguments ask for them.

    Args:
        config: The whole config; its node ``objective`` has the name and the keyword arguments of the class.
        vocab_size: V.
        bos_id: The token that stands before the first one.

    Raises:
        UserError: The name is not in the table of objectives.
    """
    options = dict(config["objective"])
    made = get_class(objective_info(options.pop("name")).target)
    facts = {"vocab_size": vocab_size, "bos_id": bos_id, "estimator": config["validation"]["estimator"]}
    asked_for = inspect.signature(made).parameters.keys()
    return made(**{key: facts[key] for key in facts.keys() & asked_for}, **options)
