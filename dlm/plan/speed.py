"""Assume the speed of training on a GPU as a share of its peak: by model size, device, and whether a run is compiled.

The shares come from the memory traffic of a step, not from measurements. A definition can give its own,
``hardware.mfu``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from dlm.core.configs import load_choice
from dlm.core.flops import PEAK_FLOPS
from dlm.plan.cells import Cell

# On an H100, by whether the run is compiled: (non-embedding parameters, share of the peak in full_masked_head FLOPs).
# Compiled runs of nanochat reach 0.41 at 0.1B and 0.50 at 1B (its speed runs on eight H100, bf16).
ON_H100 = {
    False: ((6e6, 0.10), (170e6, 0.22)),
    True: ((6e6, 0.18), (170e6, 0.40)),
}
PRODUCTS = 0.78  # the share of the peak that a large matrix product reaches: the limit for any model
# Bytes per second that the memory of a GPU moves, from the data sheets of NVIDIA.
BANDWIDTH = {
    "B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "A100": 2.04e12,
    "L40S": 0.864e12,
}  # fmt: skip
# The memory of a GPU in GiB, as PyTorch reports it. An A100 counts as one of 80 GB, and so does a GPU that is not here.
MEMORY_GIB = {"B200": 178, "H200": 139, "H100": 79, "H100 PCIe": 79, "H100 NVL": 93, "A100": 79, "L40S": 44}
OTHER_MEMORY_GIB = 79


def assumed_share(num_params: int, device: str, *, compiled: bool) -> float:
    """Return the assumed share of a device's peak.

    The time of a step is that of its matrix products plus that of its memory traffic. The second part is scaled by the
    FLOPs that the device can do per byte of its bandwidth, relative to an H100.

    Args:
        num_params: N, non-embedding. Below the smallest and above the largest size of the table, the share is constant.
        device: The GPU; one whose bandwidth is not known counts as an H100.
        compiled: Whether torch.compile is used.
    """
    points = [(math.log(size), math.log(share)) for size, share in ON_H100[compiled]]
    traffic = math.exp(-interpolate(math.log(num_params), points)) - 1 / PRODUCTS
    return 1 / (1 / PRODUCTS + traffic * _balance(device) / _balance("H100"))


def _balance(device: str) -> float:
    """Return the FLOPs that a GPU can do while it moves one byte."""
    name = device if device in BANDWIDTH else "H100"
    return PEAK_FLOPS[name] / BANDWIDTH[name]


def trainer_of(cell: Cell, *, on_gpu: bool) -> dict[str, Any]:
    """Return the config node ``trainer`` of a cell. Jobs with GPUs take a GPU trainer if the cell has none."""
    group = str(cell.groups.get("trainer", "cpu"))
    choice = load_choice("trainer", "single_gpu" if on_gpu and group == "cpu" else group)
    own = {key.removeprefix("trainer."): value for key, value in cell.overrides.items() if key.startswith("trainer.")}
    return {**choice, **own}


def is_compiled(cell: Cell, *, on_gpu: bool) -> bool:
    """Return whether a cell is trained with torch.compile."""
    return bool(trainer_of(cell, on_gpu=on_gpu)["compile"])


def interpolate(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Interpolate linearly between ``points``, like numpy.interp but without importing NumPy, which takes 0.1 s.

    Args:
        x: Where to interpolate. Before the first point and after the last point, y is constant.
        points: (x, y), ascending in x.
    """
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x < x1:
            return (y1 - y0) / (x1 - x0) * (x - x0) + y0
    return points[-1][1]
