"""cluster: what a job is and needs, and sbatch, squeue, sacct and scancel behind one small class.

Called by the submission core and status. ``sbatch`` writes the scripts; ``pool`` runs jobs on this machine.
"""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dlm.errors import UserError, unknown
from dlm.record import State

LAUNCHER_CONFIG = "configs/hydra/launcher/submitit_slurm.yaml"
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
)  # cpus_per_task goes in each
COMMAND_TIMEOUT_SEC = 60.0  # a busy slurmctld answers late


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job needs. Jobs with equal Resources share an array: a resource class."""

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    mem_gib: int | None = None  # host memory of a node; None leaves it to the cluster
    time_min: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One `python -m dlm.launch <overrides>` and the directory that it runs in."""

    name: str  # the cell id
    overrides: tuple[str, ...]
    run_dir: Path
    resources: Resources = Resources()


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """The keys of configs/hydra/launcher/submitit_slurm.yaml; None leaves a thing to the plan or the cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None  # instead of --gpus-per-node, where a site wants it
    comment: str | None = None
    nodes: int | None = None
    tasks_per_node: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    timeout_min: int | None = None
    array_parallelism: int = 256  # tasks of one array that run at once
    max_array_size: int = 1000  # tasks in one array (MaxArraySize of slurm.conf, less one)
    signal_delay_s: int = 90  # USR1 this long before the time limit: time to write a checkpoint
    requeue: bool = True
    stderr_to_stdout: bool = True
    additional_parameters: Mapping[str, Any] = field(default_factory=dict)
    setup: Sequence[str] = ()  # shell lines before srun: module load, source activate
    wait: bool = True  # only for `-m`: return when every job has ended
    poll_sec: float = 15.0  # only for `-m`: how often squeue and sacct are asked

    def __post_init__(self) -> None:
        for key in ("array_parallelism", "max_array_size"):
            if getattr(self, key) < 1:
                raise UserError(
                    f"hydra.launcher.{key} is {getattr(self, key)}: it must be 1 or more ({LAUNCHER_CONFIG})"
                )


def slurm_settings(values: Mapping[str, Any]) -> SlurmSettings:
    """SlurmSettings from plain values (a YAML file, overrides); an unknown key is a UserError."""
    allowed = [item.name for item in fields(SlurmSettings)]
    for key in values:
        if key not in (*allowed, "_target_"):
            raise unknown("key of hydra.launcher", key, allowed)
    known = {key: values[key] for key in allowed if key in values}
    known["setup"] = tuple(known.get("setup") or ())
    known["additional_parameters"] = dict(known.get("additional_parameters") or {})
    return SlurmSettings(**known)


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """What SLURM knows of one task: its word (RUNNING, FAILED, ...), exit code and the signal that ended it."""

    word: str
    exit_code: int | None = None
    signal: int | None = None


# SLURM's words -> ours; a final one only says how the task ended, the run directory says what it achieved.
_LIVE = {
    "PENDING": State.SUBMITTED,
    "CONFIGURING": State.SUBMITTED,
    "REQUEUED": State.SUBMITTED,
    "REQUEUE_FED": State.SUBMITTED,
    "REQUEUE_HOLD": State.SUBMITTED,
    "RESV_DEL_HOLD": State.SUBMITTED,
    "SPECIAL_EXIT": State.SUBMITTED,
    "RUNNING": State.RUNNING,
    "COMPLETING": State.RUNNING,
    "STAGE_OUT": State.RUNNING,
    "SIGNALING": State.RUNNING,
    "RESIZING": State.RUNNING,
    "STOPPED": State.RUNNING,
    "SUSPENDED": State.RUNNING,
}
_ENDED = {
    "CANCELLED": State.CANCELLED,
    "REVOKED": State.CANCELLED,
    "PREEMPTED": State.PREEMPTED,
    "TIMEOUT": State.PREEMPTED,
    "DEADLINE": State.PREEMPTED,
    "OUT_OF_MEMORY": State.OUT_OF_MEMORY,
}


def live_state(task: TaskState | None) -> State | None:
    """SUBMITTED or RUNNING while SLURM has the task, else None."""
    return _LIVE.get(task.word) if task is not None else None


def ended_state(task: TaskState) -> State:
    """What a task that ended without a last word of its own became: LOST unless SLURM knows better."""
    return _ENDED.get(task.word, State.LOST)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What squeue and sacct said; ``silent`` when squeue did not answer, so that absence means nothing."""

    states: Mapping[str, TaskState] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    silent: bool = False


