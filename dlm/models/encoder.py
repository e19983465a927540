"""encoder: TransEncoder, the trunk of both objectives. Built by lightning_module from a ModelShape.

Legend: B sequences, T tokens, C channels, V vocabulary, M selected positions, R rotated channels.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dlm.ladder import ModelShape
from dlm.models.attention import Attention
from dlm.models.mlp import SwiGLU
from dlm.models.rotary import rotary_tables


class Block(nn.Module):
    """Attention and MLP, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.attention = Attention(shape)
        self.norm_2 = nn.RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.mlp = SwiGLU(shape)

    def forward(self, x_BTC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, causal: bool) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_BTC = x_BTC + self.attention(self.norm_1(x_BTC), cos_TR, sin_TR, causal)
        return x_BTC + self.mlp(self.norm_2(x_BTC))


class TransEncoder(nn.Module):
    """Tokens to logits. ``causal`` also decides whether the embedding has a row for the mask token."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, shape: ModelShape, *, causal: bool) -> None:
        super().__init__()
        self.shape, self.causal = shape, causal
        self.embedding = nn.Embedding(shape.vocab_size + (0 if causal else 1), shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = nn.RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        rotated = int(shape.rotary_percentage * shape.head_dim) // 2 * 2
        cos, sin = rotary_tables(shape.block_size, rotated)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self, generator: torch.Generator) -> None:
        """SMDM's initialisation: normal with std sqrt(2 / 5d); projections back into the stream 1 / (sqrt(d) L)."""
        std = math.sqrt(2 / (5 * self.shape.n_embd))
        back_std = 1 / (math.sqrt(self.shape.n_embd) * self.shape.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                back = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=back_std if back else std, generator=generator)

    def forward(self, tokens_BT: torch.Tensor, select_BT: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) -> (B, T, V) logits, or (M, V) of the selected positions only, in row-major order."""
        length = tokens_BT.shape[1]
        cos_TR, sin_TR = self.cos[:length], self.sin[:length]
        x_BTC = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, cos_TR, sin_TR, self.causal)
        hidden = x_BTC if select_BT is None else x_BTC[select_BT]
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits
