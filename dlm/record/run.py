"""The files of a run directory, which training writes and everything else reads.

A run directory holds config.yaml, env.json, metrics.jsonl, status.json, lease.json, checkpoints/, LATEST,
validation.csv, result.json and wandb/.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.core.configs import load_yaml
from dlm.core.errors import UserError
from dlm.core.files import write_atomic, write_json
from dlm.record.outcomes import State


@dataclass(frozen=True, kw_only=True)
class Status:
    """status.json: what a run last wrote about itself."""

    state: State
    step: int
    steps: int
    attempts: int
    steps_redone: int = 0
    loss: float | None = None
    tokens_per_sec: float | None = None  # over wall time with validations, which the remaining steps have too
    exit_code: int | None = None  # set when the attempt has ended
    reason: str | None = None
    submission: str | None = None  # the ledger's id of what started this attempt; None: started by hand
    gpu_hours: float = 0.0  # of all attempts, with the steps that were lost; all GPUs that were held count
    started: float  # seconds since the epoch, this attempt
    updated: float


def write_status(run_dir: Path, status: Status) -> None:
    """Write status.json atomically."""
    write_json(run_dir / "status.json", dataclasses.asdict(status))


def read_status(run_dir: Path) -> Status | None:
    """The status of a run; None when it is missing or cannot be read."""
    try:
        content = json.loads((run_dir / "status.json").read_text())
        return Status(**{**content, "state": State(content["state"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def gpu_hours_used(sweep_dir: Path) -> float:
    """The GPU-hours that the runs of a sweep have used so far, also those that are running now."""
    found = (read_status(path.parent) for path in sweep_dir.glob("runs/*/status.json"))
    return sum(status.gpu_hours for status in found if status is not None)


@dataclass(frozen=True, kw_only=True)
class Result:
    """result.json: the result of a run, written once after the validation at the planned last step."""

    cell_id: str
    step: int
    tokens: int
    loss: float  # nats/token
    loss_se: float  # Monte Carlo standard error over the noise, given the validation set
    estimator: str
    wall_sec: float  # of all attempts, from the first step to the last, with the validations between
    tokens_per_sec: float  # of training, with checkpoints and without validations
    device: str
    num_devices: int
    gpu_hours: float  # of all attempts, as in Status
    attempts: int
    steps_redone: int
    unique_tokens: int
    epochs: float
    data_hash: str
    unigram_entropy: float  # nats/token of the validation text: a model with a higher loss learnt nothing
    finished: float


def write_result(run_dir: Path, result: Result) -> None:
    """Write result.json atomically."""
    write_json(run_dir / "result.json", dataclasses.asdict(result))


def read_result(run_dir: Path) -> Result | None:
    """The result of a finished run; None when it is missing or cannot be read."""
    try:
        return Result(**json.loads((run_dir / "result.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_validation(run_dir: Path, losses: Sequence[float], variances: Sequence[float]) -> None:
    """Write validation.csv atomically: a row for each sequence of the validation set, in order.

    Args:
        run_dir: The run directory.
        losses: The loss of each sequence, nats/token.
        variances: The square of the Monte Carlo standard error of each loss.
    """
    rows = [f"{place},{loss!r},{math.sqrt(v)!r}" for place, (loss, v) in enumerate(zip(losses, variances, strict=True))]
    write_atomic(run_dir / "validation.csv", "\n".join(["sequence,loss,loss_se", *rows]) + "\n")


def read_validation(run_dir: Path) -> list[float]:
    """The loss of each validation sequence, nats/token, in order. Raises UserError when they cannot be read."""
    path = run_dir / "validation.csv"
    try:
        with open(path, newline="") as stream:
            return [float(row["loss"]) for row in csv.DictReader(stream)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give the folder of a finished run") from error


def paired_difference(first: Path | str, second: Path | str) -> tuple[float, float]:
    """How much higher the validation loss of one run is than that of another.

    All runs on the same data validate the same sequences with the same noise. What is hard for one run is hard for the
    other and cancels, so the difference is known better than either loss.

    Args:
        first: The folder of a finished run.
        second: The folder of another one.

    Returns:
        (loss of ``first`` - loss of ``second``, its standard error), both in nats/token. The error is that of the mean
        difference per sequence: how far the difference would vary if sequences and noise were drawn anew.

    Raises:
        UserError: A folder holds no finished run, or the two were validated on different things.
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
    """What must be equal for two runs to have been validated on the same sequences with the same noise."""
    result = read_result(run_dir)
    if result is None:
        raise UserError(f"{run_dir} holds no result.json: give the folder of a finished run")
    config = load_yaml(run_dir / "config.yaml")
    keys = {f"validation.{key}": value for key, value in config["validation"].items() if key != "times"}
    rows = {f"data.{key}": config["data"][key] for key in ("block_size", "stride")}
    return {"the data's hash": result.data_hash, **rows, **keys}


def metrics_row(*, step: int, tokens: int, **values: Any) -> dict[str, Any]:
    """One row of metrics.jsonl: the step, the tokens so far, the time and what was measured."""
    return {"step": step, "tokens": tokens, "time": time.time(), **values}


def merge_metrics(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a history, one for each step, in order. Of a repeated step the later values count."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged[row["step"]] = {**merged.get(row["step"], {}), **row}
    return [merged[step] for step in sorted(merged)]


def run_directory(sweep_dir: Path, cell_id: str) -> Path:
    """The run directory of a cell."""
    return sweep_dir / "runs" / cell_id


def finished(run_dir: Path, cell_id: str, steps: int | None) -> Result | None:
    """The result of a finished cell; None when there is none, or it is of another cell or of another last step."""
    result = read_result(run_dir)
    if result is None or result.cell_id != cell_id or steps not in (None, result.step):
        return None
    return result
