"""Estimate the time of a measurement from its FLOPs, and its memory from its activations, before it starts."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from benchmarks.card.rows import Row, Scale
from dlm.core.flops import PEAK_FLOPS, flops_per_token
from dlm.core.objectives import OBJECTIVES
from dlm.core.shape import ModelShape
from dlm.plan.speed import BANDWIDTH, PRODUCTS, assumed_share

GIB = 2**30
# Bytes of activations per token, layer and channel, by whether our step is compiled: measured in bf16-mixed.
ACTIVATION_BYTES = {False: 64, True: 46}
WINDOWS = 5
WARM_STEPS = 3
ON_CPU = 0.4  # the share of the speed of a matrix product that a training step reaches on a CPU
START_SEC = 15.0  # from starting python to the first step of a run, on a card
PEER_SLOWER = 2.0  # how much longer a step of a peer may take


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a process that uses the device says of it."""

    name: str
    type: str  # cuda or cpu
    memory_gib: float  # what measurements may use
    product_flops_per_sec: float  # of a short matrix product

    @property
    def gpu(self) -> str:
        """The name of the GPU in dlm's tables; an H100 if it is in none."""
        known = [key for key in BANDWIDTH if all(part in self.name for part in key.split())]
        return max(known, key=len, default="H100")

    def flops_per_sec(self, num_params: int, *, compiled: bool) -> float:
        """Return the assumed speed of a training step, full_masked_head FLOP/s."""
        if self.type == "cpu":
            return self.product_flops_per_sec * ON_CPU
        peak = PEAK_FLOPS[self.gpu] if self.gpu in self.name else self.product_flops_per_sec / PRODUCTS
        return peak * assumed_share(num_params, self.gpu, compiled=compiled)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a measurement will take."""

    seconds: float
    memory_gib: float


def estimate(row: Row, scale: Scale, device: Device) -> Estimate:
    """Return the estimate of a row."""
    return Estimate(seconds=_seconds(row, scale, device), memory_gib=_memory_gib(row, scale))


def fitting(row: Row, scale: Scale, device: Device) -> tuple[Row, int]:
    """Halve the micro-batch of a row until it fits the memory; return the row and how often it was halved."""
    halvings = 0
    while _memory_gib(row, scale) > device.memory_gib and row.micro_batch > 1:
        row, halvings = row.halved(1), halvings + 1
    return row, halvings


def _memory_gib(row: Row, scale: Scale) -> float:
    """Return the memory of a row: 16 bytes per parameter, the activations, and float32 logits with their gradient."""
    if row.kind == "product":
        return 3 * 2 * 8192**2 / GIB if scale.name == "card" else 0.01
    shape = scale.shape(row.size)
    tokens = scale.micro_batch(row.micro_batch) * scale.length
    state = 16 * shape.num_params_total(causal=False)
    activations = ACTIVATION_BYTES[row.compiled] * tokens * shape.n_layer * shape.n_embd
    logits = 8 * tokens * shape.vocab_size
    # Two sides hold two states, but their activations one after the other; a peer may be eager and have a whole head.
    sides, most = (2, ACTIVATION_BYTES[False] / ACTIVATION_BYTES[row.compiled]) if is_pair(row) else (1, 1.0)
    share = 1.0 if is_pair(row) else 0.6
    return (sides * state + most * activations + share * logits) / GIB


def is_pair(row: Row) -> bool:
    """Whether a row compares two sides in turn."""
    return row.kind in ("against", "head", "cross_entropy")


def step_flops(shape: ModelShape, *, tokens: int, length: int) -> float:
    """Return the FLOPs of a micro-step of masked diffusion in the convention full_masked_head."""
    objective = OBJECTIVES["masked_diffusion"]
    per_token = flops_per_token(shape, convention="full_masked_head", block_size=length, objective=objective)
    return float(per_token) * tokens


def _seconds(row: Row, scale: Scale, device: Device) -> float:
    if row.kind == "product":
        return 2.0
    shape = scale.shape(row.size)
    tokens = scale.micro_batch(row.micro_batch) * scale.length
    flops = step_flops(shape, tokens=tokens, length=scale.length)
    if row.kind == "numbers":  # the same step once on the CPU, whose speed is a guess
        return 1.0 + flops / 1e11
    step = flops / device.flops_per_sec(shape.num_params, compiled=row.compiled)
    step = max(step, 1e-3 * (shape.n_layer + 2))
    compiling = _compile_seconds(shape, scale, device) if row.compiled else 0.0
    window = step * scale.steps
    if row.kind == "first_step":
        return 2 * (START_SEC / 2 + compiling)
    if row.kind == "launch":
        # The run finds most of what the bare loop has compiled in PyTorch's cache.
        return START_SEC + 1.5 * compiling + (3 * WINDOWS + 4) * window
    if is_pair(row):
        compiled_sides = 1 if row.options.get("peer") == "smdm" else 2
        return compiled_sides * compiling + (WINDOWS + 2) * (1 + PEER_SLOWER) * window
    alone = min(max(math.ceil(scale.seconds / step), 3), scale.steps)
    return compiling + step * (WARM_STEPS + WINDOWS * alone)


def _compile_seconds(shape: ModelShape, scale: Scale, device: Device) -> float:
    """Return the assumed time of a compilation with an empty cache; PyTorch unrolls the layers."""
    if scale.backend is not None:
        return 1.0 + 0.5 * shape.n_layer
    return 8.0 + 2.0 * shape.n_layer if device.type == "cuda" else 15.0 + 3.0 * shape.n_layer


class Pace:
    """How much longer measurements take than was estimated; learnt on the way, for each kind, compiled or not."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[str, bool], list[float]] = {}

    def learn(self, row: Row, estimated: float, seconds: float) -> None:
        """Take note of a finished measurement."""
        self._ratios.setdefault((row.kind, row.compiled), []).append(seconds / estimated)

    def __call__(self, row: Row) -> float:
        """Return the factor for a row: the median of the last five of its kind, at least a half."""
        return max(statistics.median(self._ratios.get((row.kind, row.compiled), [1.0])[-5:]), 0.5)
