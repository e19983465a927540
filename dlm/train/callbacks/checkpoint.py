"""Save checkpoints of a run while it trains.

Every checkpoint is built in a folder of another name and renamed when it is whole; nothing is overwritten, and the last
two are always kept. An asynchronous checkpoint is copied to main memory in the step that it belongs to, and a thread
writes it while the next steps run.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from dlm.core.files import sync_directory, write_atomic, write_json
from dlm.train.callbacks import StepCallback, callbacks_of, evenly
from dlm.train.callbacks.preemption import Preemption
from dlm.train.checkpoint_files import LATEST, MANIFEST, STATE, damage, seal
from dlm.train.models.lightning_module import DiffusionLMLightningModule

KEEP_LAST = 2


class Checkpoint(StepCallback, LightningCheckpoint):
    """Saves evenly over the run, before every validation, at the last step and on preemption.

    It keeps the last two checkpoints and the best ``save_top_k``.

    Args:
        run_dir: The folder of the run.
        times: Number of checkpoints, evenly spaced over the run.
        every_n_steps: The interval between checkpoints, instead of ``times``.
        asynchronous: Let a thread write, which takes one more copy of the state in main memory. One checkpoint is
            written at a time; an error in the thread is raised by the next save, or when training ends.
        save_top_k: How many of the best checkpoints to keep.
        monitor: The metric that says which are best.
        mode: ``min`` or ``max``: whether a small or a large value is better.
    """

    def __init__(
        self,
        *,
        run_dir: str,
        times: int = 10,
        every_n_steps: int | None = None,
        asynchronous: bool = False,
        save_top_k: int = 1,
        monitor: str = "val/loss",
        mode: str = "min",
    ) -> None:
        self.run_dir = Path(run_dir)
        self.times, self.every_n_steps, self.save_top_k = times, every_n_steps, save_top_k
        self.monitor, self.sign = monitor, 1 if mode == "min" else -1
        self.thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self.writing: Future[None] | None = None

    def on_step_end(self, trainer: L.Trainer, module: DiffusionLMLightningModule, *, validates: bool) -> None:
        """Save when this step is one to save; a validated one is, so that the best model has a checkpoint."""
        every = self.every_n_steps or evenly(module.recipe.steps, self.times)
        step = trainer.global_step
        preempted = any(isinstance(other, Preemption) and other.requested for other in callbacks_of(trainer))
        if step % every == 0 or validates or step == module.recipe.steps or preempted:
            self._save(trainer, step)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give the checkpoint of this step, which was written before its validation, its score."""
        score = trainer.callback_metrics.get(self.monitor)
        if score is None or not trainer.is_global_zero:
            return
        self._wait()
        path = self._folder(trainer.global_step) / MANIFEST
        if path.is_file():
            write_json(path, {**json.loads(path.read_text()), "score": float(score)})

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Finish the last checkpoint before anything is said about the run."""
        self._wait()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Finish the checkpoint that was being written when the run failed."""
        self._wait()

    def _folder(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"step_{step:08d}"

    def _save(self, trainer: L.Trainer, step: int) -> None:
        """Write one checkpoint, or let the thread begin to."""
        self._wait()
        state = state_of(trainer)
        if state is None:
            return
        if self.thread is None:
            self._write(state, step)
        else:  # no later step changes the copy
            copy = apply_to_collection(state, torch.Tensor, lambda one: one.detach().to("cpu", copy=True))
            self.writing = self.thread.submit(self._write, copy, step)

    def _wait(self) -> None:
        """Wait until nothing is being written. Raises what the thread raised."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, state: dict[str, Any], step: int) -> None:
        """Build a checkpoint, give it its name, point LATEST at it, and delete checkpoints that are not kept."""
        folder = self._folder(step)
        building = folder.with_name(f".{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        try:
            TorchCheckpointIO().save_checkpoint(state, building / STATE)
            seal(building, step=step)
        except BaseException:  # on a full disk, status.json needs the room that the unfinished checkpoint takes
            shutil.rmtree(building, ignore_errors=True)
            raise
        if folder.exists():  # a damaged one of an earlier attempt: a whole one would have been resumed from
            shutil.rmtree(folder)
        os.rename(building, folder)
        sync_directory(folder.parent)
        write_atomic(self.run_dir / LATEST, folder.name + "\n")
        self._prune(folder.parent)

    def _prune(self, folder: Path) -> None:
        saved = [path for path in sorted(folder.glob("step_*")) if damage(path, contents=False) is None]
        scores = {path: json.loads((path / MANIFEST).read_text())["score"] for path in saved}
        scored = sorted((path for path in saved if scores[path] is not None), key=lambda path: self.sign * scores[path])
        keep = {*saved[-KEEP_LAST:], *scored[: self.save_top_k]}
        for path in set(saved) - keep:
            shutil.rmtree(path)


class Capture(TorchCheckpointIO):
    """Keeps the state that Lightning wants to write as ``state`` and writes nothing."""

    state: dict[str, Any] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Keep ``checkpoint``."""
        self.state = checkpoint


def state_of(trainer: L.Trainer) -> dict[str, Any] | None:
    """The state of a run as Lightning would write it; None in every process but the first."""
    writer, capture = trainer.strategy.checkpoint_io, Capture()
    trainer.strategy.checkpoint_io = capture
    try:
        trainer.save_checkpoint(os.devnull, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = writer
    return capture.state
