"""Define what every place that runs jobs can do: this machine, SLURM, or another back end.

A further back end is one file with a class like ``Cluster``, and its line in ``dlm.submit.state.CLUSTERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from dlm.record.outcomes import OUTCOMES, State
from dlm.submit.job import Job, JobState, SlurmSettings
from dlm.submit.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job of this machine.

    A job is "started" or "ended"; "deferred" while another process runs its cell; "skipped" because another process has
    finished the cell, or because it was cancelled.
    """

    kind: Literal["started", "ended", "deferred", "skipped"]
    job: Job
    pid: int | None = None
    exit_code: int | None = None  # -9 when SIGKILL ended the process
    wall_sec: float | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """The jobs of one submission and what they have in common."""

    submission: str  # its name in the ledger
    jobs: Sequence[Job]
    ledger: Ledger
    code: Path  # the snapshot of dlm/ and configs/ that the jobs import
    environment: Mapping[str, str]  # variables to add to that of every job
    on_event: Callable[[Event], None] = lambda event: None
    on_tick: Callable[[], None] = lambda: None  # called several times a second while jobs run here


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What became of the cells that were to be submitted."""

    submitted: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)  # cell -> why no job was started
    job_ids: Mapping[str, str] = field(default_factory=dict)  # of jobs in a queue
    endings: Mapping[str, tuple[State, str | None]] = field(default_factory=dict)  # of processes here: state, reason
    exit_codes: Mapping[str, int] = field(default_factory=dict)  # of processes here; -9 for SIGKILL
    interrupted: bool = False  # by Ctrl-C or SIGTERM: some cells never started

    @property
    def failed(self) -> dict[str, tuple[State, str | None]]:
        """The endings of processes here that went wrong."""
        return {name: ending for name, ending in self.endings.items() if OUTCOMES[ending[0]].is_failure}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a cluster says when it is asked for its jobs."""

    states: Mapping[str, JobState] = field(default_factory=dict)  # by job id; a job that it does not know is absent
    arrays: Mapping[str, str] = field(default_factory=dict)  # job name -> array id, of the names that were asked for
    warnings: tuple[str, ...] = ()
    silent: bool = False  # the queue did not answer: a job that is absent may still be there


class Cluster(Protocol):
    """Where jobs run. What has a body here fits a cluster whose jobs have neither a time limit nor an id."""

    name: str  # what the ledger calls it
    queues: bool  # ``submit`` returns while the jobs wait or run; otherwise when they have ended
    settings: SlurmSettings  # what every job asks for, whatever its cell needs

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise UserError when the cluster is not there, or cannot run one of the jobs."""

    def max_time_min(self) -> int | None:
        """The longest time limit in minutes that a job may ask for; None when there is none."""
        return None

    def submit(self, request: Request) -> Submission:
        """Write the intent into the ledger, start or queue the jobs, then write their ids or endings.

        Array i of a queueing cluster is called ``job_name(sweep, submission)``, and its task j is the j-th cell of that
        submission in the ledger. Raises UserError when the cluster refuses.
        """

    def states(self, jobs: Mapping[str, str], *, names: Iterable[str] = (), release: bool = False) -> Answer:
        """The states of queued jobs.

        Args:
            jobs: Job id -> name of its array.
            names: Names of arrays whose ids are not known: those of interrupted submissions.
            release: Let jobs start that the cluster holds back because a node failed to launch them.
        """
        return Answer()

    def cancel(self, ids: Sequence[str]) -> None:
        """Stop queued jobs; one that has ended is no error. Raises UserError when the cluster refuses."""
