"""Measure speed, memory, gradients and weights at logged steps, and show progress on a terminal."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.distributed.tensor import DTensor

from dlm.core.flops import PEAK_FLOPS
from dlm.train.callbacks import StepCallback, callbacks_of, is_logged
from dlm.train.callbacks.record_writer import RecordWriter
from dlm.train.models.lightning_module import DiffusionLMLightningModule


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of a device in FLOP/s; None if it is not in PEAK_FLOPS, so that no MFU is reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [key for key in PEAK_FLOPS if all(part in name for part in key.split())]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated on a CUDA device, else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # ru_maxrss is in KiB on Linux


class SpeedMonitor(StepCallback):
    """Measures step_time (s), tokens_per_sec, memory_bytes and, if the peak of the device is known, mfu.

    The times are means since the last logged step. They exclude validations; they include checkpoints and everything
    else that happens between steps. mfu counts FLOPs in the convention full_masked_head.

    Args:
        peak_flops_per_device: The peak of one device in FLOP/s; needed for a device that is not in PEAK_FLOPS.
    """

    def __init__(self, *, peak_flops_per_device: float | None = None) -> None:
        self.peak = peak_flops_per_device
        self._since = (0.0, 0)  # time and number of the last logged step; a validation adds its duration to the time
        self._validating = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = (time.perf_counter(), trainer.global_step)
        self.peak = self.peak or peak_flops(module.device)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop the clock. The device is idle here, because a checkpoint is saved before every validation."""
        self._validating = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Restart the clock."""
        since, step = self._since
        self._since = (since + time.perf_counter() - self._validating, step)

    def on_step_end(self, trainer: L.Trainer, module: DiffusionLMLightningModule, *, validates: bool) -> None:
        """At a logged step, add the measurements to ``module.observed``."""
        if not is_logged(trainer):
            return
        now = (time.perf_counter(), trainer.global_step)
        seconds, steps = now[0] - self._since[0], now[1] - self._since[1]
        self._since = now
        recipe = module.recipe
        module.observed["step_time"] = seconds / steps
        module.observed["memory_bytes"] = peak_memory(module.device)
        module.observed["tokens_per_sec"] = steps * recipe.tokens_per_step / seconds
        if self.peak:
            flops = steps * recipe.flops["full_masked_head"] / recipe.steps
            module.observed["mfu"] = flops / seconds / (self.peak * trainer.world_size)


class GradientMonitor(StepCallback):
    """Measures grad_norm, the L2 norm that gradient clipping computes anyway, and weight_norm."""

    def on_step_end(self, trainer: L.Trainer, module: DiffusionLMLightningModule, *, validates: bool) -> None:
        """At a logged step, add both norms to ``module.observed`` as tensors on the device."""
        if is_logged(trainer):
            module.observed["grad_norm"] = module.grad_norm
            norm = torch.nn.utils.get_total_norm([parameter.detach() for parameter in module.parameters()])
            module.observed["weight_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar, which is shown only if standard error is a terminal."""

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate if sys.stderr.isatty() else 0)

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """Return the last logged loss, which is on the host already: a newer one would make a GPU wait."""
        record = next((one for one in callbacks_of(trainer) if isinstance(one, RecordWriter)), None)
        return {} if record is None or record.loss is None else {"loss": f"{record.loss:.3f}"}
