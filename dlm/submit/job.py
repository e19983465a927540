"""Describe one job, what it needs, what the launcher's keys ask for, and what a cluster says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core.checks import whole
from dlm.core.errors import unknown
from dlm.record.outcomes import State

if TYPE_CHECKING:
    from dlm.submit.ledger import CellNow

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # each is set to cpus_per_task


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job needs. Jobs with equal Resources can share a job array."""

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
    steps: int | None = None  # the planned last step, which its result must have; None accepts any
    was: CellNow | None = None  # the state because of which the cell runs again; None for the first time
    micro_batch: int | None = None  # the smaller one that its overrides ask for after it ran out of memory


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What a cluster says of one job."""

    state: State  # SUBMITTED or RUNNING while the cluster has the job, else how it ended
    words: str  # the same in the cluster's own words, for people: "SLURM says PENDING (Priority)"
    exit_code: int | None = None  # None while it runs, and when a signal ended it
    has_failed: bool = False  # it ended by itself and with an error: its exit code, if there is one, tells the cause
    is_host_oom: bool = False  # the cluster ended it because it used too much memory of the host

    @property
    def is_live(self) -> bool:
        """Whether the job waits or runs."""
        return self.state in (State.SUBMITTED, State.RUNNING)


_MAY_BE_0 = ("gpus_per_node", "signal_delay_s")  # every other whole number is at least 1


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """The keys of configs/hydra/launcher/submitit_slurm.yaml; None leaves a value to the plan or to the cluster.

    Raises UserError for a number that is not whole or too small.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None  # replaces --gpus-per-node where a site requires it
    comment: str | None = None
    nodes: int | None = None
    tasks_per_node: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    timeout_min: int | None = None
    array_parallelism: int = 256  # tasks of one array that run at once
    max_array_size: int = 1000  # tasks in one array: MaxArraySize of slurm.conf minus one
    sbatch_per_min: int | None = 60  # submissions per minute at most; None sets no limit
    signal_delay_s: int = 90  # USR1 comes this long before the time limit, which leaves time for a checkpoint
    allow_dirty: bool = False  # submit code that differs from the last commit
    requeue: bool = True
    stderr_to_stdout: bool = True
    additional_parameters: Mapping[str, Any] = field(default_factory=dict)
    setup: Sequence[str] = ()  # shell lines before srun, for instance `module load` or `source activate`
    wait: bool = True  # with `-m` only: return when every job has ended
    poll_sec: float = 15.0  # with `-m` only: the time between two questions to squeue and sacct

    def __post_init__(self) -> None:
        for item in fields(self):
            key, value = item.name, getattr(self, item.name)
            if item.type in ("int", "int | None") and value is not None:
                object.__setattr__(self, key, whole(f"hydra.launcher.{key}", value, int(key not in _MAY_BE_0)))


def slurm_settings(values: Mapping[str, Any]) -> SlurmSettings:
    """Make SlurmSettings from the plain values of a YAML file and its overrides.

    Raises:
        UserError: A key is unknown, or a value is not allowed.
    """
    allowed = [item.name for item in fields(SlurmSettings)]
    for key in values:
        if key not in (*allowed, "_target_"):
            raise unknown("key of hydra.launcher", key, allowed)
    known = {key: values[key] for key in allowed if key in values}
    known["setup"] = tuple(known.get("setup") or ())
    known["additional_parameters"] = dict(known.get("additional_parameters") or {})
    return SlurmSettings(**known)


def job_name(sweep: str, submission: str) -> str:
    """The name of a job array in SLURM. It is unique, so an interrupted submission can be found again by it."""
    return f"{sweep}-{submission}"
