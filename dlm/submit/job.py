"""What a job is, and the settings of the SLURM launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dlm.core.errors import UserError, unknown

LAUNCHER_CONFIG = "configs/hydra/launcher/submitit_slurm.yaml"


THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
)  # cpus_per_task goes in each


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


def job_name(sweep: str, submission: str) -> str:
    """What an array is called in SLURM: unique, so that a submission that was cut off can be found by it."""
    return f"{sweep}-{submission}"
