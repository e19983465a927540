"""The shape of a model, read from configs/model/*.yaml, and its exact numbers of parameters.

The shapes are defined only in these files, and every number of parameters is computed in this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlm.core.checks import MOST
from dlm.core.configs import choices, load_choice
from dlm.core.errors import UserError, shown, unknown

PARAMETRISATIONS = ("sp", "completep")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The shape of a transformer of the SMDM family: RMSNorm, rotary embedding, SwiGLU, no biases, untied head.

    Raises:
        UserError: The values do not describe a valid model. The message names the key to change.
    """

    name: str
    n_layer: int
    n_head: int
    n_embd: int  # d
    intermediate_size: int  # f, the width of each of the two gate projections of SwiGLU
    vocab_size: int  # V, without the mask token
    block_size: int  # the longest sequence, tokens
    rotary_percentage: float = 1.0  # share of the channels of a head that is rotated
    norm_eps: float = 1e-5
    n_query_groups: int | None = None  # key-value heads, each for n_head / n_query_groups query heads; None: n_head
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotation
    parametrisation: str = "sp"  # or completep: how initialisation and learning rates scale with width and depth
    base_n_embd: int | None = None  # completep: width n_embd at which the learning rate was tuned
    base_n_layer: int | None = None  # completep: depth n_layer at which the learning rate was tuned

    def __post_init__(self) -> None:
        for key in ("n_layer", "n_head", "n_embd", "intermediate_size", "vocab_size", "block_size"):
            _check_whole(key, getattr(self, key))
        if self.n_query_groups is not None:
            _check_whole("n_query_groups", self.n_query_groups)
            if self.n_head % self.n_query_groups:
                raise UserError(
                    f"model.n_query_groups {self.n_query_groups} does not divide model.n_head {self.n_head}: "
                    "change one of them"
                )
        if not isinstance(self.qk_norm, bool):
            raise UserError(f"model.qk_norm is {self.qk_norm!r}: allowed are true and false")
        self._check_parametrisation()
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"model.n_embd {self.n_embd} over model.n_head {self.n_head} is not an even head size: "
                "choose n_embd as a multiple of 2 x n_head"
            )
        if not 0 <= self.rotary_percentage <= 1:
            raise UserError(f"model.rotary_percentage is {self.rotary_percentage}: allowed are 0 to 1")

    def _check_parametrisation(self) -> None:
        if self.parametrisation not in PARAMETRISATIONS:
            raise unknown("model.parametrisation", self.parametrisation, PARAMETRISATIONS)
        for key in ("base_n_embd", "base_n_layer"):
            value = getattr(self, key)
            if self.parametrisation == "completep":
                _check_whole(key, value)
            elif value is not None:
                raise UserError(f"model.{key} is {value!r}, which only model.parametrisation=completep reads")

    @property
    def head_dim(self) -> int:
        """The channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def num_kv_heads(self) -> int:
        """The number of key-value heads: n_head, or fewer with grouped queries."""
        return self.n_query_groups or self.n_head

    @property
    def width_ratio(self) -> float:
        """m_N of completep: the width divided by the width of the base model; 1 under sp."""
        return self.n_embd / self.base_n_embd if self.base_n_embd else 1.0

    @property
    def depth_ratio(self) -> float:
        """m_L of completep: the depth divided by the depth of the base model; 1 under sp."""
        return self.n_layer / self.base_n_layer if self.base_n_layer else 1.0

    @property
    def num_params(self) -> int:
        """N, the non-embedding parameters as SMDM counts them, with every RMSNorm weight: L(4 d^2 + 3 d f + 2 d) + d.

        Grouped queries make the key and value projections smaller; qk_norm adds two norms of head size per layer.
        """
        d, f = self.n_embd, self.intermediate_size
        attention = 2 * d * d + 2 * d * self.num_kv_heads * self.head_dim
        norms = 2 * d + (2 * self.head_dim if self.qk_norm else 0)
        return self.n_layer * (attention + 3 * d * f + norms) + d

    def num_params_total(self, *, causal: bool) -> int:
        """Return N plus the untied head and the input embedding.

        Unless ``causal``, the embedding has one more row, for the mask token.
        """
        embedding_rows = self.vocab_size + (0 if causal else 1)
        return self.num_params + (embedding_rows + self.vocab_size) * self.n_embd


def _check_whole(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"model.{key} is {value!r}: it must be a whole number of at least 1")
    if value > MOST:
        raise UserError(f"model.{key} is {shown(value)}: it must be a whole number from 1 to {MOST}")


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Make a ModelShape from the ``model`` node of a config. Raises UserError for an unknown or missing key."""
    allowed = [field.name for field in dataclasses.fields(ModelShape)]
    for key in config:
        if key not in allowed:
            raise unknown("key of model", key, allowed)
    missing = [name for name in allowed[:7] if name not in config]
    if missing:
        raise UserError(f"model lacks {', '.join(missing)}: choose one of configs/model or add the key")
    return ModelShape(**config)


def load_shape(name: str) -> ModelShape:
    """Read the shape ``name`` from configs/model. Raises UserError, with the close matches, for an unknown name."""
    return shape_from_config(load_choice("model", name))


def ladder() -> list[ModelShape]:
    """Return every shape in configs/model, the smallest first."""
    return sorted((load_shape(name) for name in choices("model")), key=lambda shape: shape.num_params)
