"""Make batches from token sequences and noise, and compute losses from a model and a batch.

The facts about each objective that the rest of dlm needs are in dlm/core/objectives.py.

Legend: B sequences, T tokens of a sequence, V vocabulary, M predicted positions.
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
    """The base class of the training objectives. CONTRIBUTING.md explains how to add an objective.

    ``corrupt`` and ``probe`` run in the worker processes of the data loader, so they use numpy and keep no state.
    """

    name: str  # the key of the objective in dlm.core.objectives.OBJECTIVES
    estimator = "exact"  # the estimator of the validation loss, recorded in result.json

    @property
    def info(self) -> ObjectiveInfo:
        """The entry of the objective in OBJECTIVES, which states for example whether the model is causal."""
        return OBJECTIVES[self.name]

    @abc.abstractmethod
    def corrupt(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """Make a training batch.

        Args:
            tokens_BT: The text, (B, T) integers below V.
            t_B: One diffusion time for each sequence, in [0, 1).
            uniform_BT: One uniform number for each token, in [0, 1).

        Returns:
            Arrays by name, in the form that ``loss`` expects.
        """

    @abc.abstractmethod
    def probe(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """Make a validation batch, whose loss is an unbiased estimate of -log p or of an upper bound on it.

        The arguments and the return value are those of ``corrupt``.
        """

    @abc.abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Compute the loss of every sequence.

        Args:
            model: A TransEncoder, which maps (B, T) tokens to (B, T, V) logits, or to (M, V) logits at given positions.
                Given targets too, it returns their (M,) cross-entropies, for which it needs less memory.
            batch: Tensors from ``corrupt`` or ``probe``.

        Returns:
            (B,) losses in nats/token. Their mean is the training loss or the validation loss.
        """


def make_objective(config: Mapping[str, Any], *, vocab_size: int, bos_id: int) -> Objective:
    """Build the objective that a config names.

    The class of the objective receives ``vocab_size``, ``bos_id`` and ``estimator`` (``validation.estimator``) if its
    constructor has these arguments.

    Args:
        config: The complete config; its node ``objective`` has the name of the objective and the other keyword
            arguments of its class.
        vocab_size: V.
        bos_id: The token from which the first token of a sequence is predicted.

    Raises:
        UserError: The name is not in OBJECTIVES.
    """
    options = dict(config["objective"])
    made = get_class(objective_info(options.pop("name")).target)
    facts = {"vocab_size": vocab_size, "bos_id": bos_id, "estimator": config["validation"]["estimator"]}
    asked_for = inspect.signature(made).parameters.keys()
    return made(**{key: facts[key] for key in facts.keys() & asked_for}, **options)
