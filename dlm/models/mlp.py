"""mlp: SwiGLU (Shazeer 2002.05202), as LLaMA has it. Called by encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dlm.ladder import ModelShape


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix product."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.n_embd, 2 * shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, shape.n_embd, bias=False)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate, up = self.gate_up(x_BTC).chunk(2, dim=-1)
        result: torch.Tensor = self.down(F.silu(gate) * up)
        return result
