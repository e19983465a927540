"""preemption: SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 -> a checkpoint and a clean end. The one owner of the signals.

The handler only sets a flag; the ranks agree on it between steps, so nothing is saved inside a collective.
"""

from __future__ import annotations

import signal
import time
from typing import Any

import lightning as L
import torch

from dlm.core import signals
from dlm.train.callbacks import at_step_end

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


AGREE_EVERY_SEC = 1.0  # several processes ask each other about that often; one process acts at once


AGREE_EVERY_STEPS = 10  # at most


class Preemption(L.Callback):
    """Stops the run at the next step after a signal; ``requested`` tells train that it is to be continued."""

    def __init__(self) -> None:
        self.requested = False
        self._flag = False
        self._agree_at, self._agreed = 0, (0, 0.0)  # the next step to agree at; the last one, and its time

    def take_signals(self) -> None:
        """Before the fit begins, so that Lightning, which puts back at its end what it found, puts back these."""
        self._before = {number: signal.signal(number, self._set_flag) for number in SIGNALS}
        self._flag = self._flag or signals.asked_to_stop()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take them from Lightning too, which would requeue or end on its own."""
        for number in SIGNALS:
            signal.signal(number, self._set_flag)

    def return_signals(self) -> None:
        """To who had them; a run that was stopped keeps them, so that a second signal does not end it half-way."""
        if not self.requested:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _set_flag(self, number: int, frame: Any) -> None:
        self._flag = True
        signals.note(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # a second Ctrl-C ends at once

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the other ranks and stop; Checkpoint, which comes later, saves when ``requested``."""
        if not at_step_end(trainer, batch_idx):
            return
        if trainer.world_size == 1:
            self.requested = self._flag
        elif trainer.global_step >= self._agree_at:
            self.requested = self._agree(trainer, module)
        trainer.should_stop = trainer.should_stop or self.requested
        due = (batch_idx + 1) % int(trainer.val_check_batch or 1) == 0 or trainer.global_step == trainer.max_steps
        if self.requested and not due:  # Lightning validates whenever it stops, and the time left may be short
            trainer.limit_val_batches = 0

    def _agree(self, trainer: L.Trainer, module: L.LightningModule) -> bool:
        """Whether any rank was told to stop. The slowest rank's step time says at which step all ask again."""
        step, now = trainer.global_step, time.monotonic()
        before, then = self._agreed
        step_sec = (now - then) / (step - before) if then and step > before else AGREE_EVERY_SEC
        mine = torch.tensor([float(self._flag), step_sec], device=module.device)
        flag, slowest = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self._agreed = step, now
        self._agree_at = step + min(max(int(AGREE_EVERY_SEC / slowest), 1), AGREE_EVERY_STEPS)
        return bool(flag)
