"""Import other people's training code from a checkout of theirs and run it as it is.

A dependency that has no wheel for this machine is replaced by the same function in plain PyTorch. SHIMS names every
such replacement, so that a result can report it.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SHIMS = {
    "smdm": (
        "flash_attn (scaled_dot_product_attention)",
        "xformers.ops.SwiGLU (three linear layers)",
        "rotary_emb (two products and a sum, in place)",
        "dropout_layer_norm (torch.nn.functional.rms_norm)",
        "xentropy_cuda_lib (not called)",
    )
}


class Absent(Exception):
    """A peer is not there; the message says what was tried."""


def smdm(folder: Path, *, checkout: Path | None = None) -> Any:
    """SMDM's package lit_gpt (github.com/ML-GSAI/SMDM) from ``checkout``, by default ``folder``/SMDM. Raises Absent."""
    checkout = checkout or folder / "SMDM"
    if not (checkout / "lit_gpt" / "diffmodel.py").is_file():
        raise Absent(f"no checkout of SMDM at {checkout}: git clone https://github.com/ML-GSAI/SMDM {checkout}")
    _shim("flash_attn", flash_attn_func=_flash_attention)
    _shim("xformers")
    _shim("xformers.ops", SwiGLU=SwiGLU)
    _shim("rotary_emb", apply_rotary=_apply_rotary)
    _shim("dropout_layer_norm")
    _shim("xentropy_cuda_lib")
    _shim("einops", rearrange=lambda x, pattern: {"s d -> s 1 d": x[:, None]}[pattern], repeat=None)
    sys.path.insert(0, str(checkout))
    try:
        package = importlib.import_module("lit_gpt")
        norms = importlib.import_module("lit_gpt.rmsnorm")
        importlib.import_module("lit_gpt.diffmodel")
    except ImportError as error:
        raise Absent(f"import lit_gpt from {checkout} failed: {error}") from error
    finally:
        sys.path.remove(str(checkout))
    norms.rms_norm = lambda x, weight, epsilon: F.rms_norm(x, weight.shape, weight, epsilon)  # type: ignore[attr-defined]
    return package


def _shim(name: str, **content: Any) -> None:
    """Make a module of that name, unless the real one is installed."""
    if name in sys.modules:
        return
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module


class SwiGLU(nn.Module):
    """w3(silu(w1 x) w2 x), with the names of xformers.ops.SwiGLU."""

    def __init__(self, width: int, hidden: int, bias: bool = False, _pack_weights: bool = False) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, hidden, bias=bias), nn.Linear(width, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width)."""
        result: torch.Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return result


def _flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, softmax_scale: float, causal: bool
) -> torch.Tensor:
    """(B, T, H, D) each -> (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    result = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=softmax_scale, is_causal=causal)
    return result.transpose(1, 2)


def _apply_rotary(
    x1: torch.Tensor,
    x2: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    o1: torch.Tensor,
    o2: torch.Tensor,
    conj: bool,
) -> None:
    """Turn the pairs (x1, x2) into (o1, o2), which may be the same memory; back where ``conj``."""
    sin = -sin if conj else sin
    turned = x1 * cos - x2 * sin, x1 * sin + x2 * cos
    o1.data.copy_(turned[0])  # as the extension writes: autograd does not see it
    o2.data.copy_(turned[1])
