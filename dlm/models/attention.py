"""attention: multi-head attention, causal or bidirectional from one code path. Called by encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dlm.ladder import ModelShape
from dlm.models.rotary import rotate


class Attention(nn.Module):
    """Multi-head attention without biases through PyTorch's own scaled-dot-product attention."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.n_head, self.head_dim = shape.n_head, shape.head_dim
        self.qkv = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=False)
        self.proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)

    def forward(self, x_BTC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, causal: bool) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        batch, length, width = x_BTC.shape
        qkv = self.qkv(x_BTC).view(batch, length, 3, self.n_head, self.head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHTD = rotate(qkv[:2], cos_TR, sin_TR)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, qkv[2], is_causal=causal)
        result: torch.Tensor = self.proj(y_BHTD.transpose(1, 2).reshape(batch, length, width))
        return result
