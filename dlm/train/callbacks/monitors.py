"""progress: Lightning's own progress bar on a terminal, nothing in a log file."""

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
from dlm.train.callbacks import at_logged_step
from dlm.train.models.lightning_module import DiffusionLMLightningModule


def peak_flops(device: torch.device) -> float | None:
    """The device's peak FLOP/s, or None where it is not in the table: nothing is claimed then."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [key for key in PEAK_FLOPS if all(part in name for part in key.split())]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def peak_memory(device: torch.device) -> int:
    """Bytes that this process had at most: allocated on a CUDA device, else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class SpeedMonitor(L.Callback):
    """Observes step_time (s), tokens_per_sec, memory_bytes and, where the peak is known, mfu in true FLOPs.

    True are the FLOPs of full_masked_head; peak_flops_per_device says the peak of a device that is not in the table.
    Validations are no part of a step; checkpoints and what else happens between steps are.
    """

    def __init__(self, *, peak_flops_per_device: float | None = None) -> None:
        self.peak = peak_flops_per_device
        self._since = (0.0, 0)  # when and at which step the last row was; later by the validations since then
        self._validating = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = (time.perf_counter(), trainer.global_step)
        self.peak = self.peak or peak_flops(module.device)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop the clock; a checkpoint is written at every step that is validated, so the device has caught up."""
        self._validating = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Let it go on."""
        since, step = self._since
        self._since = (since + time.perf_counter() - self._validating, step)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the mean speed since the last logged step."""
        assert isinstance(module, DiffusionLMLightningModule)
        if not at_logged_step(trainer, batch_idx):
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


class GradientMonitor(L.Callback):
    """Observes grad_norm, which clipping has computed anyway, and weight_norm."""

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave both of the last optimiser step, still on the device."""
        assert isinstance(module, DiffusionLMLightningModule)
        if at_logged_step(trainer, batch_idx):
            module.observed["grad_norm"] = module.grad_norm
            norm = torch.nn.utils.get_total_norm([parameter.detach() for parameter in module.parameters()])
            module.observed["weight_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm


class ProgressBar(TQDMProgressBar):
    """TQDMProgressBar where standard error is a terminal; refreshed seldom, so that it costs nothing."""

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)
        if not sys.stderr.isatty():
            self.disable()

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """No loss value: reading it would stall a GPU at every refresh."""
        return {}
