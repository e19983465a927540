"""speed_monitor: wall time between logged steps -> tokens per second and model FLOPs utilisation."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from dlm.callbacks import at_logged_step
from dlm.flops import PEAK_FLOPS
from dlm.models.lightning_module import DiffusionLMLightningModule


def peak_flops(device: torch.device) -> float | None:
    """The device's peak FLOP/s, or None where it is not in the table: nothing is claimed then."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [key for key in PEAK_FLOPS if all(part in name for part in key.split())]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


class SpeedMonitor(L.Callback):
    """Observes tokens_per_sec and, where the peak is known, mfu in true FLOPs (full_masked_head)."""

    def __init__(self, *, peak_flops_per_device: float | None = None) -> None:
        self.peak = peak_flops_per_device

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = (time.perf_counter(), trainer.global_step)
        self.peak = self.peak or peak_flops(module.device)

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
        module.observed["tokens_per_sec"] = steps * recipe.tokens_per_step / seconds
        if self.peak:
            flops = steps * recipe.flops["full_masked_head"] / recipe.steps
            module.observed["mfu"] = flops / seconds / (self.peak * trainer.world_size)
