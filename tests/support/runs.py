"""Start short training runs, and read their results."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from dlm import launch
from dlm.core.files import read_jsonl
from dlm.record.run import merge_metrics
from dlm.train.callbacks.preemption import SIGNALS

DEBUG = ("experiment=debug", "logger=none", "validation.num_sequences=16")
SHORT = (*DEBUG, "training.steps=40", "data.block_size=64", "validation.draws=2")
TINY = (*DEBUG, "model=4k", "data.block_size=32", "validation.draws=2")  # two hundred steps per second
COMPUTED = ("train/loss", "val/loss", "val/loss_se", "grad_norm", "lr")  # the other columns depend on measured times


def only_run(workdir: Path, sweep: str = "adhoc") -> Path:
    """Return the folder of the only run of a sweep."""
    (folder,) = (workdir / sweep / "runs").iterdir()
    return folder


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    """Return the history of a run, one row per step."""
    return merge_metrics(read_jsonl(run_dir / "metrics.jsonl"))


def losses(run_dir: Path, names: tuple[str, ...] = COMPUTED) -> dict[int, dict[str, float]]:
    """Return the computed values of a run at each step, without those that depend on measured times."""
    return {row["step"]: {name: row[name] for name in names if name in row} for row in rows_of(run_dir)}


def wait_for(condition, *, process, seconds: float = 600) -> None:
    """Wait until ``condition`` holds. Asserts that ``process`` runs meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def launch_here(workdir: Path, *overrides: str) -> None:
    """Train in this process with the work directory ``workdir``."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}  # a run replaces them
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLM_WORKDIR", str(workdir))
        patch.setattr(sys, "argv", ["dlm.launch", *overrides])
        patch.setitem(os.environ, "HYDRA_FULL_ERROR", "1")
        assert launch.main() == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train_here(workdir: Path, *overrides: str) -> Path:
    """Train one run in this process with the work directory ``workdir``, and return the folder of the run."""
    launch_here(workdir, *overrides)
    return only_run(workdir)
