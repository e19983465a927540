"""checkpoint: a run -> checkpoints/step_00001234/ and LATEST; and back, the newest one that is whole.

Every step has a new directory that is built under another name and renamed; its manifest with sizes and hashes is
written last; LATEST moves by rename. Nothing is overwritten, and two whole ones are always kept. An asynchronous one
is copied to the host's memory in the step that it belongs to, and written by a thread while the next steps run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
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

from dlm.core.errors import UserError
from dlm.core.files import sync_directory, write_atomic, write_json
from dlm.train.callbacks import at_step_end, callbacks_of, evenly
from dlm.train.callbacks.preemption import Preemption
from dlm.train.models.lightning_module import DiffusionLMLightningModule

STATE, MANIFEST, LATEST = "state.ckpt", "manifest.json", "LATEST"


VERSION = 1  # of the manifest


KEEP_LAST = 2


class Copying(TorchCheckpointIO):
    """In place of writing, a copy in the host's memory, which no later step changes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Keep ``checkpoint`` as ``copied``; every tensor is a new one on the CPU, every container a new one too."""
        self.copied = apply_to_collection(checkpoint, torch.Tensor, lambda one: one.detach().to("cpu", copy=True))


class Checkpoint(LightningCheckpoint):
    """Saves evenly over the run, at its last step and on preemption; keeps the last two and the best ``save_top_k``.

    ``asynchronous`` takes the writing out of the steps, for one more copy of the state in the host's memory. At most
    one is being written; what fails there is raised by the next save, and at the latest when training ends.
    """

    def __init__(
        self,
        *,
        run_dir: str | None = None,
        times: int = 10,
        every_n_steps: int | None = None,
        asynchronous: bool = False,
        save_top_k: int = 1,
        monitor: str = "val/loss",
        mode: str = "min",
    ) -> None:
        if mode not in ("min", "max"):
            raise UserError(f"callbacks.checkpoint.mode is {mode!r}: allowed are min and max")
        if not isinstance(asynchronous, bool):
            raise UserError(f"callbacks.checkpoint.asynchronous is {asynchronous!r}: allowed are true and false")
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.times, self.every_n_steps, self.save_top_k = times, every_n_steps, save_top_k
        self.monitor, self.sign = monitor, 1 if mode == "min" else -1
        self.thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self.writing: Future[None] | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when this step is one to save."""
        assert isinstance(module, DiffusionLMLightningModule)
        if self.run_dir is None or not at_step_end(trainer, batch_idx):
            return
        every = self.every_n_steps or evenly(module.recipe.steps, self.times)
        step = trainer.global_step
        preempted = any(isinstance(other, Preemption) and other.requested for other in callbacks_of(trainer))
        validated = (batch_idx + 1) % int(trainer.val_check_batch or 1) == 0  # so that the best has a checkpoint
        if step % every == 0 or validated or step == module.recipe.steps or preempted:
            self.save(trainer, self.run_dir, step)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give the checkpoint of this step, which was written before its validation, its score."""
        score = trainer.callback_metrics.get(self.monitor)
        if self.run_dir is None or score is None or not trainer.is_global_zero:
            return
        self.wait()
        path = self.run_dir / "checkpoints" / f"step_{trainer.global_step:08d}" / MANIFEST
        if path.is_file():
            write_json(path, {**json.loads(path.read_text()), "score": float(score)})

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The last one stands before anything is said about the run."""
        self.wait()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """What the run had saved before it failed is kept."""
        self.wait()

    def save(self, trainer: L.Trainer, run_dir: Path, step: int) -> None:
        """Write one checkpoint, or begin to."""
        self.wait()
        folder = run_dir / "checkpoints" / f"step_{step:08d}"
        building = folder.with_name(f".{folder.name}.building")
        if trainer.is_global_zero:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
        if self.thread is None:
            with _removed_if_unfinished(building):
                trainer.save_checkpoint(building / STATE, weights_only=False)
                if trainer.is_global_zero:
                    self._finish(building, folder, step)
            return
        writer, copying = trainer.strategy.checkpoint_io, Copying()
        trainer.strategy.checkpoint_io = copying
        try:
            trainer.save_checkpoint(building / STATE, weights_only=False)
        finally:
            trainer.strategy.checkpoint_io = writer

        def write() -> None:
            with _removed_if_unfinished(building):
                writer.save_checkpoint(copying.copied, building / STATE)
                self._finish(building, folder, step)

        if trainer.is_global_zero:
            self.writing = self.thread.submit(write)

    def wait(self) -> None:
        """Until nothing is being written. Raises what the writing raised."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _finish(self, building: Path, folder: Path, step: int) -> None:
        """Seal what was built, point LATEST at it, drop what is no longer kept."""
        _seal(building, step=step)
        if folder.exists():  # left by an earlier attempt and not whole, or the resume would have begun there
            shutil.rmtree(folder)
        os.rename(building, folder)
        sync_directory(folder.parent)
        write_atomic(folder.parent.parent / LATEST, folder.name + "\n")
        self._prune(folder.parent)

    def _prune(self, folder: Path) -> None:
        saved = [path for path in sorted(folder.glob("step_*")) if damage(path, contents=False) is None]
        scores = {path: json.loads((path / MANIFEST).read_text())["score"] for path in saved}
        scored = sorted((path for path in saved if scores[path] is not None), key=lambda path: self.sign * scores[path])
        keep = {*saved[-KEEP_LAST:], *scored[: self.save_top_k]}
        for path in saved:
            if path not in keep:
                shutil.rmtree(path)