class Slurm:
    """The cluster that sbatch talks to."""

    def __init__(self, settings: SlurmSettings | None = None) -> None:
        self.settings = settings or SlurmSettings()

    def sbatch(self, script: Path) -> str:
        """Submit ``script``; the array's job id. Raises UserError with SLURM's own words when it refuses."""
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not on PATH: run this on a login node, or choose LAUNCHER=submitit_local")
        done = _run(["sbatch", "--parsable", str(script)])
        if done.returncode:
            words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise UserError(f"sbatch refused {script}: {words} (change hydra.launcher.* or {LAUNCHER_CONFIG})")
        return done.stdout.strip().split(";")[0]

    def states(self, ids: Iterable[str]) -> Answer:
        """The states of tasks (ids such as 1001_3), by one squeue and one sacct.

        squeue knows what is queued and running, sacct what has ended; an id that neither knows is absent.
        """
        wanted = set(ids)
        if not wanted:
            return Answer()
        roots = ",".join(sorted({task.split("_")[0] for task in wanted}))
        account = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode"]
        queue = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%T"]
        ended, no_account = _ask([*account, f"--jobs={roots}"])
        live, no_queue = _ask(queue)
        states = {**dict(ended), **dict(live)}  # the queue has the last word
        return Answer(
            states={task: state for task, state in states.items() if task in wanted},
            warnings=tuple(filter(None, (no_account, no_queue))),
            silent=no_queue is not None,
        )

    def cancel(self, ids: Sequence[str]) -> None:
        """scancel; a task that has ended is no error. Raises UserError with SLURM's own words otherwise."""
        if not ids:
            return
        done = _run(["scancel", *ids])
        if done.returncode:
            raise UserError(f"scancel failed: {' '.join(done.stderr.split())}")


def slurm_answers(timeout_sec: float = 5.0) -> bool:
    """Whether sbatch exists and a controller says UP: what LAUNCHER=auto goes by."""
    if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
        return False
    try:
        done = _run(["scontrol", "ping"], timeout_sec=timeout_sec)
    except UserError:  # no answer in time is an answer: not up
        return False
    return re.search(r"\bUP\b", done.stdout) is not None


def _run(command: list[str], timeout_sec: float = COMMAND_TIMEOUT_SEC) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_sec, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} did not answer within {timeout_sec:g} s: try again later") from error


def _ask(command: list[str]) -> tuple[list[tuple[str, TaskState]], str | None]:
    """(rows, warning) of squeue or sacct: a command that is down costs its knowledge, not the whole answer."""
    if shutil.which(command[0]) is None:
        return [], f"{command[0]} is not on PATH"
    try:
        done = _run(command)
    except UserError as error:
        return [], str(error)
    if done.returncode:
        return [], f"{command[0]} failed: {' '.join(done.stderr.split())}"
    return list(parse_states(done.stdout)), None


def parse_states(text: str) -> Iterator[tuple[str, TaskState]]:
    """(task id, state) of each line `id|state[|code:signal]` of squeue or sacct, pending ranges expanded."""
    for line in text.splitlines():
        task, _, rest = line.strip().partition("|")
        word, _, codes = rest.partition("|")
        if not word:
            continue
        code, _, number = codes.partition(":")
        state = TaskState(
            word=word.split()[0].rstrip("+"),  # "CANCELLED by 1000"
            exit_code=int(code) if code else None,
            signal=int(number) if number else None,
        )
        for one in expand_task(task):
            yield one, state


def expand_task(task: str) -> Iterator[str]:
    """1001_[0-2,7%4] -> 1001_0, 1001_1, 1001_2, 1001_7; any other id as it is."""
    match = re.fullmatch(r"(\d+)_\[([\d,\-:]+)(?:%\d+)?\]", task)
    if match is None:
        yield task
        return
    for part in match[2].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        for index in range(int(first), int(last or first) + 1, int(step or 1)):
            yield f"{match[1]}_{index}"
