"""cluster: what a job is and needs, and sbatch, squeue, sacct and scancel behind one small class.

Called by the submission core and status. ``sbatch`` writes the scripts; ``pool`` runs jobs on this machine.
"""

from __future__ import annotations

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
ANSWER_TIMEOUT_SEC = 30.0  # squeue and sacct: a status can do without
COMMAND_TIMEOUT_SEC = 60.0  # a busy slurmctld answers late
LONGEST_ARGUMENT = 100_000  # characters; Linux takes 128 KiB
LOOK_BACK = "30days"  # how old a submission that was cut off may be and still be looked up


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
    micro_batch: int | None = None  # what its overrides ask for after it ran out of memory


_WHOLE = {
    **dict.fromkeys(("nodes", "tasks_per_node", "cpus_per_task", "mem_gb", "timeout_min"), 1),
    **dict.fromkeys(("array_parallelism", "max_array_size", "sbatch_per_min"), 1),
    **dict.fromkeys(("gpus_per_node", "signal_delay_s"), 0),
}


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
    sbatch_per_min: int | None = 60  # submissions in a minute, at most: a site's limit, or its good manners
    signal_delay_s: int = 90  # USR1 this long before the time limit: time to write a checkpoint
    allow_dirty: bool = False  # submit code that differs from the last commit
    requeue: bool = True
    stderr_to_stdout: bool = True
    additional_parameters: Mapping[str, Any] = field(default_factory=dict)
    setup: Sequence[str] = ()  # shell lines before srun: module load, source activate
    wait: bool = True  # only for `-m`: return when every job has ended
    poll_sec: float = 15.0  # only for `-m`: how often squeue and sacct are asked

    def __post_init__(self) -> None:
        for key, low in _WHOLE.items():
            value = getattr(self, key)
            if value is not None and not (isinstance(value, int) and value >= low):
                raise UserError(
                    f"hydra.launcher.{key} is {value}: it must be a whole number, {low} or more ({LAUNCHER_CONFIG})"
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
    """What SLURM knows of one task: its word (RUNNING, FAILED, ...), exit code, the signal that ended it, and why."""

    word: str
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None

    @property
    def held_after_launch_failure(self) -> bool:
        """A node failed to start it, and SLURM holds what it requeued until somebody releases it (22.05's words)."""
        return self.word == "PENDING" and "requeued held" in (self.reason or "")

    def __str__(self) -> str:
        why = "" if self.reason in (None, "None", "", "NonZeroExitCode") else f" ({self.reason})"
        codes = f" {self.exit_code}:{self.signal}" if self.exit_code or self.signal else ""
        return f"{self.word}{codes}{why}"


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
    arrays: Mapping[str, str] = field(default_factory=dict)  # job name -> array id, of the names asked for
    warnings: tuple[str, ...] = ()
    silent: bool = False


def job_name(sweep: str, submission: str) -> str:
    """What an array is called in SLURM: unique, so that a submission that was cut off can be found by it."""
    return f"{sweep}-{submission}"


QUEUE_COLUMNS = "JobArrayID:|,State:|,exit_code:|,Reason:|,Name:|"
ACCOUNT_COLUMNS = "JobID,State,ExitCode,Reason,JobName"


class Slurm:
    """The cluster that sbatch talks to."""

    def __init__(self, settings: SlurmSettings | None = None) -> None:
        self.settings = settings or SlurmSettings()

    def check_there(self) -> None:
        """Raise UserError where there is no sbatch."""
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not on PATH: run this on a login node, or choose LAUNCHER=submitit_local")

    def sbatch(self, script: Path) -> str:
        """Submit ``script``; the array's job id. Raises UserError with SLURM's own words when it refuses."""
        done = _run(["sbatch", "--parsable", str(script)])
        if done.returncode:
            words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            if re.search("configuration source|contact slurm controller", words):
                raise UserError(f"sbatch finds no SLURM controller: {words} (SLURM_CONF says where one is)")
            raise UserError(f"sbatch refused {script}: {words} (change {key_behind(words)}, see {LAUNCHER_CONFIG})")
        return done.stdout.strip().split(";")[0]

    def states(self, jobs: Mapping[str, str], *, names: Iterable[str] = ()) -> Answer:
        """The states of tasks (id such as 1001_3 -> name of its job), and the arrays of these job names.

        By one squeue and one sacct. squeue knows what is queued and running and, for some minutes, what has ended;
        sacct what has ended; an id that neither knows is absent. Names are asked for too: numbers begin anew with a new
        controller, and a sweep's jobs may be another user's.
        """
        looked_up = set(names)
        all_names = looked_up | set(jobs.values())
        if not all_names:
            return Answer()
        account = ["sacct", "--noheader", "--parsable2", "--allocations", "--allusers", f"--format={ACCOUNT_COLUMNS}"]
        roots = ",".join(sorted({task.split("_")[0] for task in jobs}))
        ended, no_account = _ask([*account, f"--jobs={roots}"]) if jobs else ([], None)
        if looked_up:
            found, no_account = _ask(
                [*account, f"--name={','.join(sorted(looked_up))}", f"--starttime=now-{LOOK_BACK}"]
            )
            ended += found
        joined = f"--name={','.join(sorted(all_names))}"
        queue = ["squeue", "--noheader", "--array", "--states=all", f"--Format={QUEUE_COLUMNS}"]
        live, no_queue = _ask([*queue, joined] if len(joined) < LONGEST_ARGUMENT else queue)
        if no_queue is None:  # what the queue does not hold is not live, whatever accounting believes
            ended = [row for row in ended if live_state(row.state) is None]
        rows = {row.task: row for row in (*ended, *live) if row.name in all_names}  # the queue has the last word
        return Answer(
            states={task: row.state for task, row in rows.items()},
            arrays={row.name: row.task.split("_")[0] for row in rows.values() if row.name in looked_up and row.stands},
            warnings=tuple(filter(None, (no_account, no_queue))),
            silent=no_queue is not None,
        )

    def max_array_size(self) -> int:
        """Tasks in one array: what the settings say, and no more than MaxArraySize where the controller tells it."""
        said = _run(["scontrol", "show", "config"]).stdout if shutil.which("scontrol") else ""
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", said)
        return min(self.settings.max_array_size, int(found[1])) if found else self.settings.max_array_size

    def max_time_min(self) -> int | None:
        """The longest time limit of the partition (of the shortest of several); None where none is known."""
        if shutil.which("sinfo") is None:
            return None
        chosen = self.settings.partition
        only = [] if chosen is None else [f"--partition={chosen}"]
        rows = [line.split("|") for line in _run(["sinfo", "--noheader", "--format=%P|%l", *only]).stdout.splitlines()]
        limits = [minutes(row[1]) for row in rows if len(row) == 2 and (chosen or row[0].endswith("*"))]
        return min((limit for limit in limits if limit is not None), default=None)

    def release(self, ids: Sequence[str]) -> None:
        """Let tasks start that SLURM has put on hold. Raises UserError with SLURM's own words."""
        for task in ids:
            done = _run(["scontrol", "release", task])
            if done.returncode:
                raise UserError(f"scontrol release {task} failed: {' '.join(done.stderr.split())}")

    def cancel(self, ids: Sequence[str]) -> None:
        """scancel; a task that has ended is no error. Raises UserError with SLURM's own words otherwise."""
        if not ids:
            return
        for start in range(0, len(ids), 500):
            done = _run(["scancel", *ids[start : start + 500]])
            if done.returncode:
                raise UserError(f"scancel failed: {' '.join(done.stderr.split())}")


def minutes(limit: str) -> int | None:
    """SLURM's [days-]hours:minutes:seconds, or minutes:seconds, in minutes; None for infinite and what is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())
    if match is None:
        return None
    days, hours, mins, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + mins


# What sbatch says -> the keys of hydra.launcher that asked for it (SLURM 22.05's own words, tried).
_BEHIND = (
    ("policy", ("qos", "account", "max_array_size", "timeout_min")),
    ("account", ("account", "partition")),
    ("partition", ("partition",)),
    ("time limit|--time", ("timeout_min",)),
    ("qos", ("qos",)),
    ("feature|constraint", ("constraint",)),
    ("memory", ("mem_gb",)),
    ("array", ("max_array_size",)),
    ("generic resource|gres", ("gres", "gpus_per_node")),
    ("node configuration|cpu count|processors", ("gpus_per_node", "cpus_per_task", "nodes", "mem_gb", "partition")),
    ("node name", ("exclude",)),
    ("reservation|option", ("additional_parameters",)),
)


def key_behind(words: str) -> str:
    """The launcher's keys that can have led to a refusal of sbatch."""
    for pattern, keys in _BEHIND:
        if re.search(pattern, words, re.IGNORECASE):
            return " or ".join(f"hydra.launcher.{key}" for key in keys)
    return "hydra.launcher.*"


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


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One task in the answer of squeue or sacct."""

    task: str
    state: TaskState
    name: str | None = None  # of the job

    @property
    def stands(self) -> bool:
        """Whether SLURM took the job; it also keeps a record of one that it has refused."""
        return (self.state.word, self.state.reason) != ("FAILED", "BadConstraints")


def _ask(command: list[str]) -> tuple[list[TaskRow], str | None]:
    """(rows, warning) of squeue or sacct: a command that is down costs its knowledge, not the whole answer."""
    if shutil.which(command[0]) is None:
        return [], f"{command[0]} is not on PATH"
    try:
        done = _run(command, timeout_sec=ANSWER_TIMEOUT_SEC)
    except UserError as error:
        return [], str(error)
    if done.returncode:
        return [], f"{command[0]} failed: {' '.join(done.stderr.split())}"
    return list(parse_tasks(done.stdout)), None


def parse_tasks(text: str) -> Iterator[TaskRow]:
    """The tasks in lines `id|state|exit code|reason|job name`, pending ranges expanded.

    sacct writes an exit code as code:signal, squeue as wait(2) does: 256 code + signal.
    """
    for line in text.splitlines():
        task, word, codes, reason, name = [*(part.strip() for part in line.split("|")), "", "", "", ""][:5]
        if not word:
            continue
        code, colon, number = codes.partition(":")
        if code and not colon:
            code, number = str(int(code) >> 8), str(int(code) & 0x7F)
        killed = int(number) if number else None
        state = TaskState(
            word=word.split()[0].rstrip("+"),  # "CANCELLED by 1000"
            exit_code=(0 if killed else int(code)) if code else None,
            signal=killed,
            reason=reason or None,
        )
        for one in expand_task(task):
            yield TaskRow(task=one, state=state, name=name or None)


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
