"""The head and the cross-entropy of its logits, in ways that differ in memory and speed.

Legend: M predicted positions, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F

from dlm.core.errors import UserError
from dlm.core.memory import CHUNK_BYTES, DENSE_BYTES

IGNORED = -100  # the target of positions whose loss is zero
PACKAGES = {"liger": ("liger_kernel", "liger-kernel"), "cut": ("cut_cross_entropy", "cut-cross-entropy")}

CrossEntropy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy_named(name: str, device: torch.device) -> CrossEntropy:
    """Return the function that computes the cross-entropies of a run.

    * ``dense`` holds all logits, and their gradient in the backward pass.
    * ``chunked`` holds CHUNK_BYTES of them. It computes the product with the head twice.
    * ``auto`` is dense up to DENSE_BYTES of logits, else chunked. It depends on the micro-batch only.
    * ``liger`` and ``cut`` call kernels of packages, on a GPU.

    Args:
        name: The value of ``trainer.cross_entropy``.
        device: The device that the model runs on.

    Returns:
        A function of (M, C) hidden states, the (V, C) weights of the head and (M,) targets, some of them IGNORED. It
        returns (M,) losses in float32, nats.

    Raises:
        UserError: The package is not installed, or the device is not a GPU.
    """
    if name in PACKAGES:
        if device.type != "cuda":
            raise UserError(f"trainer.cross_entropy {name} needs a CUDA device, this run is on {device.type}: set auto")
        module, package = PACKAGES[name]
        if util.find_spec(module) is None:
            raise UserError(
                f"trainer.cross_entropy {name} needs the package {package}: install dlm[{name}] or set auto"
            )
    return {"auto": auto, "dense": dense, "chunked": chunked, "liger": _liger, "cut": _cut}[name]


def auto(hidden_MC: torch.Tensor, weight_VC: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropies by ``dense`` or ``chunked``, by the size of the logits."""
    small = 4 * hidden_MC.shape[0] * weight_VC.shape[0] <= DENSE_BYTES
    return (dense if small else chunked)(hidden_MC, weight_VC, target_M)


def dense(hidden_MC: torch.Tensor, weight_VC: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropies from all logits at once."""
    return F.cross_entropy(F.linear(hidden_MC, weight_VC).float(), target_M, reduction="none", ignore_index=IGNORED)


def chunked(
    hidden_MC: torch.Tensor, weight_VC: torch.Tensor, target_M: torch.Tensor, *, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Compute the cross-entropies from the logits of some positions at a time, and again in the backward pass.

    Args:
        hidden_MC: The hidden states.
        weight_VC: The weights of the head.
        target_M: The targets.
        chunk_bytes: How many bytes the float32 logits may take at once.
    """
    kind = hidden_MC.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_MC.dtype
    positions = max(chunk_bytes // (4 * weight_VC.shape[0]), 1)
    return _Chunked.apply(hidden_MC, weight_VC, target_M, dtype, positions)  # type: ignore[no-any-return]


class _Chunked(torch.autograd.Function):
    """``chunked`` and its gradient. The gradient of the weights is summed over the chunks in float32 or more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MC: torch.Tensor,
        weight_VC: torch.Tensor,
        target_M: torch.Tensor,
        dtype: torch.dtype,
        positions: int,
    ) -> torch.Tensor:
        weights = weight_VC.to(dtype)
        logs, losses = [], []
        for hidden, target in zip(hidden_MC.split(positions), target_M.split(positions), strict=True):
            logits = F.linear(hidden.to(dtype), weights).float()
            log = logits.logsumexp(dim=-1)
            loss = log - logits.gather(1, target.clamp(min=0)[:, None])[:, 0]
            logs.append(log)
            losses.append(loss.masked_fill(target == IGNORED, 0.0))
        ctx.save_for_backward(hidden_MC, weight_VC, target_M, torch.cat(logs))
        ctx.dtype, ctx.positions = dtype, positions
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient_M: torch.Tensor) -> Any:  # type: ignore[override]
        hidden_MC, weight_VC, target_M, log_M = ctx.saved_tensors
        weights = weight_VC.to(ctx.dtype)
        gradient_M = gradient_M.masked_fill(target_M == IGNORED, 0.0)
        parts = (one.split(ctx.positions) for one in (hidden_MC, target_M, log_M, gradient_M))
        of_hidden = []
        of_weights = torch.zeros_like(weight_VC, dtype=torch.promote_types(weight_VC.dtype, torch.float32))
        for hidden, target, log, gradient in zip(*parts, strict=True):
            rounded = hidden.to(ctx.dtype)
            p = F.linear(rounded, weights).float().sub_(log[:, None]).exp_()
            p.scatter_add_(1, target.clamp(min=0)[:, None], p.new_full((len(target), 1), -1.0))
            of_logits = p.mul_(gradient[:, None]).to(ctx.dtype)
            of_hidden.append((of_logits @ weights).to(hidden.dtype))
            of_weights += of_logits.t() @ rounded
        return torch.cat(of_hidden), of_weights.to(weight_VC.dtype), None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _liger(hidden_MC: torch.Tensor, weight_VC: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(  # type: ignore[no-any-return]
        *_rounded(hidden_MC, weight_VC), target_M, reduction="none", ignore_index=IGNORED, accum_dtype=torch.float32
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _cut(hidden_MC: torch.Tensor, weight_VC: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    losses_M: torch.Tensor = linear_cross_entropy(
        *_rounded(hidden_MC, weight_VC), target_M, reduction="none", ignore_index=IGNORED, filter_eps=None
    )  # without filter_eps=None, it would leave out small gradients
    return losses_M.float()


def _rounded(hidden_MC: torch.Tensor, weight_VC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert both to the type of autocast, because kernels of packages take what they are given."""
    kind = hidden_MC.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_MC.dtype
    return hidden_MC.to(dtype), weight_VC.to(dtype)
