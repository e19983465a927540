"""Hold what is known of one cell: its record in the ledger, the state of its job, and the state that follows."""

from __future__ import annotations

from dataclasses import dataclass

from dlm.record.outcomes import State
from dlm.record.run import Result, Status

LOCAL = "local"  # the name of the cluster whose jobs are processes on this machine, which have no job ids


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of one job as the cluster reports it."""

    state: State  # SUBMITTED or RUNNING while the job waits or runs, otherwise the state in which it ended
    words: str  # the state in the cluster's own words, for the user: "SLURM says PENDING (Priority)"
    exit_code: int | None = None  # None while the job runs, and if a signal ended it
    has_failed: bool = False  # the job ended by itself, with an error; the exit code, if known, indicates the cause
    is_host_oom: bool = False  # the cluster killed the job because it used too much host memory
    is_suspended: bool = False  # the cluster has stopped its processes, and will let them go on
    could_not_start: bool = False  # its node could not start it, or could not write its log

    @property
    def is_live(self) -> bool:
        """Whether the job waits or runs."""
        return self.state in (State.SUBMITTED, State.RUNNING)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a process of a cell ended, as recorded by its parent process."""

    state: State
    reason: str | None
    time: float


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """The record of one cell in the ledger.

    ``submissions``, ``failures``, ``failed_at``, ``micro_batch`` and ``before`` accumulate over all submissions of the
    cell; the other fields describe the latest submission.
    """

    submissions: int = 0  # the number of submissions
    submission: str | None = None  # the name of the latest submission; None if there is none or it was refused
    place: int = 0  # the index of the cell in its submission, which is the number of its task in the job array
    cluster: str = LOCAL
    job_id: str | None = None  # the id of its job in the queue of the cluster
    array_name: str | None = None  # the name of its job array in the cluster; None in ledgers that do not say it
    logs: str | None = None  # the folder of the log of its batch script; None: the ledger's
    at_once: int | None = None  # how many tasks of its array may run at once; None: not recorded
    gpus: int | None = None  # the number of its GPUs on all nodes; None: not recorded
    user: int | None = None  # the id of the user who submitted it; None in ledgers that do not say it
    cancelled: str | None = None  # the reason why the cell must not run
    ending: Ending | None = None
    failures: int = 0  # consecutive submissions of the failed cell without progress since the previous failure
    failed_at: int = -1  # the furthest step at which the cell has failed
    micro_batch: int | None = None  # the smaller micro-batch that was chosen after the cell ran out of memory
    before: str | None = None  # the state and reason of the last failure after which the cell was started again
    previous: CellRecord | None = None  # the record before the latest submission, which counts again if that is refused

    @property
    def waits_here(self) -> bool:
        """Whether the cell is still to be run by the `dlm sweep` or `dlm submit` that submitted it on this machine.

        That process may have died since.
        """
        here = self.submission is not None and self.cluster == LOCAL
        return here and self.cancelled is None and self.ending is None

    @property
    def unconfirmed(self) -> bool:
        """Whether the ledger holds the intent of a submission to a queue but not its outcome.

        The submitting process has died or is still busy.
        """
        return self.cluster != LOCAL and self.job_id is None and self.submission is not None


@dataclass(frozen=True, kw_only=True)
class CellNow:
    """The current state of a cell, and the evidence for it."""

    state: State
    reason: str | None = None  # what the state was inferred from
    status: Status | None = None  # the status that the run itself last wrote, which ``state`` may contradict
    result: Result | None = None  # only a result of the planned last step
    record: CellRecord = CellRecord()
    job: JobState | None = None  # the latest job of the cell in a queue
    is_silent: bool = False  # the cluster of the latest job did not answer
    is_host_oom: bool = False  # the cluster killed the job because it used too much host memory

    @property
    def is_live(self) -> bool:
        """Whether the cell waits or runs."""
        return self.state in (State.SUBMITTED, State.RUNNING)
