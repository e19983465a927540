"""The transformer that every objective trains; it maps tokens to logits, or to the losses of given targets.

Legend: B sequences, T tokens, C channels, V vocabulary, M selected positions, R rotated channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dlm.core.shape import ModelShape
from dlm.train.models import cross_entropy
from dlm.train.models.attention import Attention, RMSNorm, rotary_tables


class SwiGLU(nn.Module):
    """The MLP down(silu(gate(x)) * up(x)) (Shazeer 2002.05202); gate and up are one matrix product."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.n_embd, 2 * shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, shape.n_embd, bias=False)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Apply the MLP: (B, T, C) -> (B, T, C)."""
        gate, up = self.gate_up(x_BTC).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP, each applied to the RMSNorm of the residual stream and added to it.

    Under completep, both outputs are divided by the depth ratio before they are added (Dey et al. 2505.01618, table 1
    for alpha = 1).
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.residual_scale = 1 / shape.depth_ratio
        self.norm_1 = RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.attention = Attention(shape)
        self.norm_2 = RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.mlp = SwiGLU(shape)

    def forward(self, x_BTC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, causal: bool) -> torch.Tensor:
        """Apply the block: (B, T, C) -> (B, T, C)."""
        attended_BTC = self.attention(self.norm_1(x_BTC), cos_TR, sin_TR, causal)
        x_BTC = torch.add(x_BTC, attended_BTC, alpha=self.residual_scale)
        return torch.add(x_BTC, self.mlp(self.norm_2(x_BTC)), alpha=self.residual_scale)


class TransEncoder(nn.Module):
    """A transformer that maps tokens to logits.

    The attribute ``cross_entropy`` is the function that computes losses (dlm.train.models.cross_entropy).

    Args:
        shape: The shape of the model, as in configs/model.
        causal: Attend to earlier tokens only. If False, the embedding has one more row, number V, for the mask token.
        checkpointing: Recompute the activations of every block in the backward pass instead of keeping them.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, shape: ModelShape, *, causal: bool, checkpointing: bool = False) -> None:
        super().__init__()
        self.shape, self.causal, self.checkpointing = shape, causal, checkpointing
        self.embedding = nn.Embedding(shape.vocab_size + (0 if causal else 1), shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        self.cross_entropy: cross_entropy.CrossEntropy = cross_entropy.auto
        rotated = int(shape.rotary_percentage * shape.head_dim) // 2 * 2
        cos, sin = rotary_tables(shape.block_size, rotated)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> TransEncoder:
        """Move or convert the module, but keep the rotary tables in float32, which bf16-true would round."""
        super()._apply(fn, recurse)
        cos, sin = rotary_tables(self.shape.block_size, self.cos.shape[-1])
        self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self

    def use_flash_attn(self, switch: bool) -> None:
        """Let every layer call the package flash-attn instead of PyTorch's attention, or not."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.use_flash_attn = switch

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise the weights from normal distributions, as in SMDM.

        The std is sqrt(2 / 5d), and 1 / (sqrt(d) L) for projections into the residual stream; d is n_embd and L is
        n_layer. Under completep, the embedding and the head use the base model's d, and projections into the residual
        stream use the base model's L; for the base model, this is SMDM's initialisation.
        """
        shape = self.shape
        std = math.sqrt(2 / (5 * shape.n_embd))
        outer_std = std * math.sqrt(shape.width_ratio)
        back_std = 1 / (math.sqrt(shape.n_embd) * (shape.base_n_layer or shape.n_layer))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            elif name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(parameter, std=back_std, generator=generator)
            else:
                inner = name.startswith("blocks.")
                nn.init.normal_(parameter, std=std if inner else outer_std, generator=generator)

    def forward(
        self, tokens_BT: torch.Tensor, index_M: torch.Tensor | None = None, target_M: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute logits, or cross-entropies, for which not all logits have to exist at once.

        Under bf16-mixed, the residual stream is in bfloat16.

        Args:
            tokens_BT: (B, T) token numbers.
            index_M: (M,) positions in the flattened tokens; None for all positions.
            target_M: (M,) tokens to predict at these positions; IGNORED where the loss is to be zero.

        Returns:
            (B, T, V) logits, or (M, V) logits at the positions ``index_M``; with ``target_M`` (M,) cross-entropies in
            float32, nats.
        """
        length = tokens_BT.shape[1]
        cos_TR, sin_TR = self.cos[:length], self.sin[:length]
        x_BTC = self.embedding(tokens_BT)
        if torch.is_autocast_enabled(x_BTC.device.type):
            x_BTC = x_BTC.to(torch.get_autocast_dtype(x_BTC.device.type))
        for block in self.blocks:
            if self.checkpointing and self.training:
                x_BTC = checkpoint(block, x_BTC, cos_TR, sin_TR, self.causal, use_reentrant=False)
            else:
                x_BTC = block(x_BTC, cos_TR, sin_TR, self.causal)
        hidden = x_BTC if index_M is None else x_BTC.flatten(0, 1)[index_M]
        hidden = self.norm(hidden) / self.shape.width_ratio
        return (
            self.head(hidden)
            if target_M is None
            else self.cross_entropy(hidden.view(-1, hidden.shape[-1]), self.head.weight, target_M)
        )
