"""gradient_monitor: the global norms of the gradients before clipping and of the weights, at logged steps."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.distributed.tensor import DTensor

from dlm.callbacks import at_logged_step
from dlm.models.lightning_module import DiffusionLMLightningModule


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
