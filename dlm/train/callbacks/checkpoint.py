"""Save checkpoints of a run while it trains.

Every checkpoint is built in a folder with a temporary name, which is renamed when the checkpoint is complete. No
complete checkpoint is overwritten, and the last two are always kept. For an asynchronous checkpoint, the state is
copied to main memory at the step of the checkpoint, and a thread writes the copy while the next steps run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from dlm.core.errors import unknown
from dlm.core.files import patiently, read_json, sync_directory, temporary_beside, write_atomic, write_json
from dlm.record.run import checkpoint_folder
from dlm.train.callbacks import StepCallback, callbacks_of, evenly
from dlm.train.callbacks.preemption import Preemption
from dlm.train.checkpoint_files import LATEST, MANIFEST, STATE, damage, read_seal, seal
from dlm.train.models.lightning_module import DiffusionLMLightningModule

KEEP_LAST = 2


class Copying(TorchCheckpointIO):
    """Copies a checkpoint to main memory instead of writing it. Later steps do not change the copy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy ``checkpoint`` to the attribute ``copied``, with new tensors on the CPU and new containers."""
        self.copied = apply_to_collection(checkpoint, torch.Tensor, lambda one: one.detach().to("cpu", copy=True))


class Checkpoint(StepCallback, LightningCheckpoint):
    """Saves checkpoints evenly over the run, before every validation, at the last step and on preemption.

    The last two checkpoints and the best ``save_top_k`` are kept. In addition, a trunk saves and keeps a checkpoint at
    each of the steps ``keep_steps`` of the config of the run, from which its branches start.

    Args:
        run_dir: The folder of the run.
        times: Number of checkpoints, evenly spaced over the run.
        every_n_steps: Steps between checkpoints. If it is set, ``times`` is not used.
        asynchronous: Write checkpoints in a thread, which needs one more copy of the state in main memory. Only one
            checkpoint is written at a time. An error in the thread is raised at the next save, at the end of a
            validation or when training ends.
        save_top_k: How many of the best checkpoints to keep.
        monitor: The metric that determines which checkpoints are best.
        mode: Whether a small value of the metric is better (``min``) or a large value (``max``).
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
        if mode not in ("min", "max"):
            raise unknown("mode of the checkpoints", mode, ("min", "max"))
        self.run_dir = Path(run_dir)
        self.times, self.every_n_steps, self.save_top_k = times, every_n_steps, save_top_k
        self.monitor, self.sign = monitor, 1 if mode == "min" else -1
        self.thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self.writing: Future[None] | None = None
        self.branch_points: frozenset[Path] = frozenset()  # the folders of the checkpoints at keep_steps

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Read at which steps branches start from this run."""
        assert isinstance(module, DiffusionLMLightningModule)
        self.branch_points = frozenset(self._folder(step) for step in module.config.get("keep_steps") or ())

    def on_step_end(self, trainer: L.Trainer, module: DiffusionLMLightningModule, *, validates: bool) -> None:
        """Save a checkpoint if one is due. One is always due before a validation, so that the best model is saved."""
        every = self.every_n_steps or evenly(module.recipe.steps, self.times)
        step = trainer.global_step
        preempted = any(isinstance(other, Preemption) and other.requested for other in callbacks_of(trainer))
        is_branch_point = self._folder(step) in self.branch_points
        if step % every == 0 or validates or step == module.recipe.steps or preempted or is_branch_point:
            self._save(trainer, step)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Add the validation score to the checkpoint of this step, which was saved before the validation."""
        score = trainer.callback_metrics.get(self.monitor)
        if score is None or not trainer.is_global_zero:
            return
        self._wait()
        path = self._folder(trainer.global_step) / MANIFEST
        if path.is_file():
            write_json(path, {**read_json(path), "score": float(score)})

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Wait until the last checkpoint is complete, before the result of the run is written."""
        self._wait()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """After a failure of the run, wait until the checkpoint that is being written is complete."""
        self._wait()

    def _folder(self, step: int) -> Path:
        return checkpoint_folder(self.run_dir, step)

    def _save(self, trainer: L.Trainer, step: int) -> None:
        """Write one checkpoint, or start writing it in the thread."""
        self._wait()
        building = temporary_beside(self._folder(step))  # the path of the first process counts: Lightning broadcasts it
        if trainer.is_global_zero:
            patiently(self.run_dir, lambda: _made_anew(building))
        if self.thread is not None:
            self._save_in_thread(trainer, step, building, self.thread)
            return
        with _removed_if_unfinished(building):
            trainer.save_checkpoint(building / STATE, weights_only=False)
            if trainer.is_global_zero:
                self._finish(building, step)

    def _save_in_thread(self, trainer: L.Trainer, step: int, building: Path, thread: ThreadPoolExecutor) -> None:
        writer, copying = trainer.strategy.checkpoint_io, Copying()
        trainer.strategy.checkpoint_io = copying
        try:
            trainer.save_checkpoint(building / STATE, weights_only=False)
        finally:
            trainer.strategy.checkpoint_io = writer

        def write() -> None:
            with _removed_if_unfinished(building):
                writer.save_checkpoint(copying.copied, building / STATE)
                self._finish(building, step)

        if trainer.is_global_zero:
            self.writing = thread.submit(write)

    def _wait(self) -> None:
        """Wait until no checkpoint is being written. Raises the exception of the thread, if there is one."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _finish(self, building: Path, step: int) -> None:
        """Seal the new checkpoint, rename its folder, name it in LATEST, and delete checkpoints that are not kept."""
        seal(building, step=step)
        folder = self._folder(step)
        if folder.exists():  # damaged, from an earlier attempt: the run would have resumed from a complete one
            shutil.rmtree(folder)
        os.rename(building, folder)
        sync_directory(folder.parent)
        try:
            write_atomic(self.run_dir / LATEST, folder.name + "\n")  # only a hint
        finally:
            self._prune(folder.parent)  # on a full disk, status.json needs the space

    def _prune(self, folder: Path) -> None:
        saved = [path for path in sorted(folder.glob("step_*")) if damage(path, contents=False) is None]
        scores = {path: score for path in saved if (score := read_seal(path).score) is not None}
        scored = sorted(scores, key=lambda path: self.sign * scores[path])
        keep = {*saved[-KEEP_LAST:], *scored[: self.save_top_k], *self.branch_points}
        for path in saved:
            if path not in keep:
                shutil.rmtree(path)


def _made_anew(building: Path) -> None:
    """Make the folder of a checkpoint, and delete what killed attempts left of theirs: no other process writes now."""
    for left in building.parent.glob(".step_*"):
        shutil.rmtree(left, ignore_errors=True)
    building.mkdir(parents=True)


@contextlib.contextmanager
def _removed_if_unfinished(building: Path) -> Iterator[None]:
    """Delete a checkpoint that could not be finished: on a full disk, status.json needs the space."""
    try:
        yield
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