@contextlib.contextmanager
def _removed_if_unfinished(building: Path) -> Iterator[None]:
    """On a full disk the room that it takes is the room in which the run can say so."""
    try:
        yield
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _seal(folder: Path, *, step: int) -> None:
    """Flush the files and write the manifest, last."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in folder.iterdir()}
    for name in files:
        handle = os.open(folder / name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    write_json(folder / MANIFEST, {"version": VERSION, "step": step, "score": None, "files": files})


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as its manifest says; sizes only, or hashes too.

    Raises UserError for one that a newer dlm wrote: it is whole, and going back to an earlier one would delete it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = int(manifest["version"]), manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if version > VERSION:
        raise UserError(
            f"{folder} has format {version}, this dlm reads {VERSION}: update dlm, or choose another checkpoint"
        )
    for name, stated in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != stated["bytes"]:
            return f"{name} is missing or has another size"
        if contents and _sha256(path) != stated["sha256"]:
            return f"{name} has another content"
    return None


def latest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is whole, or None; LATEST is only a hint, since it may be torn.

    Raises UserError where a newer dlm wrote it.
    """
    for folder in sorted((run_dir / "checkpoints").glob("step_*"), reverse=True):
        reason = damage(folder)
        if reason is None:
            return folder
        print(f"dlm: checkpoint {folder.name} is damaged ({reason}), going back to an earlier one", flush=True)
    return None


def state_file(checkpoint: Path) -> Path:
    """The file to load for ``ckpt_path``: a step_* folder, or a checkpoint file. Raises UserError."""
    if checkpoint.is_dir():
        reason = damage(checkpoint)
        if reason is not None:
            raise UserError(f"ckpt_path {checkpoint}: {reason}, choose another checkpoint")
        return checkpoint / STATE
    if not checkpoint.is_file():
        raise UserError(f"ckpt_path {checkpoint} does not exist: give a step_* folder or a checkpoint file")
    try:
        ours = {"dlm", "global_step"} <= torch.load(checkpoint, map_location="meta", weights_only=True).keys()
    except Exception as error:  # whatever unpickling a stranger's file raises
        raise UserError(f"ckpt_path {checkpoint} cannot be read as a checkpoint: give a step_* folder") from error
    if not ours:
        raise UserError(f"ckpt_path {checkpoint} is no checkpoint of a run: give a step_* folder")
    return checkpoint
