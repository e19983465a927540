"""Multi-head attention with rotary positions, causal or bidirectional, and the choice of its kernels.

Legend: B sequences, T tokens, C channels, H heads, D channels of a head, R rotated channels of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, restore_flash_attention_impl, sdpa_kernel

from dlm.core.errors import UserError
from dlm.core.shape import ModelShape


def rotary_tables(length: int, dim: int, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the (length, dim) cosines and sines of rotary position embeddings (Su et al. 2104.09864).

    The sines of the first half of the channels have the sign with which ``rotate`` adds them. The tables are computed
    and kept in float32, because only 641 of 2048 positions are distinct after rounding to bfloat16.

    Args:
        length: Number of positions.
        dim: Rotated channels of a head, an even number.
        base: The base of the geometric series of wavelengths.
    """
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_XTD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R channels of every head according to the position and return the other channels unchanged.

    The rotation is computed in float32 and rounded once. ``x_XTD`` and the result have the shape (..., T, D).
    """
    dim = cos_TR.shape[-1]
    rotated = _Rotation.apply(x_XTD[..., :dim], cos_TR, sin_TR)
    return torch.cat((rotated, x_XTD[..., dim:]), dim=-1) if dim < x_XTD.shape[-1] else rotated


class _Rotation(torch.autograd.Function):
    """The rotation with its gradient, which is the rotation by the opposite angle.

    It is written for few passes over the memory where nothing is compiled: in bfloat16, forwards and backwards, it
    moves 52 bytes per channel. PyTorch's own gradient of the formula would move 104.
    """

    @staticmethod
    def forward(ctx: Any, x_XTR: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        swapped_XTR = x_XTR.roll(cos_TR.shape[-1] // 2, dims=-1)
        return (x_XTR * cos_TR).addcmul_(swapped_XTR, sin_TR).type_as(x_XTR)

    @staticmethod
    def backward(ctx: Any, gradient_XTR: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        cos_TR, sin_TR = ctx.saved_tensors
        return _Rotation.apply(gradient_XTR, cos_TR, -sin_TR), None, None


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm, computed in float32 and rounded to the type of the input.

    Autocast is switched off for it: it would return float32 to layers that convert it to bfloat16 at once.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension: (..., D) -> (..., D)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


SDPA = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# What `auto` tries on a GPU, best first. cuDNN's kernel may be the faster one on Hopper, but users of PyTorch report
# NaN in its bf16 backward pass there, so it comes after FlashAttention 2 until both are measured.
ORDER = ("flash", "cudnn", "efficient", "math")
# Kernels that replace those of `flash`: the name in PyTorch's registry, and the package that has them.
REGISTERED = {"fa3": ("FA3", "flash_attn_interface of FlashAttention 3"), "fa4": ("FA4", "flash-attn-4")}
FULL = ("32-true", "64-true")  # the precisions in which everything is computed in 32 bits or more
HALF_ONLY = ("flash", "cudnn", "flash_attn", *REGISTERED)  # these compute in 16 bits on a GPU


def kernels(
    backend: str, device: torch.device, *, precision: str = "bf16-mixed"
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Choose the attention kernels of a run.

    ``auto`` depends only on the device, so that a resumed run uses the same kernels whichever packages are installed.
    It takes PyTorch's back ends in the ORDER, and never flash-attn, FA3 or FA4, because their gain over these has not
    been measured yet.

    Args:
        backend: The value of ``trainer.attention``.
        device: The device that the model runs on.
        precision: The value of ``trainer.precision``, with ``auto`` resolved.

    Returns:
        A function that makes the context manager in which the model must run.

    Raises:
        UserError: The back end is not installed, or does not support the device or the precision.
    """
    on_gpu = device.type == "cuda"
    if backend in ("efficient", "cudnn", "flash_attn", *REGISTERED) and not on_gpu:
        raise UserError(f"trainer.attention {backend} needs a CUDA device, this run is on {device.type}: set auto")
    if on_gpu and backend in HALF_ONLY and precision in FULL:
        raise UserError(
            f"trainer.attention {backend} computes in 16 bits, trainer.precision is {precision}: set auto, or "
            "trainer.precision=bf16-mixed"
        )
    if backend == "auto":
        order = [SDPA[name] for name in ORDER]
        return (lambda: sdpa_kernel(order, set_priority=True)) if on_gpu else contextlib.nullcontext
    if backend == "flash_attn":
        if util.find_spec("flash_attn") is None:
            raise UserError("trainer.attention flash_attn needs the package flash-attn: install dlm[flash] or set auto")
        return contextlib.nullcontext
    restore_flash_attention_impl(_raise_warn=False)
    if backend in REGISTERED:
        _activate(backend)
        return lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return lambda: sdpa_kernel(SDPA[backend])


def _activate(backend: str) -> None:
    name, package = REGISTERED[backend]
    try:
        activate_flash_attention_impl(name)
    except (ValueError, ImportError) as error:  # this PyTorch does not know the name, or the package is missing
        raise UserError(f"trainer.attention {backend} needs the package {package}: install it or set auto") from error


class Attention(nn.Module):
    """Multi-head attention without biases, with grouped queries and with normalised queries and keys if configured.

    The attribute ``use_flash_attn`` makes it call the package flash-attn instead of PyTorch's attention.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.n_head, self.num_kv_heads, self.head_dim = shape.n_head, shape.num_kv_heads, shape.head_dim
        self.use_flash_attn = False
        self.qkv = nn.Linear(shape.n_embd, (self.n_head + 2 * self.num_kv_heads) * self.head_dim, bias=False)
        self.proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        norm = (lambda: RMSNorm(self.head_dim, eps=shape.norm_eps)) if shape.qk_norm else nn.Identity
        self.norm_q, self.norm_k = norm(), norm()

    def forward(self, x_BTC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, causal: bool) -> torch.Tensor:
        """Apply attention: (B, T, C) -> (B, T, C)."""
        batch, length, width = x_BTC.shape
        heads_BHTD = self.qkv(x_BTC).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q_BHTD, k_BHTD, v_BHTD = heads_BHTD.split([self.n_head, self.num_kv_heads, self.num_kv_heads], dim=1)
        q_BHTD = rotate(self.norm_q(q_BHTD), cos_TR, sin_TR)
        k_BHTD = rotate(self.norm_k(k_BHTD), cos_TR, sin_TR)
        y_BTHD = self._attend(q_BHTD, k_BHTD, v_BHTD, causal)
        return self.proj(y_BTHD.reshape(batch, length, width))

    def _attend(self, q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, causal: bool) -> torch.Tensor:
        """Compute softmax attention with scores divided by sqrt(D): (B, H, T, D) each -> (B, T, H, D)."""
        if self.use_flash_attn:
            from flash_attn import flash_attn_func

            q_BTHD, k_BTHD, v_BTHD = (x.transpose(1, 2) for x in (q_BHTD, k_BHTD, v_BHTD))
            return flash_attn_func(q_BTHD, k_BTHD, v_BTHD, causal=causal)
        grouped = self.num_kv_heads != self.n_head
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=causal, enable_gqa=grouped)
        return y_BHTD.transpose(1, 2)
