"""Write metrics.jsonl, status.json and the rows of the loggers while a run trains, and end a diverged run."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import lightning as L

from dlm.core.errors import DivergedError
from dlm.core.files import append_jsonl, patiently
from dlm.record.outcomes import State
from dlm.record.run import Status, metrics_row, read_status, write_status
from dlm.train.callbacks import StepCallback, is_logged
from dlm.train.models.lightning_module import DiffusionLMLightningModule


class Spike:
    """Detects divergence of a run from the mean of its last five logged losses.

    Five losses are averaged because single losses of small batches are noisy. A run has diverged when the mean exceeds
    the smallest mean so far by more than ``limit`` and by more than half of what the run has learnt, which is the
    distance from the smallest mean to log V, the loss of a uniform prediction.

    Args:
        limit: The smallest rise that counts as divergence, nats/token; None switches the check off.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.recent: list[float] = []
        self.best = math.inf

    def check(self, loss: float, *, vocab_size: int, step: int) -> None:
        """Add the next logged loss, nats/token. Raises DivergedError if the run has diverged."""
        self.recent = [*self.recent[-4:], loss]
        if self.limit is None or len(self.recent) < 5:
            return
        mean = sum(self.recent) / 5
        self.best = min(self.best, mean)
        allowed = max(self.limit, (math.log(vocab_size) - self.best) / 2)
        if mean > self.best + allowed:
            raise DivergedError(
                f"the training loss rose to {mean:.2f} by step {step} (mean of five logged steps), after "
                f"{self.best:.2f}: more than {allowed:.2f} higher (callbacks.record.spike)"
            )


class RecordWriter(StepCallback):
    """Writes a row for each logged step and each validation, and the state of the run.

    In the list of callbacks, it comes after the monitors, whose values it writes, and before Checkpoint, which saves
    the state of this callback.

    Args:
        run_dir: The folder of the run.
        spike: The argument ``limit`` of Spike, nats/token.
    """

    def __init__(self, *, run_dir: str, spike: float | None = 2.0) -> None:
        self.run_dir = Path(run_dir)
        self.spike = Spike(spike)
        self.wall_sec = 0.0  # of all attempts, the earlier ones up to the checkpoint that was resumed; with validations
        self.training_sec = 0.0  # the same without validations
        self.loss: float | None = None  # the last logged training loss of this attempt, nats/token
        self._begun = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this callback that every checkpoint stores."""
        times = {"wall_sec": self.wall_sec, "training_sec": self.training_sec}
        return {**times, "recent": self.spike.recent, "best": self.spike.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.wall_sec = state_dict["wall_sec"]
        self.training_sec = state_dict.get("training_sec", self.wall_sec)  # missing in the oldest checkpoints
        self.spike.recent, self.spike.best = state_dict["recent"], state_dict["best"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin the record of this attempt."""
        assert isinstance(module, DiffusionLMLightningModule)
        self._begun = True
        self._started, self._clock = time.time(), time.perf_counter()
        self._resumed_wall_sec, self._validation_sec = self.wall_sec, self.wall_sec - self.training_sec
        self.attempts, self.steps_redone, self._spent = earlier_attempts(self.run_dir, trainer.global_step)
        # No other job can use the GPUs of a SLURM job while it runs, so all of them count, used or not.
        used = trainer.world_size if module.device.type == "cuda" else 0
        self._gpus = int(os.environ.get("DLM_GPUS_HELD", used))
        self._write_status(trainer, module)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock of the validation. If only the last validation is missing, the attempt begins here."""
        assert isinstance(module, DiffusionLMLightningModule)
        self._validation_began = time.perf_counter()
        if not self._begun:
            self.on_train_start(trainer, module)
        self._write_status(trainer, module, phase="validating")

    @property
    def gpu_hours(self) -> float:
        """The GPU-hours of all attempts so far, each counted from its first step on."""
        return self._spent + self._gpus * (time.perf_counter() - self._clock) / 3600

    def on_step_end(self, trainer: L.Trainer, module: DiffusionLMLightningModule, *, validates: bool) -> None:
        """Update the times. At a logged step, copy the loss from the device and write the row.

        Raises:
            DivergedError: The loss is not finite, or the run has diverged.
        """
        self.wall_sec = self._resumed_wall_sec + time.perf_counter() - self._clock
        self.training_sec = self.wall_sec - self._validation_sec
        if not is_logged(trainer):
            return
        loss, overflows = module.take_logged()
        if not math.isfinite(loss):
            raise DivergedError(
                f"the training loss is {loss} at step {trainer.global_step}, with attention {module.attention}"
            )
        learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        values = {"train/loss": loss, "lr": learning_rate, "overflows": overflows, **module.observed}
        self._write(trainer, module, values)
        module.observed.clear()
        self.loss = loss
        self._write_status(trainer, module)
        self.spike.check(loss, vocab_size=module.recipe.shape.vocab_size, step=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the validation loss and its Monte Carlo error. Raises DivergedError if the loss is not finite."""
        assert isinstance(module, DiffusionLMLightningModule)
        self._validation_sec += time.perf_counter() - self._validation_began
        loss, error = module.validation_loss
        if not math.isfinite(loss):
            raise DivergedError(
                f"the validation loss is {loss} at step {trainer.global_step}, with attention {module.attention}"
            )
        self._write(trainer, module, {"val/loss": loss, "val/loss_se": error})
        self._write_status(trainer, module)

    def _write(self, trainer: L.Trainer, module: DiffusionLMLightningModule, values: dict[str, Any]) -> None:
        """Write one row with the finite values to metrics.jsonl and to every logger."""
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        numbers = {name: number for name, value in values.items() if math.isfinite(number := float(value))}
        tokens = step * module.recipe.tokens_per_step
        row = metrics_row(step=step, tokens=tokens, attempt=self.attempts, **numbers)
        patiently(self.run_dir, lambda: append_jsonl(self.run_dir / "metrics.jsonl", row))
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)

    def _write_status(
        self, trainer: L.Trainer, module: DiffusionLMLightningModule, *, phase: str | None = None
    ) -> None:
        if not trainer.is_global_zero:
            return
        tokens = trainer.global_step * module.recipe.tokens_per_step
        status = Status(
            state=State.RUNNING,
            step=trainer.global_step,
            steps=module.recipe.steps,
            attempts=self.attempts,
            steps_redone=self.steps_redone,
            loss=self.loss,
            phase=phase,
            tokens_per_sec=tokens / self.wall_sec if self.wall_sec > 0 else None,
            submission=os.environ.get("DLM_SUBMISSION"),
            gpu_hours=self.gpu_hours,
            started=self._started,
            updated=time.time(),
        )
        patiently(self.run_dir, lambda: write_status(self.run_dir, status))


def earlier_attempts(run_dir: Path, step: int) -> tuple[int, int, float]:
    """Read from status.json what the earlier attempts at a run have done.

    Args:
        run_dir: The folder of the run.
        step: The step at which this attempt starts. Later steps that the last attempt logged are computed again.

    Returns:
        The number of attempts including this one, the number of steps computed more than once, and the GPU-hours of the
        earlier attempts.
    """
    before = read_status(run_dir)
    if before is None:
        return 1, 0, 0.0
    return before.attempts + 1, before.steps_redone + max(before.step - step, 0), before.gpu_hours
