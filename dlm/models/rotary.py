"""rotary: rotary position embedding (Su et al. 2104.09864), half-split layout as in lit-gpt. Called by attention."""

from __future__ import annotations

import torch


def rotary_tables(length: int, dim: int, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(length, dim) cosines and sines, computed and kept in float32: bfloat16 has 641 positions of 2048."""
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x_XTD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R channels of every head by their position; the rest pass through. X is any leading shape."""
    dim = cos_TR.shape[-1]
    x_R, rest = x_XTD[..., :dim].float(), x_XTD[..., dim:]
    first, second = x_R.chunk(2, dim=-1)
    rotated = x_R * cos_TR + torch.cat((-second, first), dim=-1) * sin_TR
    rotated = rotated.type_as(x_XTD)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
