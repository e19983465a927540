"""What happens around a training step: measuring, recording, checkpoints and preemption.

Callbacks act on optimiser steps, never on micro-batches, and read tensors off the device at logged steps only, because
every such read waits for the device.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from dlm.train.models.lightning_module import DiffusionLMLightningModule


class StepCallback(L.Callback):
    """A callback that acts after optimiser steps. Lightning's own hook runs after every micro-batch."""

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call ``on_step_end`` when micro-batch ``batch_idx`` completed an optimiser step."""
        assert isinstance(module, DiffusionLMLightningModule)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            validates = (batch_idx + 1) % int(trainer.val_check_batch or 1) == 0
            self.on_step_end(trainer, module, validates=validates)

    def on_step_end(self, trainer: L.Trainer, module: DiffusionLMLightningModule, *, validates: bool) -> None:
        """Act after optimiser step ``trainer.global_step``; ``validates`` says whether a validation follows it."""
        raise NotImplementedError


def is_logged(trainer: L.Trainer) -> bool:
    """Whether the current step is one to log: every trainer.log_every_n_steps, and the last one."""
    step = trainer.global_step
    every = getattr(trainer, "log_every_n_steps")  # noqa: B009 (Lightning sets it without declaring it)
    return step % every == 0 or step == trainer.max_steps


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The trainer's callbacks, in order."""
    return getattr(trainer, "callbacks")  # noqa: B009 (Lightning sets it without declaring it)


def evenly(steps: int, times: int) -> int:
    """The interval, in steps, at which something happens ``times`` times in ``steps``; at least 1."""
    return max(-(-steps // times), 1)
