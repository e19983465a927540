"""ladder: configs/model/*.yaml -> ModelShape and its exact parameter counts. Called by both halves.

A size is written in its group file only; every count is computed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlm.errors import UserError, unknown
from dlm.groups import choices, load_choice


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A transformer of the SMDM family: RMSNorm, rotary, SwiGLU, no biases, untied head.

    Raises UserError (with the key to change) when the numbers do not make a model.
    """

    name: str
    n_layer: int
    n_head: int
    n_embd: int  # d
    intermediate_size: int  # f, the width of each of the two gate projections of SwiGLU
    vocab_size: int  # V, without the mask token
    block_size: int  # the longest sequence, tokens
    rotary_percentage: float = 1.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for key in ("n_layer", "n_head", "n_embd", "intermediate_size", "vocab_size", "block_size"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model.{key} is {value!r}: it must be a whole number of at least 1")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"model.n_embd {self.n_embd} over model.n_head {self.n_head} is not an even head size: "
                "choose n_embd as a multiple of 2 x n_head"
            )
        if not 0 <= self.rotary_percentage <= 1:
            raise UserError(f"model.rotary_percentage is {self.rotary_percentage}: allowed are 0 to 1")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def num_params(self) -> int:
        """N, non-embedding, as SMDM counts it: L(4 d^2 + 3 d f + 2 d) + d, every RMSNorm weight included."""
        d, f = self.n_embd, self.intermediate_size
        return self.n_layer * (4 * d * d + 3 * d * f + 2 * d) + d

    def num_params_total(self, *, causal: bool) -> int:
        """N with the untied head and the input embedding (one row more for the mask token of diffusion)."""
        embedding_rows = self.vocab_size + (0 if causal else 1)
        return self.num_params + (embedding_rows + self.vocab_size) * self.n_embd


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """A ModelShape from the ``model`` node of a config; an unknown key is a UserError."""
    allowed = [field.name for field in dataclasses.fields(ModelShape)]
    for key in config:
        if key not in allowed:
            raise unknown("key of model", key, allowed)
    missing = [name for name in allowed[:7] if name not in config]
    if missing:
        raise UserError(f"model lacks {', '.join(missing)}: choose one of configs/model or add the key")
    return ModelShape(**config)


def load_shape(name: str) -> ModelShape:
    """The shape called ``name`` in configs/model; an unknown name is a UserError with the close matches."""
    return shape_from_config(load_choice("model", name))


def ladder() -> list[ModelShape]:
    """Every size in configs/model, smallest first."""
    return sorted((load_shape(name) for name in choices("model")), key=lambda shape: shape.num_params)
