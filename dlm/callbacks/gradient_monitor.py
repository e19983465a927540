"""gradient_monitor: the global gradient norm before clipping, at logged steps."""

from __future__ import annotations

from typing import Any

import lightning as L

from dlm.callbacks import at_logged_step
from dlm.models.lightning_module import DiffusionLMLightningModule


class GradientMonitor(L.Callback):
    """Observes grad_norm, which clipping has computed anyway."""

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the norm of the last optimiser step, still on the device."""
        assert isinstance(module, DiffusionLMLightningModule)
        if at_logged_step(trainer, batch_idx):
            module.observed["grad_norm"] = module.grad_norm
