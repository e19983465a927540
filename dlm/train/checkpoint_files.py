"""Seal checkpoints on disk, describe their damage, and find the newest complete checkpoint of a run.

A checkpoint is a folder checkpoints/step_00001234/ with state.ckpt and manifest.json, which holds sizes and hashes and
is written last. LATEST names the newest checkpoint for human readers; it may be out of date, so dlm finds the
newest checkpoint by searching the folders.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlm.core.errors import UserError
from dlm.core.files import write_json
from dlm.core.typed import read_typed

STATE, MANIFEST, LATEST = "state.ckpt", "manifest.json", "LATEST"
VERSION = 1  # format of the manifest


def seal(folder: Path, *, step: int) -> None:
    """Flush the files of a checkpoint to the disk, then write its manifest."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in folder.iterdir()}
    for name in files:
        with open(folder / name, "rb") as stream:
            os.fsync(stream.fileno())
    write_json(folder / MANIFEST, {"version": VERSION, "step": step, "score": None, "files": files})


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """Describe what is wrong with a checkpoint.

    Args:
        folder: A step_* folder.
        contents: Compare the hashes of the files too; if False, compare only their sizes.

    Returns:
        A phrase for a message; None if every file matches the manifest.

    Raises:
        UserError: A newer dlm wrote the checkpoint. It is not reported as damaged, because resuming from an earlier
            checkpoint would delete it.
    """
    try:
        manifest = read_seal(folder)
    except (OSError, UserError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    check_format(folder, manifest.version, readable=VERSION)
    for name, stated in manifest.files.items():
        path = folder / Path(name).name
        if not path.is_file() or path.stat().st_size != stated.bytes:
            return f"{name} is missing or has another size"
        if contents and _sha256(path) != stated.sha256:
            return f"{name} has another content"
    return None


@dataclass(frozen=True, kw_only=True)
class SealedFile:
    """One file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The manifest of a checkpoint."""

    version: int
    step: int | None = None
    score: float | None = None
    files: Mapping[str, SealedFile]


def read_seal(folder: Path) -> Seal:
    """Read the manifest of a checkpoint. Raises OSError or UserError if it is missing or damaged."""
    return read_typed(folder / MANIFEST, Seal)


def load_state(path: Path, *, device: str) -> dict[str, Any]:
    """Read a file of tensors and plain values, in PyTorch's format. No code that the file may hold is run.

    Args:
        path: The file.
        device: Where the tensors are put: 'cpu', or 'meta' for their shapes only.

    Raises:
        UserError: The file is torn, of another kind, or no dictionary.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # reading an unknown file can raise anything
        reason = " ".join(str(error).split("\n")[0].split())[:100]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): it is torn or of another kind") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint: choose another file")
    return content


def check_format(what: Path | str, number: int, *, readable: int) -> None:
    """Raise UserError if a file has format ``number``, newer than ``readable``, the newest that this dlm can read."""
    if number > readable:
        raise UserError(
            f"{what} has format {number}, this dlm reads {readable}: update dlm, or choose another checkpoint"
        )


def latest_whole(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None. Damaged checkpoints are named on standard output.

    Raises:
        UserError: A newer dlm wrote a checkpoint of the run.
    """
    for folder in sorted((run_dir / "checkpoints").glob("step_*"), reverse=True):
        reason = damage(folder)
        if reason is None:
            return folder
        print(f"dlm: checkpoint {folder.name} is damaged ({reason}), going back to an earlier one", flush=True)
    return None


def state_file(checkpoint: Path) -> Path:
    """Return the file that Lightning loads for ``ckpt_path``.

    Args:
        checkpoint: A step_* folder, or a checkpoint file of a run.

    Raises:
        UserError: The checkpoint is damaged, or the path is not a checkpoint of a run.
    """
    if checkpoint.is_dir():
        reason = damage(checkpoint)
        if reason is not None:
            raise UserError(f"ckpt_path {checkpoint}: {reason}, choose another checkpoint")
        return checkpoint / STATE
    if not checkpoint.is_file():
        raise UserError(f"ckpt_path {checkpoint} does not exist: give a step_* folder or a checkpoint file")
    try:
        ours = {"dlm", "global_step"} <= load_state(checkpoint, device="meta").keys()
    except UserError as error:
        raise UserError(f"ckpt_path {checkpoint} cannot be read as a checkpoint: give a step_* folder") from error
    if not ours:
        raise UserError(f"ckpt_path {checkpoint} is no checkpoint of a run: give a step_* folder")
    return checkpoint
