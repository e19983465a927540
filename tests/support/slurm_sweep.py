"""Submit a sweep to a real SLURM cluster, and read the state of its jobs and runs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from dlm.core.files import read_jsonl
from dlm.core.paths import PACKAGE
from dlm.record.run import merge_metrics
from dlm.submit.ledger import Ledger

SMOKE = Path(__file__).parents[2] / "sweeps" / "smoke.yaml"
SHORT, LONG = "budgets=[2e10]", "budgets=[9e10]"  # about 3 and 12 s of training on one core
CURVE = ("train/loss", "val/loss", "val/loss_se", "grad_norm", "weight_norm", "lr")

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], *, seconds: float = 240, sleep: float = 0.2) -> Found:
    """Wait until the result of ``condition`` is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, subprocess.run(["squeue"], capture_output=True, text=True).stdout
        time.sleep(sleep)
    return found


def curve(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the columns CURVE of a run's history, by step."""
    rows = merge_metrics(read_jsonl(run_dir / "metrics.jsonl"))
    return {row["step"]: {name: row[name] for name in CURVE if name in row} for row in rows}


def _is_cell(process: Path, of_sweep: set[bytes], wanted: set[bytes]) -> bool:
    """Return whether a folder of /proc is a Python process that runs dlm.launch.

    Its environment must contain all variables of ``wanted`` and at least one of ``of_sweep``.
    """
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")
        environment = set((process / "environ").read_bytes().split(b"\0"))
    except OSError:  # it ended just now
        return False
    is_launch = b"python" in command[0] and b"dlm.launch" in command  # the command line of srun contains dlm.launch too
    return is_launch and wanted <= environment and bool(of_sweep & environment)


class Sweep:
    """A sweep of the smallest model on the cluster, with the state of its jobs and runs."""

    def __init__(self, cluster, command, folder: Path) -> None:
        self.cluster, self.command, self.folder = cluster, command, folder

    def arguments(self, *settings: str, launcher: str = "", more: Sequence[str] = ()) -> list[str]:
        """Return the arguments of `dlm submit`.

        ``settings`` are keys of the definition, ``launcher`` holds keys of hydra.launcher (`a=1 b=2`), and ``more`` are
        further arguments.
        """
        small = ["models=[4k]", "tokens_per_param=[1,1e5]", f"name={self.folder.name}", *settings]
        keys = [f"hydra.launcher.{key}" for key in launcher.split()]
        return [
            "submit", str(SMOKE), "--launcher", "submitit_slurm", "--yes", "--allow-dirty",
            *(word for setting in small for word in ("--set", setting)),
            *(word for key in keys for word in ("--override", key)), *more,
        ]  # fmt: skip

    def submit(self, *settings: str, launcher: str = "", more: Sequence[str] = ()):
        """Run `dlm submit` to its end, and return its exit code and output."""
        return self.command("dlm.cli", *self.arguments(*settings, launcher=launcher, more=more))

    def start(self, *settings: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start `dlm submit` in the background."""
        return subprocess.Popen(
            [sys.executable, "-m", "dlm.cli", *self.arguments(*settings)], cwd=PACKAGE.parent,
            env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    @property
    def run_dirs(self) -> list[Path]:
        return sorted((self.folder / "runs").iterdir()) if (self.folder / "runs").is_dir() else []

    @property
    def run_dir(self) -> Path:
        """The run directory of the only cell."""
        (only,) = self.run_dirs
        return only

    @property
    def log(self) -> str:
        """The log of all attempts of the only cell."""
        return (self.run_dir / "log.txt").read_text()

    def told(self) -> str:
        """Return all that the cells and their jobs have printed, and what SLURM says of the jobs."""
        logs = [*self.folder.glob("runs/*/log.txt"), *self.folder.glob("ledger/*_log.out")]
        told = [f"{path.relative_to(self.folder)}:\n{path.read_text()}" for path in logs]
        return "\n".join(
            [*told, self.cluster("sacct", "-X", "-D", f"--name={self.job_name()}", "-S", "now-1hour", check=False)]
        )

    def trains(self) -> bool:
        """Return whether the only cell is running and has written a checkpoint."""
        return bool(self.run_dirs) and (self.run_dir / "LATEST").is_file() and (self.run_dir / "lease.json").is_file()

    def processes(self, **variables: object) -> list[int]:
        """Return the ids of the processes of this sweep's cells whose environment contains ``variables``."""
        submissions = [line["submission"] for line in read_jsonl(Ledger(self.folder).path) if line["event"] == "intent"]
        wanted = {f"{name}={value}".encode() for name, value in variables.items()}
        return [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if _is_cell(folder, {f"DLM_SUBMISSION={name}".encode() for name in submissions}, wanted)
        ]

    def status(self) -> list[dict]:
        """Return the cells that `dlm status --json` prints."""
        return json.loads(self.command("dlm.cli", "status", self.folder, "--json").out)

    @property
    def cell(self) -> dict:
        """The status of the only cell."""
        (only,) = self.status()
        return only

    def job_ids(self) -> list[str]:
        """Return the job ids of all tasks that were ever submitted."""
        lines = read_jsonl(Ledger(self.folder).path)
        return [job_id for line in lines if line["event"] == "submitted" for job_id in line["ids"].values()]

    def queued(self) -> list[str]:
        """Return the states of the sweep's tasks in the queue."""
        return self.cluster("squeue", "-h", "--array", "-o", "%T", f"--jobs={','.join(self.job_ids())}").split()

    def accounts(self, *, seconds: float = 300) -> list[tuple[str, str]]:
        """Wait until squeue and sacct show no active task, and return (state, exit code) of every task in sacct."""
        wait_for(lambda: not self.cluster("squeue", "-h", f"--name={self.job_name()}").strip(), seconds=seconds)
        return wait_for(self._ended_accounts)  # accounting lags behind the queue

    def job_name(self) -> str:
        """Return the job names of all submissions of the sweep, separated by commas as squeue expects."""
        lines = read_jsonl(Ledger(self.folder).path)
        return ",".join(line["name"] for line in lines if line["event"] == "intent")

    def _ended_accounts(self) -> list[tuple[str, str]]:
        said = self.cluster("sacct", "-X", "-n", "-P", "-o", "jobid,state,exitcode", f"--name={self.job_name()}",
                            "-S", "now-1hour").splitlines()  # fmt: skip
        mine = [tuple(row.split("|")[1:]) for row in said]
        still = any(state in ("PENDING", "RUNNING", "REQUEUED") for state, _ in mine)
        return [] if still or len(mine) < len(self.job_ids()) else mine  # a pending task of an array has no row yet
