"""Choose attention kernels that compute the right numbers on this device.

Kernels are known to fail on some devices and versions, with NaN in the backward pass for example, and a run would only
show it as a loss that diverges.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from dlm.core.shape import ModelShape
from dlm.train.models.attention import FULL, HALF_ONLY, ORDER, Attention, kernels, rotary_tables

SEQUENCES, MOST_TOKENS = 2, 2048  # what is computed; the memory of `math` grows with the square of the tokens
MORE = 3.0  # how many times the rounding error of `math` in the same precision is allowed
COMPARED = ("output", "gradient of the input", "gradient of the weights")
LEAST = 2e-3  # the relative error that is always allowed: products in TF32 round to 10 bits

Enter = Callable[[], contextlib.AbstractContextManager[Any]]


def working_kernels(
    backend: str, shape: ModelShape, *, causal: bool, device: torch.device, precision: str
) -> tuple[str, Enter]:
    """Choose the kernels of a run: those of ``backend`` if they compute the right numbers here, else the next in ORDER.

    On a CPU nothing is checked. A back end that is passed over is named in a warning.

    Args:
        backend: The value of ``trainer.attention``.
        shape: The shape of the model; the check uses its heads, and its block size up to MOST_TOKENS.
        causal: Whether tokens attend to earlier ones only.
        device: The device that the model runs on.
        precision: The value of ``trainer.precision``, with ``auto`` resolved.

    Returns:
        The name of the chosen back end, and a function that makes the context in which the model must run.

    Raises:
        UserError: ``backend`` is not installed, or does not support the device or the precision.
    """
    if device.type != "cuda":
        return backend, kernels(backend, device, precision=precision)
    able = [name for name in ORDER if name not in HALF_ONLY or precision not in FULL]
    names = able if backend == "auto" else [backend, *(name for name in able if name != backend)]
    faults: dict[str, str] = {}
    for name in names:
        enter = kernels(name, device, precision=precision)
        is_last = name == names[-1]
        fault = "" if is_last else fault_of(name, enter, shape, causal=causal, device=device, precision=precision)
        if not fault:
            break
        faults[name] = fault
    for other, fault in faults.items():
        warnings.warn(f"attention {other} is not used: {fault}; {name} is used instead", stacklevel=2)
    return name, enter


def fault_of(name: str, enter: Enter, shape: ModelShape, *, causal: bool, device: torch.device, precision: str) -> str:
    """Say what is wrong with a back end on this device; '' if its numbers are right.

    A layer of attention is computed forwards and backwards: with the back end, with PyTorch's `math` in the same
    precision, and with `math` in float32, which is the truth.

    Args:
        name: The name of the back end, as in ``trainer.attention``.
        enter: What ``kernels`` returned for it.
        shape: The shape of the model.
        causal: Whether tokens attend to earlier ones only.
        device: The device that the model runs on.
        precision: The value of ``trainer.precision``.
    """
    layer = functools.partial(_layer, shape, causal=causal, device=device)
    math = kernels("math", device)
    truth = layer(math, precision="32-true")
    limits = [max(MORE * _error(*pair), LEAST) for pair in zip(layer(math, precision=precision), truth, strict=True)]
    try:
        found = layer(enter, precision=precision, use_flash_attn=name == "flash_attn")
    except Exception as error:  # PyTorch has no such kernel here, a package cannot be imported, its assertions fail ...
        return " ".join(f"{type(error).__name__} {error}".split())  # some errors have no text
    for what, got, right, limit in zip(COMPARED, found, truth, limits, strict=True):
        off = _error(got, right)
        if not off <= limit:  # so that NaN is a fault
            return f"its {what} is off by {off:.2g} (relative error; {limit:.2g} would be rounding)"
    return ""


def _layer(
    shape: ModelShape,
    enter: Enter,
    *,
    causal: bool,
    device: torch.device,
    precision: str,
    use_flash_attn: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Run one layer on numbers that are always the same. Return the tensors named in COMPARED, in float64."""
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=()):  # layers draw their first weights from PyTorch's own generator
        layer = Attention(shape)
    layer.use_flash_attn = use_flash_attn
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=shape.n_embd**-0.5, generator=random)
    length = min(shape.block_size, MOST_TOKENS)
    x_BTC, towards_BTC = torch.randn(2, SEQUENCES, length, shape.n_embd, generator=random)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    layer, x_BTC, towards_BTC = layer.to(device, dtype), x_BTC.to(device, dtype), towards_BTC.to(device)
    x_BTC.requires_grad_()
    rotated = int(shape.rotary_percentage * shape.head_dim) // 2 * 2
    cos_TR, sin_TR = (table.to(device) for table in rotary_tables(length, rotated))
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"), enter():
        y_BTC = layer(x_BTC, cos_TR, sin_TR, causal)
        (y_BTC * towards_BTC).sum().backward()
    assert x_BTC.grad is not None and layer.qkv.weight.grad is not None
    return tuple(tensor.detach().double() for tensor in (y_BTC, x_BTC.grad, layer.qkv.weight.grad))


def _error(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got - right).norm() / right.norm())
