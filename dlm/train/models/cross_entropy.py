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

CHECKED = (96, 128, 1000)  # M, C and V of what a package computes before the first step
ROUNDING = 0.05  # the relative error that bfloat16 explains; that of a wrong kernel is far larger


def cross_entropy_named(name: str, device: torch.device, *, precision: str) -> CrossEntropy:
    """Return the function that computes the cross-entropies of a run.

    * ``dense`` holds all logits, and their gradient in the backward pass.
    * ``chunked`` holds CHUNK_BYTES of them. It computes the product with the head twice.
    * ``auto`` is dense up to DENSE_BYTES of logits, else chunked. It depends on the micro-batch only.
    * ``liger`` and ``cut`` call kernels of packages, on a GPU, once these have computed the right numbers there.

    Args:
        name: The value of ``trainer.cross_entropy``.
        device: The device that the model runs on.
        precision: The value of ``trainer.precision``, with ``auto`` resolved.

    Returns:
        A function of (M, C) hidden states, the (V, C) weights of the head and (M,) targets, some of them IGNORED. It
        returns (M,) losses in float32, nats.

    Raises:
        UserError: The package is not installed or computes wrong numbers, or the device is not a GPU.
    """
    compute = {"auto": auto, "dense": dense, "chunked": chunked, "liger": _liger, "cut": _cut}[name]
    if name in PACKAGES:
        if device.type != "cuda":
            raise UserError(f"trainer.cross_entropy {name} needs a CUDA device, this run is on {device.type}: set auto")
        module, package = PACKAGES[name]
        if util.find_spec(module) is None:
            raise UserError(
                f"trainer.cross_entropy {name} needs the package {package}: install dlm[{name}] or set auto"
            )
        if fault := fault_of(compute, device, precision):
            raise UserError(
                f"trainer.cross_entropy {name} does not work here under trainer.precision {precision}: {fault}: set "
                f"auto, or install dlm[{name}] again"
            )
    return compute


def fault_of(compute: CrossEntropy, device: torch.device, precision: str) -> str:
    """Say what is wrong with the kernels of a package on this device; '' if their numbers are right.

    Losses and gradients are compared with those of ``dense`` in float32. Every position has a weight of its own, as in
    training: liger-kernel 0.8.0, for example, multiplies all gradients by the weight of the first position.

    Args:
        compute: What calls the kernels.
        device: The device that the model runs on.
        precision: The value of ``trainer.precision``.
    """
    positions, channels, vocabulary = CHECKED
    random = torch.Generator().manual_seed(0)
    hidden_MC = torch.randn(positions, channels, generator=random)
    weight_VC = torch.randn(vocabulary, channels, generator=random) * channels**-0.5
    target_M = torch.randint(vocabulary, (positions,), generator=random)
    target_M[::7] = IGNORED
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)

    def results(compute: CrossEntropy, dtype: torch.dtype, *, mixed: bool) -> list[torch.Tensor]:
        hidden, weight = (one.to(device, dtype, copy=True).requires_grad_() for one in (hidden_MC, weight_VC))
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            losses = compute(hidden, weight, target_M.to(device))
        (losses * torch.linspace(-1, 2, positions, device=device)).sum().backward()
        assert hidden.grad is not None and weight.grad is not None
        return [one.detach().double() for one in (losses, hidden.grad, weight.grad)]

    truth = results(dense, torch.float32, mixed=False)
    try:
        found = results(compute, dtype, mixed=precision == "bf16-mixed")
    except Exception as error:  # a package cannot be imported, or its assertions fail ...
        return " ".join(f"{type(error).__name__} {error}".split())
    for what, got, right in zip(("loss", "gradient of the input", "gradient of the head"), found, truth, strict=True):
        off = float((got - right).norm() / right.norm())
        if not off <= ROUNDING:  # so that NaN is a fault
            return f"its {what} is off by {off:.2g} (relative error; {ROUNDING:g} would be rounding)"
    return ""


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
