"""The files of a run directory, which training writes and all other parts of dlm read.

A run directory holds config.yaml, env.json, metrics.jsonl, status.json, lease.json, checkpoints/, LATEST,
validation.csv, result.json and wandb/.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.core.configs import load_yaml
from dlm.core.errors import UserError
from dlm.core.files import DISK_FULL, dump_json, write_atomic, write_json
from dlm.core.names import inside
from dlm.core.typed import read_typed
from dlm.record.outcomes import State


@dataclass(frozen=True, kw_only=True)
class Status:
    """The content of status.json: the last state that a run recorded."""

    state: State
    step: int
    steps: int
    attempts: int
    steps_redone: int = 0
    loss: float | None = None
    tokens_per_sec: float | None = None  # over wall time including validations, as the remaining steps will have them
    exit_code: int | None = None  # set once the attempt has ended
    reason: str | None = None
    phase: str | None = None  # what the run does instead of training, such as validating
    submission: str | None = None  # the ledger's id of the submission that started this attempt; None: started by hand
    gpu_hours: float = 0.0  # of all attempts, including lost steps; every GPU of the allocation counts, used or not
    started: float  # start of this attempt, seconds since the epoch
    updated: float  # time of the last write, seconds since the epoch


def write_status(run_dir: Path, status: Status) -> None:
    """Write status.json atomically. A full disk has no room for a second file, so it is then overwritten in place."""
    path, text = run_dir / "status.json", dump_json(dataclasses.asdict(status))
    try:
        write_atomic(path, text)
    except OSError as error:
        if error.errno not in DISK_FULL or not path.is_file():
            raise
        with open(path, "r+") as stream:
            stream.write(text)
            stream.truncate()


def read_status(run_dir: Path) -> Status | None:
    """Read the status of a run; None when status.json is missing or cannot be read."""
    try:
        return read_typed(run_dir / "status.json", Status)
    except (OSError, UserError):
        return None


def gpu_hours_used(sweep_dir: Path) -> float:
    """Return the GPU-hours that the runs of a sweep have used so far, including the runs in progress."""
    found = (read_status(path.parent) for path in sweep_dir.glob("runs/*/status.json"))
    return sum(status.gpu_hours for status in found if status is not None)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The content of result.json: the result of a run, written once after the validation at the last step."""

    cell_id: str
    step: int
    tokens: int
    loss: float  # nats/token
    loss_se: float  # Monte Carlo standard error over the noise, given the validation set
    estimator: str
    wall_sec: float  # seconds of all attempts, from the first step to the last, including the validations in between
    tokens_per_sec: float  # training throughput; the time includes checkpoints but not validations
    device: str
    num_devices: int
    gpu_hours: float  # of all attempts, as in Status
    attempts: int
    steps_redone: int
    unique_tokens: int
    epochs: float
    data_hash: str
    unigram_entropy: float  # of the validation text, nats/token; a model whose loss is not below it learnt nothing
    finished: float  # seconds since the epoch
    stopped_early: bool = False  # a callback ended the run before its planned last step; laws leave it out

    def is_of(self, cell_id: str, steps: int | None) -> bool:
        """Whether it is the result of the cell ``cell_id``, whose planned last step is ``steps`` (None: any step)."""
        return self.cell_id == cell_id and (steps in (None, self.step) or self.stopped_early)


def write_result(run_dir: Path, result: Result) -> None:
    """Write result.json atomically."""
    write_json(run_dir / "result.json", dataclasses.asdict(result))


def read_result(run_dir: Path) -> Result | None:
    """Read the result of a finished run; None when result.json is missing or cannot be read."""
    try:
        return read_typed(run_dir / "result.json", Result)
    except (OSError, UserError):
        return None


def write_validation(run_dir: Path, losses: Sequence[float], variances: Sequence[float]) -> None:
    """Write validation.csv atomically, with one row for each sequence of the validation set, in order.

    Args:
        run_dir: The run directory.
        losses: The loss of each sequence, nats/token.
        variances: The square of the Monte Carlo standard error of each loss.
    """
    rows = [f"{place},{loss!r},{math.sqrt(v)!r}" for place, (loss, v) in enumerate(zip(losses, variances, strict=True))]
    write_atomic(run_dir / "validation.csv", "\n".join(["sequence,loss,loss_se", *rows]) + "\n")


