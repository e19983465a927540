"""callbacks: what happens around a training step: speed, gradients, records, checkpoints, preemption.

All of them act on optimiser steps, never on micro-batches; a tensor is read off the device at logged steps only.
"""

from __future__ import annotations

import lightning as L


def at_step_end(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether micro-batch ``batch_idx`` completed an optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def at_logged_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the step that ``batch_idx`` completed is one to log: trainer.log_every_n_steps, and the last one."""
    step = trainer.global_step
    every = getattr(trainer, "log_every_n_steps")  # noqa: B009 (Lightning sets it without declaring it)
    due = step % every == 0 or step == trainer.max_steps
    return due and at_step_end(trainer, batch_idx)


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The trainer's callbacks, in order."""
    callbacks: list[L.Callback] = getattr(trainer, "callbacks")  # noqa: B009 (set without declaring it)
    return callbacks


def evenly(steps: int, times: int) -> int:
    """Every how many steps something happens ``times`` times in ``steps``; at least every step."""
    return max(-(-steps // times), 1)
