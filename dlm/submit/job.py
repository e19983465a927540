"""Define a job, the resources that it needs, the keys of the launcher, and the state of a job in a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core.checks import whole
from dlm.core.errors import unknown

if TYPE_CHECKING:
    from dlm.submit.cell_now import CellNow

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # each is set to cpus_per_task


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources that one job requests. Jobs with equal Resources can share a job array."""

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    mem_gib: int | None = None  # host memory per node; None leaves it to the cluster
    time_min: int | None = None  # the time limit in minutes; None leaves it to the cluster


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of `python -m dlm.launch <overrides>`, its run directory and its resources."""

    name: str  # the cell id
    overrides: tuple[str, ...]
    run_dir: Path
    resources: Resources = Resources()
    steps: int | None = None  # the planned last step, which the result must have; None accepts any step
    was: CellNow | None = None  # the previous state of a cell that is started again; None for a first start
    micro_batch: int | None = None  # the smaller micro-batch in ``overrides`` after the cell ran out of memory
    awaits: BranchPoint | None = None  # the checkpoint that the cell starts from, if it is still to be written


@dataclass(frozen=True, kw_only=True)
class BranchPoint:
    """The checkpoint of a trunk from which a cell starts. Without it, the cell trains from nothing."""

    trunk: str  # the cell id of the trunk
    step: int
    job_id: str | None = None  # the id of the trunk's job in the queue of the cluster; None if it has none


_MAY_BE_0 = ("gpus_per_node", "signal_delay_s")  # every other integer setting must be at least 1


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """The keys of configs/hydra/launcher/submitit_slurm.yaml; None leaves a value to the plan or to the cluster.

    Raises UserError if the value of an integer key is not an integer or is too small.
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
    array_parallelism: int = 256  # the most tasks of one array that run at once
    max_array_size: int = 1000  # the most tasks in one array: MaxArraySize of slurm.conf minus one
    sbatch_per_min: int | None = 60  # the most calls of sbatch per minute; None sets no limit
    signal_delay_s: int = 90  # SIGUSR1 is sent this long before the time limit, so that a checkpoint can be written
    allow_dirty: bool = False  # submit code that differs from the last commit
    requeue: bool = True
    stderr_to_stdout: bool = True
    additional_parameters: Mapping[str, Any] = field(default_factory=dict)
    # Options of sbatch for the job that looks after the sweep.
    follower: Mapping[str, Any] = field(default_factory=dict)
    follow_min: int = 10  # the most minutes between two looks of that job
    setup: Sequence[str] = ()  # shell lines before srun, for instance `module load` or `source activate`
    wait: bool = True  # with `-m` only: return only when every job has ended
    poll_sec: float = 15.0  # with `-m` only: the time between two queries of squeue and sacct

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
    for key in ("additional_parameters", "follower"):
        known[key] = dict(known.get(key) or {})
    return SlurmSettings(**known)


def job_name(sweep: str, submission: str) -> str:
    """Return the name of a job array in SLURM, which is unique, so that an interrupted submission can be looked up."""
    return f"{sweep}-{submission}"