def read_validation(run_dir: Path) -> list[float]:
    """Read the loss of each validation sequence, nats/token, in order. Raises UserError when that fails."""
    return [loss for loss, _ in _validation_rows(run_dir)]


def validated_loss(run_dir: Path) -> tuple[float, float]:
    """Compute from validation.csv what result.json states: (the loss, its Monte Carlo standard error), nats/token.

    Raises UserError if the file cannot be read or has no rows.
    """
    rows = _validation_rows(run_dir)
    if not rows:
        raise UserError(f"{run_dir / 'validation.csv'} has no rows: restore it from a copy")
    return statistics.fmean(loss for loss, _ in rows), math.hypot(*(error for _, error in rows)) / len(rows)


def _validation_rows(run_dir: Path) -> list[tuple[float, float]]:
    """Return (loss, standard error) of each validation sequence, in order. Raises UserError when that fails."""
    path = run_dir / "validation.csv"
    try:
        with open(path, newline="") as stream:
            return [(float(row["loss"]), float(row["loss_se"])) for row in csv.DictReader(stream)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): give the folder of a finished run") from error


def paired_difference(first: Path | str, second: Path | str) -> tuple[float, float]:
    """Estimate the difference between the validation losses of two runs from paired sequences.

    All runs on the same data are validated on the same sequences with the same noise. The difficulty of each
    sequence cancels, so the difference is more precise than either loss.

    Args:
        first: The folder of a finished run.
        second: The folder of another finished run.

    Returns:
        (loss of ``first`` - loss of ``second``, standard error of this difference), both in nats/token. The standard
        error is that of the mean over sequences: it covers a new draw of both the sequences and the noise.

    Raises:
        UserError: A folder holds no finished run, or the two runs were not validated on the same sequences and noise.
    """
    left, right = Path(first), Path(second)
    of_left, of_right = _validated_on(left), _validated_on(right)
    for key, value in of_left.items():
        if value != of_right.get(key):
            raise UserError(
                f"{left.name} and {right.name} were validated differently: {key} is {value!r} and "
                f"{of_right.get(key)!r}, so their losses cannot be paired"
            )
    each = [a - b for a, b in zip(read_validation(left), read_validation(right), strict=True)]
    return statistics.fmean(each), statistics.stdev(each) / math.sqrt(len(each))


def _validated_on(run_dir: Path) -> dict[str, Any]:
    """Return the settings that two runs must share to have been validated on the same sequences and noise."""
    result = read_result(run_dir)
    if result is None:
        raise UserError(f"{run_dir} holds no result.json: give the folder of a finished run")
    config = load_yaml(run_dir / "config.yaml")
    keys = {f"validation.{key}": value for key, value in config["validation"].items() if key != "times"}
    rows = {f"data.{key}": config["data"][key] for key in ("block_size", "stride")}
    return {"the data's hash": result.data_hash, **rows, **keys}


def metrics_row(*, step: int, tokens: int, **values: Any) -> dict[str, Any]:
    """Make one row of metrics.jsonl: the step, the tokens so far, the time and the measured values."""
    return {"step": step, "tokens": tokens, "time": time.time(), **values}


def merge_metrics(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge logged rows into one row per step, in order of step. The later values of a repeated step count."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged[row["step"]] = {**merged.get(row["step"], {}), **row}
    return [merged[step] for step in sorted(merged)]


def run_directory(sweep_dir: Path, cell_id: str) -> Path:
    """Return the path of the run directory of a cell. Raises UserError if the id cannot be the name of a folder."""
    return inside(sweep_dir / "runs", cell_id)


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of one step."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def has_checkpoint(run_dir: Path, step: int) -> bool:
    """Return whether a run has finished writing its checkpoint of one step. The content may have been damaged since."""
    return (checkpoint_folder(run_dir, step) / "manifest.json").is_file()


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Return the steps of which a run holds a checkpoint, ascending. Damaged ones count too."""
    found = (run_dir / "checkpoints").glob("step_*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in found)


def finished(run_dir: Path, cell_id: str, steps: int | None) -> Result | None:
    """Read the result of a finished cell; None unless it is that of ``cell_id`` (``Result.is_of``)."""
    result = read_result(run_dir)
    return result if result is not None and result.is_of(cell_id, steps) else None
