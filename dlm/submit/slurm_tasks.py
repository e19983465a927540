"""Parse the output of squeue, sacct and sinfo."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dlm.record.outcomes import State
from dlm.submit.cell_now import JobState

QUEUE_COLUMNS = "JobArrayID:|,State:|,exit_code:|,Reason:|,Name:|"  # squeue --Format
ACCOUNT_COLUMNS = "JobID,State,ExitCode,Reason,JobName"  # sacct --format
CANNOT_START = 53  # the "signal" reported for a job that slurmd could not set up (observed with SLURM 22.05)

_QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_SUSPENDED = ("STOPPED", "SUSPENDED")
_STARTED = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", *_SUSPENDED)
# Job state in SLURM -> state of the cell. Any state that is not listed, such as FAILED, means that the job has ended
# for a reason that SLURM does not know. States of ended jobs describe only how the job ended; what the cell achieved is
# recorded in the run directory.
_STATES = {
    **dict.fromkeys(_QUEUED, State.SUBMITTED),
    **dict.fromkeys(_STARTED, State.RUNNING),
    **dict.fromkeys(("CANCELLED", "REVOKED"), State.CANCELLED),
    **dict.fromkeys(("PREEMPTED", "TIMEOUT", "DEADLINE"), State.PREEMPTED),
    "OUT_OF_MEMORY": State.OUT_OF_MEMORY,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a job array as listed by squeue or sacct."""

    task_id: str  # for instance 1001_3
    word: str  # the state in SLURM: RUNNING, FAILED, ...
    name: str | None = None  # the name of the job array
    exit_code: int | None = None
    signal: int | None = None  # the signal that ended the task
    reason: str | None = None

    @property
    def is_accepted(self) -> bool:
        """Whether SLURM accepted the job; SLURM also keeps records of jobs that it refused."""
        return (self.word, self.reason) != ("FAILED", "BadConstraints")

    @property
    def is_held(self) -> bool:
        """Whether SLURM holds the job until it is released, after a node failed to start it (wording of 22.05)."""
        return self.word == "PENDING" and "requeued held" in (self.reason or "")

    @property
    def job_state(self) -> JobState:
        """The state of the job, in the form that all clusters share."""
        words = f"SLURM says {self}"
        state = _STATES.get(self.word, State.LOST)
        could_not_start = self.signal == CANNOT_START and self.word not in _QUEUED + _STARTED
        if could_not_start:
            words += ", so it could not start or could not write its log: do the nodes see the workdir?"
        return JobState(
            state=State.LOST if could_not_start else state,
            words=words,
            exit_code=None if self.signal else self.exit_code,
            has_failed=self.word == "FAILED",
            is_host_oom=self.word == "OUT_OF_MEMORY",
            is_suspended=self.word in _SUSPENDED,
            could_not_start=could_not_start,
        )

    def __str__(self) -> str:
        why = "" if self.reason in (None, "None", "", "NonZeroExitCode") else f" ({self.reason})"
        codes = f" {self.exit_code}:{self.signal}" if self.exit_code or self.signal else ""
        return f"{self.word}{codes}{why}"


def parse_tasks(text: str) -> Iterator[Task]:
    """Parse lines `id|state|exit code|reason|array name`, and yield every task of a range of waiting tasks separately.

    sacct prints an exit code as code:signal; squeue prints it in the encoding of wait(2), 256 code + signal.
    """
    for line in text.splitlines():
        task_id, word, codes, reason, name = [*(part.strip() for part in line.split("|")), "", "", "", ""][:5]
        if not word:
            continue
        code, colon, number = codes.partition(":")
        if code and not colon:
            code, number = str(int(code) >> 8), str(int(code) & 0x7F)
        killed = int(number) if number else None
        for one in expand_task(task_id):
            yield Task(
                task_id=one,
                word=word.split()[0].rstrip("+"),  # the first word of "CANCELLED by 1000"
                name=name or None,
                exit_code=(0 if killed else int(code)) if code else None,
                signal=killed,
                reason=reason or None,
            )


def expand_task(task_id: str) -> Iterator[str]:
    """Yield the tasks of a range, 1001_[0-2,7%4] -> 1001_0, 1001_1, 1001_2, 1001_7; yield any other id unchanged."""
    match = re.fullmatch(r"(\d+)_\[([\d,\-:]+)(?:%\d+)?\]", task_id)
    if match is None:
        yield task_id
        return
    for part in match[2].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        for index in range(int(first), int(last or first) + 1, int(step or 1)):
            yield f"{match[1]}_{index}"


def minutes(limit: str) -> int | None:
    """Convert a time limit, [days-]hours:minutes:seconds or minutes:seconds, to minutes without the seconds.

    Returns None for anything else, such as "infinite".
    """
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())
    if match is None:
        return None
    days, hours, mins, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + mins
