"""cluster: what a job is and needs, and sbatch, squeue, sacct and scancel behind one small class.

Called by the submission core and status. ``sbatch`` writes the scripts; ``pool`` runs jobs on this machine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlm.core.errors import UserError
from dlm.record.outcomes import State
from dlm.submit.job import LAUNCHER_CONFIG, SlurmSettings

ANSWER_TIMEOUT_SEC = 30.0  # squeue and sacct: a status can do without


COMMAND_TIMEOUT_SEC = 60.0  # a busy slurmctld answers late


LONGEST_ARGUMENT = 100_000  # characters; Linux takes 128 KiB


LOOK_BACK = "30days"  # how old a submission that was cut off may be and still be looked up


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
