"""attention: multi-head attention, causal or bidirectional from one code path. Called by encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, list_flash_attention_impls, sdpa_kernel

from dlm.core.errors import UserError, unknown
from dlm.core.shape import ModelShape


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


SDPA = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


BACKENDS = ("auto", *SDPA, "flash_attn", "fa4")  # trainer.attention


_HALF_ONLY = ("flash", "cudnn", "flash_attn", "fa4")  # on a GPU


_HOPPER = 9  # compute capability from which cuDNN's kernel is ahead of FlashAttention 2, which PyTorch carries


def kernels(
    backend: str, device: torch.device, *, precision: str = "bf16-mixed"
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """What to run a model in so that attention uses ``backend`` on ``device``.

    ``auto`` depends on the device alone, so a resumed run has the same: of PyTorch's own back ends cuDNN's first from
    Hopper on, elsewhere FlashAttention 2. It never takes flash-attn or FA4, even where they are installed: what they
    would gain over these is not measured yet, and so no installed package changes a run.

    Raises UserError for an unknown back end and for one that is not there or cannot compute in ``precision``.
    """
    if backend not in BACKENDS:
        raise unknown("trainer.attention", backend, BACKENDS)
    on_gpu = device.type == "cuda"
    if backend in ("efficient", "cudnn", "flash_attn", "fa4") and not on_gpu:
        raise UserError(f"trainer.attention {backend} needs a CUDA device, this run is on {device.type}: set auto")
    if on_gpu and backend in _HALF_ONLY and precision in ("32-true", "64-true"):
        raise UserError(
            f"trainer.attention {backend} computes in 16 bits, trainer.precision is {precision}: set auto, or "
            "trainer.precision=bf16-mixed"
        )
    if backend == "auto":
        if not on_gpu:
            return contextlib.nullcontext
        first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        if torch.cuda.get_device_capability(device)[0] < _HOPPER:
            first.reverse()
        order = [*first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return lambda: sdpa_kernel(order, set_priority=True)
    if backend == "flash_attn":
        if util.find_spec("flash_attn") is None:
            raise UserError("trainer.attention flash_attn needs the package flash-attn: install dlm[flash] or set auto")
        return contextlib.nullcontext
    if backend == "fa4":
        _activate_fa4()
        return lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return lambda: sdpa_kernel(SDPA[backend])


def _activate_fa4() -> None:
    try:
        assert "FA4" in list_flash_attention_impls()
        activate_flash_attention_impl("FA4")
    except (AssertionError, ImportError) as error:
        raise UserError("trainer.attention fa4 needs the package flash-attn-4: install it or set auto") from error


class Attention(nn.Module):
    """Multi-head attention without biases; grouped queries and normalised queries and keys as the shape says."""

    def __init__(self, shape: ModelShape, *, use_flash_attn: bool = False) -> None:
        super().__init__()
        self.n_head, self.num_kv_heads, self.head_dim = shape.n_head, shape.num_kv_heads, shape.head_dim
        self.use_flash_attn = use_flash_attn
        self.qkv = nn.Linear(shape.n_embd, (self.n_head + 2 * self.num_kv_heads) * self.head_dim, bias=False)
        self.proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        norm = (lambda: nn.RMSNorm(self.head_dim, eps=shape.norm_eps)) if shape.qk_norm else nn.Identity
        self.norm_q, self.norm_k = norm(), norm()

    def forward(self, x_BTC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, causal: bool) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        batch, length, width = x_BTC.shape
        heads_BHTD = self.qkv(x_BTC).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q_BHTD, k_BHTD, v_BHTD = heads_BHTD.split([self.n_head, self.num_kv_heads, self.num_kv_heads], dim=1)
        q_BHTD = rotate(self.norm_q(q_BHTD), cos_TR, sin_TR)
        k_BHTD = rotate(self.norm_k(k_BHTD), cos_TR, sin_TR)
        y_BTHD = self._attend(q_BHTD, k_BHTD, v_BHTD, causal)
        result: torch.Tensor = self.proj(y_BTHD.reshape(batch, length, width))
        return result

    def _attend(self, q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, causal: bool) -> torch.Tensor:
        """Softmax attention, scores over sqrt(D); (B, T, H, D)."""
        if self.use_flash_attn:
            from flash_attn import flash_attn_func

            q_BTHD, k_BTHD, v_BTHD = (x.transpose(1, 2) for x in (q_BHTD, k_BHTD, v_BHTD))
            return flash_attn_func(q_BTHD, k_BTHD, v_BTHD, causal=causal)
        grouped = self.num_kv_heads != self.n_head
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=causal, enable_gqa=grouped)
        return y_BHTD.transpose(1, 2)
