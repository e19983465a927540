"""The callbacks that act around a training step: measurement, recording, checkpoints and preemption.

Callbacks act on optimiser steps, never on micro-batches. They copy tensors from the device only at logged steps,
because every copy waits for the device.
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
        """Call ``on_step_end`` if micro-batch ``batch_idx`` completes an optimiser step."""
        assert isinstance(module, DiffusionLMLightningModule)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            validates = (batch_idx + 1) % int(trainer.val_check_batch or 1) == 0
            self.on_step_end(trainer, module, validates=validates)

    def on_step_end(self, trainer: L.Trainer, module: DiffusionLMLightningModule, *, validates: bool) -> None:
        """Act after optimiser step ``trainer.global_step``; ``validates`` states whether a validation follows."""
        raise NotImplementedError


def is_logged(trainer: L.Trainer) -> bool:
    """Return whether the current step is logged: a multiple of trainer.log_every_n_steps, or the last step."""
    step = trainer.global_step
    every = getattr(trainer, "log_every_n_steps")  # noqa: B009 (Lightning sets it without declaring it)
    return step % every == 0 or step == trainer.max_steps


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """Return the trainer's callbacks, in order."""
    return getattr(trainer, "callbacks")  # noqa: B009 (Lightning sets it without declaring it)


def evenly(steps: int, times: int) -> int:
    """Return the interval, at least 1 step, at which something happens ``times`` times in ``steps`` steps."""
    return max(-(-steps // times), 1)
