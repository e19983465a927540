"""Turn SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 into a checkpoint and a clean end of the run.

The signal handler only sets a flag. Between steps, the ranks agree on whether to stop, so no checkpoint begins while
some ranks are inside a collective operation.
"""

from __future__ import annotations

import signal
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from dlm.core import signals
from dlm.train.callbacks import StepCallback
from dlm.train.models.lightning_module import DiffusionLMLightningModule

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
AGREE_EVERY_SEC = 1.0  # the interval at which several processes agree; a single process acts at once
AGREE_EVERY_STEPS = 10  # the upper limit of the interval


class Preemption(StepCallback):
    """Stops the run at the next step after a signal. ``requested`` is then True: the run is to be continued."""

    def __init__(self) -> None:
        self.requested = False
        self._flag = False
        self._agree_at, self._agreed = 0, (0, 0.0)  # step of the next agreement; step and time of the last one

    def take_signals(self) -> None:
        """Install the handlers before the fit, because Lightning restores the handlers it found when the fit began."""
        self._before = {number: signal.signal(number, self._set_flag) for number in SIGNALS}
        self._flag = self._flag or signals.asked_to_stop()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Replace Lightning's handlers, which requeue the job or end the process."""
        for number in SIGNALS:
            signal.signal(number, self._set_flag)

    def return_signals(self) -> None:
        """Restore the earlier handlers, except after a requested stop, so that a second signal is harmless."""
        if not self.requested:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _set_flag(self, number: int, frame: Any) -> None:
        self._flag = True
        if number == signal.SIGINT:
            if not getattr(rank_zero_only, "rank", 0):
                signals.say("stopping after this step; Ctrl-C again to kill")
            signal.signal(number, signals.interrupt)
        signals.note(number)

    def on_step_end(self, trainer: L.Trainer, module: DiffusionLMLightningModule, *, validates: bool) -> None:
        """Agree with the other ranks on whether to stop.

        The callback Checkpoint, which comes later in the list of callbacks, saves if ``requested`` is True.
        """
        if trainer.world_size == 1:
            self.requested = self._flag
        elif trainer.global_step >= self._agree_at:
            self.requested = self._agree(trainer, module)
        trainer.should_stop = trainer.should_stop or self.requested
        due = validates or trainer.global_step == trainer.max_steps
        if self.requested and not due:  # Lightning validates whenever it stops, and little time may be left
            trainer.limit_val_batches = 0

    def _agree(self, trainer: L.Trainer, module: DiffusionLMLightningModule) -> bool:
        """Return whether any rank received a signal. The step time of the slowest rank sets the next agreement."""
        step, now = trainer.global_step, time.monotonic()
        before, then = self._agreed
        step_sec = (now - then) / (step - before) if then and step > before else AGREE_EVERY_SEC
        mine = torch.tensor([float(self._flag), step_sec], device=module.device)
        flag, slowest = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self._agreed = step, now
        self._agree_at = step + min(max(int(AGREE_EVERY_SEC / slowest), 1), AGREE_EVERY_STEPS)
        return bool(flag)
