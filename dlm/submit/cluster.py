"""Define the protocol of everything that runs jobs: this machine, SLURM, or another back end.

To add a back end, write one file with a class that follows ``Cluster``, and add the class to
``dlm.submit.state.CLUSTERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from dlm.record.outcomes import OUTCOMES, State
from dlm.submit.cell_now import CellNow, JobState
from dlm.submit.job import Job, SlurmSettings
from dlm.submit.ledger import Ledger

if TYPE_CHECKING:
    import submitit


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event in the life of a job on this machine.

    A job is "started" or "ended"; it is "deferred" while another process runs its cell, and "skipped" if another
    process has finished the cell or if the cell was cancelled. It is "alone" if it starts from nothing, because its
    trunk will not write the checkpoint that it was to start from. Jobs in a queue can be "alone" too.
    """

    kind: Literal["started", "ended", "deferred", "skipped", "alone"]
    job: Job
    pid: int | None = None
    exit_code: int | None = None  # negative if a signal ended the process: -9 for SIGKILL
    wall_sec: float | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """The jobs of one submission and what they have in common."""

    submission: str  # the name of the submission in the ledger
    jobs: Sequence[Job]
    ledger: Ledger
    code: Path  # the snapshot of dlm/ and configs/ that the jobs import
    environment: Mapping[str, str]  # variables to add to the environment of every job
    live: Sequence[CellNow] = ()  # the other cells of the sweep that wait or run
    before_first: Callable[[], None] = lambda: None  # called once, before the first job is put into a queue
    on_event: Callable[[Event], None] = lambda event: None
    on_tick: Callable[[], None] = lambda: None  # called several times a second while jobs run on this machine


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The outcome of a submission for each of its cells."""

    submitted: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)  # cell id -> reason why no job was submitted
    postponed: Mapping[str, str] = field(default_factory=dict)  # cell id -> what the cell waits for before it is queued
    job_ids: Mapping[str, str] = field(default_factory=dict)  # cell id -> job id, for jobs in a queue
    jobs: Mapping[str, submitit.Job[float]] = field(default_factory=dict)  # cell id -> job, for jobs of submitit
    # For processes on this machine: cell id -> (state, reason), and cell id -> exit code (-9 for SIGKILL).
    endings: Mapping[str, tuple[State, str | None]] = field(default_factory=dict)
    exit_codes: Mapping[str, int] = field(default_factory=dict)
    interrupted: bool = False  # Ctrl-C or SIGTERM ended the submission: some cells may not have been started

    @property
    def arrays(self) -> list[str]:
        """The ids of the job arrays in the queue, in order."""
        return sorted({job_id.split("_")[0] for job_id in self.job_ids.values()}, key=lambda name: (len(name), name))

    @property
    def failed(self) -> dict[str, tuple[State, str | None]]:
        """The cells whose process on this machine failed: cell id -> (state, reason)."""
        return {name: ending for name, ending in self.endings.items() if OUTCOMES[ending[0]].is_failure}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of a cluster to a query about its jobs."""

    states: Mapping[str, JobState] = field(default_factory=dict)  # by job id; jobs unknown to the cluster are absent
    arrays: Mapping[str, str] = field(default_factory=dict)  # job name -> array id, for the names in the query
    warnings: tuple[str, ...] = ()
    silent: bool = False  # the queue did not answer: a job that is missing in ``states`` may still be queued or running


class Cluster(Protocol):
    """A back end that runs jobs.

    The methods with a body are correct for a cluster whose jobs have neither a time limit nor an id.
    """

    name: str  # the name of the cluster in the ledger
    queues: bool  # True: ``submit`` returns while jobs wait or run. False: it returns when they have ended.
    settings: SlurmSettings  # what every job requests; these values take precedence over the needs of its cell

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise UserError if the cluster is not available or cannot run one of the jobs."""

    def max_time_min(self, settings: SlurmSettings) -> int | None:
        """Return the longest time limit in minutes that a job with these settings may request; None for no limit."""
        return None

    def submit(self, request: Request) -> Submission:
        """Write the intent into the ledger, start or queue the jobs, then write their ids or endings.

        A cluster with a queue records each job array in the ledger as a submission of its own. The array is named
        ``job_name(sweep, submission)`` unless the intent says otherwise, and its task j is the j-th cell of that
        submission. Raises UserError if the cluster refuses the jobs.
        """

    def states(
        self,
        jobs: Mapping[str, str],
        *,
        names: Iterable[str] = (),
        users: Collection[int] = (),
        release: bool = False,
    ) -> Answer:
        """Query the states of queued jobs.

        Args:
            jobs: Job id -> name of the job array.
            names: The names of arrays whose ids are unknown because their submission was interrupted.
            users: The ids of the users who submitted the jobs; if empty, anybody may have submitted them.
            release: Whether to release the jobs that the cluster holds because a node failed to launch them.
        """
        return Answer()

    def cancel(self, ids: Sequence[str]) -> None:
        """Stop queued or running jobs; a job that has already ended is not an error.

        Raises UserError if the cluster refuses.
        """
