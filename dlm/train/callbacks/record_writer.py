"""record_writer: a run -> metrics.jsonl, status.json and W&B rows. The last of the monitors."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from dlm.core.errors import DivergedError
from dlm.core.files import append_jsonl
from dlm.record.outcomes import State
from dlm.record.run import Status, metrics_row, read_status, write_status
from dlm.train.callbacks import at_logged_step, at_step_end
from dlm.train.models.lightning_module import DiffusionLMLightningModule


class Spike:
    """When a run has lost what it had learnt: the mean of its last five logged losses, against the smallest before.

    It may rise by ``limit`` nats, and by half of what that smallest was below log V, which knowing nothing costs; a
    rise above both has diverged. Five, because single losses of small batches are that noisy. None never says so.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.recent: list[float] = []
        self.best = math.inf

    def check(self, loss: float, *, vocab_size: int, step: int) -> None:
        """Take in the next logged loss, nats/token. Raises DivergedError."""
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


class RecordWriter(L.Callback):
    """Writes one row per logged step and the state of the run, and ends one that diverged."""

    def __init__(self, *, run_dir: str | None = None, spike: float | None = 2.0) -> None:
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.spike = Spike(spike)
        self.wall_sec = 0.0  # of all attempts up to the last checkpoint, validations included
        self.training_sec = 0.0  # the same without validations
        self._validation_sec = 0.0
        self._resumed_wall_sec = 0.0
        self._begun = False

    def state_dict(self) -> dict[str, Any]:
        """Kept in every checkpoint."""
        times = {"wall_sec": self.wall_sec, "training_sec": self.training_sec}
        return {**times, "recent": self.spike.recent, "best": self.spike.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint that the run goes on from."""
        self._resumed_wall_sec = state_dict["wall_sec"]
        self.wall_sec = state_dict["wall_sec"]
        self.training_sec = state_dict.get("training_sec", self.wall_sec)  # older checkpoints do not tell them apart
        self._validation_sec = self.wall_sec - self.training_sec
        self.spike.recent, self.spike.best = state_dict["recent"], state_dict["best"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Count this attempt and what it has to do again."""
        self._begin(trainer, module)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """An attempt that finds all steps done, and only the last validation missing, never starts to train."""
        self._validation_began = time.perf_counter()
        if not self._begun and not trainer.sanity_checking:
            self._begin(trainer, module)

    def _begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, DiffusionLMLightningModule)
        self._begun = True
        self._started, self._clock = time.time(), time.perf_counter()
        self.attempts, self.steps_redone, self._spent = self._history(trainer.global_step)
        self._gpus = gpus_held(trainer.world_size if module.device.type == "cuda" else 0)
        self._loss: float | None = None
        self._write_status(trainer, module, State.RUNNING)

    @property
    def gpu_hours(self) -> float:
        """Of all attempts up to now, each from its first step on."""
        return self._spent + self._gpus * (time.perf_counter() - self._clock) / 3600

    def _history(self, step: int) -> tuple[int, int, float]:
        """(attempts with this one, steps redone with this resume, GPU-hours before it).

        What the last attempt logged past ``step`` is done again.
        """
        if self.run_dir is None:
            return 1, 0, 0.0
        before = read_status(self.run_dir)
        if before is None:
            return 1, 0, 0.0
        redone = max(before.step - step, 0)
        return before.attempts + 1, before.steps_redone + redone, before.gpu_hours

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At a logged step: read the loss off the device, once, and write the row."""
        assert isinstance(module, DiffusionLMLightningModule)
        if at_step_end(trainer, batch_idx):
            self.wall_sec = self._resumed_wall_sec + time.perf_counter() - self._clock
            self.training_sec = self.wall_sec - self._validation_sec
        if not at_logged_step(trainer, batch_idx):
            return
        loss = trainer.strategy.reduce(module.loss_sum / module.loss_count, reduce_op="mean").item()
        module.loss_sum.zero_()
        overflows = trainer.strategy.reduce(
            torch.tensor(float(module.overflows), device=module.device), reduce_op="sum"
        )
        module.loss_count, module.overflows = 0, 0
        if not math.isfinite(loss):
            raise DivergedError(f"the training loss is {loss} at step {trainer.global_step}")
        self._loss = loss
        learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        values = {"train/loss": loss, "lr": learning_rate, "overflows": overflows, **module.observed}
        self.write(trainer, module, values)
        module.observed.clear()
        self._write_status(trainer, module, State.RUNNING)
        self.spike.check(loss, vocab_size=module.recipe.shape.vocab_size, step=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The validation loss and its Monte Carlo error; not that of Lightning's sanity check."""
        assert isinstance(module, DiffusionLMLightningModule)
        if trainer.sanity_checking:
            return
        self._validation_sec += time.perf_counter() - self._validation_began
        loss, error = module.validation_loss
        if not math.isfinite(loss):
            raise DivergedError(f"the validation loss is {loss} at step {trainer.global_step}")
        self.write(trainer, module, {"val/loss": loss, "val/loss_se": error})

    def write(self, trainer: L.Trainer, module: DiffusionLMLightningModule, values: dict[str, Any]) -> None:
        """One row to metrics.jsonl and to every logger."""
        step = trainer.global_step
        if self.run_dir is None or not trainer.is_global_zero:
            return
        numbers = {name: number for name, value in values.items() if math.isfinite(number := float(value))}
        tokens = step * module.recipe.tokens_per_step
        row = metrics_row(step=step, tokens=tokens, attempt=self.attempts, **numbers)
        append_jsonl(self.run_dir / "metrics.jsonl", row)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)

    def _write_status(self, trainer: L.Trainer, module: DiffusionLMLightningModule, state: State) -> None:
        if self.run_dir is None or not trainer.is_global_zero:
            return
        status = Status(
            state=state,
            step=trainer.global_step,
            steps=module.recipe.steps,
            attempts=self.attempts,
            steps_redone=self.steps_redone,
            loss=self._loss,
            tokens_per_sec=self.tokens_per_sec(trainer, module),
            submission=os.environ.get("DLM_SUBMISSION"),
            gpu_hours=self.gpu_hours,
            started=self._started,
            updated=time.time(),
        )
        write_status(self.run_dir, status)

    def tokens_per_sec(self, trainer: L.Trainer, module: DiffusionLMLightningModule) -> float | None:
        """Tokens per second over all attempts, validations included as an ETA needs it; None before the first step."""
        tokens = trainer.global_step * module.recipe.tokens_per_step
        return tokens / self.wall_sec if self.wall_sec > 0 else None


def gpus_held(used: int) -> int:
    """GPUs that nobody else can have meanwhile: those of its own SLURM job, used or not; else the ``used`` ones."""
    return int(os.environ.get("DLM_GPUS_HELD", used))
