"""Define a job, the resources that it needs, the keys of the launcher, and the state of a job in a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core.checks import whole
from dlm.core.data_only import check_rule
from dlm.core.errors import UserError, shown, unknown
from dlm.core.names import is_one_line

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

    @property
    def num_gpus(self) -> int:
        """The number of GPUs on all nodes."""
        return self.nodes * self.gpus_per_node


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
    settings: SlurmSettings | None = None  # the launcher's keys for this job; None: those of the cluster


@dataclass(frozen=True, kw_only=True)
class BranchPoint:
    """The checkpoint of a trunk from which a cell starts. Without it, the cell trains from nothing."""

    trunk: str  # the cell id of the trunk
    step: int
    job_id: str | None = None  # the id of the trunk's job in the queue of the cluster; None if it has none


# Integer settings that may be 0; every other one must be at least 1.
_MAY_BE_0 = ("gpus_per_node", "mem_gb", "signal_delay_s", "max_num_timeout")
# Settings of which one at most may be given.
_CONTRADICTIONS = (("mem_gb", "mem_per_cpu", "mem_per_gpu"), ("cpus_per_task", "cpus_per_gpu"))


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """The keys of configs/hydra/launcher/submitit_slurm.yaml; None leaves a value to the plan or to the cluster.

    Raises UserError if the value of an integer key is not an integer or is too small, if a text has a line break or
    another control character, or if two keys contradict.
    """

    # The keys of hydra-submitit-launcher and the parameters of submitit's executor, with their meaning there.
    timeout_min: int | None = None
    nodes: int | None = None
    tasks_per_node: int | None = None
    gpus_per_node: int | None = None
    gpus_per_task: int | None = None
    cpus_per_task: int | None = None
    cpus_per_gpu: int | None = None
    mem_gb: int | None = None
    mem_per_cpu: str | None = None
    mem_per_gpu: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    exclusive: Any = None  # true, or a word such as "user"
    gres: str | None = None  # replaces --gpus-per-node where a site requires it
    dependency: str | None = None
    wckey: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    comment: str | None = None
    name: str | None = None  # the beginning of the names of jobs; None: the name of the sweep
    additional_parameters: Mapping[str, Any] = field(default_factory=dict)
    array_parallelism: int = 256  # the most tasks of one array that run at once
    signal_delay_s: int = 90  # a signal is sent this long before the time limit, so that a checkpoint can be written
    max_num_timeout: int | None = None  # how often a cell is requeued at its time limit; None: until it is done
    setup: Sequence[str] = ()  # shell lines before srun, for instance `module load` or `source activate`
    teardown: Sequence[str] = ()  # shell lines after srun
    use_srun: bool = True  # False: the batch script itself runs the cell, which must have a single task
    srun_args: Sequence[str] = ()
    submitit_folder: str | None = None  # for the logs of batch scripts; None: the ledger of the sweep
    stderr_to_stdout: bool = True
    # dlm's own keys.
    max_running: int | None = None  # the most cells of the sweep that run at once, in all its arrays
    max_gpus: int | None = None  # the most GPUs that the sweep uses at once
    max_array_size: int = 1000  # the most tasks in one array: MaxArraySize of slurm.conf minus one
    sbatch_per_min: int | None = 60  # the most calls of sbatch per minute; None sets no limit
    allow_dirty: bool = False  # submit code that differs from the last commit
    requeue: bool = True
    # Options of sbatch for the job that looks after the sweep.
    follower: Mapping[str, Any] = field(default_factory=dict)
    follow_min: int = 10  # the most minutes between two looks of that job
    wait: bool = True  # with `-m` only: return only when every job has ended
    poll_sec: float = 15.0  # with `-m` only: the time between two queries of squeue and sacct

    def __post_init__(self) -> None:
        for item in fields(self):
            key, value = item.name, getattr(self, item.name)
            if item.type in ("int", "int | None") and value is not None:
                object.__setattr__(self, key, whole(f"hydra.launcher.{key}", value, int(key not in _MAY_BE_0)))
            for words in _texts_in(value):
                if not is_one_line(words.replace("\t", " ") if key in _SHELL_LINES else words):
                    advice = "give each line as an entry of the list" if key in _SHELL_LINES else "write it on one line"
                    raise UserError(
                        f"hydra.launcher.{key} has {shown(words)}: no line break or other control character is "
                        f"allowed; {advice}"
                    )
        if re.search(r"[,|\s]", self.name or ""):
            raise UserError(f"hydra.launcher.name is {self.name!r}: no comma, bar or space is allowed")
        for keys in _CONTRADICTIONS:
            given = [f"{key}={getattr(self, key)}" for key in keys if getattr(self, key) is not None]
            if len(given) > 1:
                raise UserError(f"hydra.launcher has {' and '.join(given)}, which contradict each other: keep one")


_SHELL_LINES = ("setup", "teardown")  # commands by the user, which may have tabs


def _texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a value of a setting, the keys of a mapping too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*_texts_in(key), *_texts_in(item))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts_in(item)


SETTING_NAMES = [item.name for item in fields(SlurmSettings)]
LAUNCHERS = "configs/hydra/launcher"  # the folder of the launchers' files
LAUNCHER_CONFIG = f"{LAUNCHERS}/submitit_slurm.yaml"  # has all keys
_TUPLES = ("setup", "teardown", "srun_args")
_NULL = ("sbatch_per_min",)
_OF_DLM = ("array", "job-name", "output")  # options of sbatch by which dlm finds jobs and logs again
_MAPPINGS = ("additional_parameters", "follower")
# Settings that cannot differ between the cells of a sweep.
_OF_ALL_CELLS = (
    "max_running", "max_gpus", "max_array_size", "sbatch_per_min", "allow_dirty", "follower", "follow_min", "wait",
    "poll_sec",
)  # fmt: skip


def unknown_setting(key: str, *, names: Sequence[str] = SETTING_NAMES, file: str = LAUNCHER_CONFIG) -> UserError:
    """Return the error for a key that hydra.launcher does not have. ``file`` lists the ``names`` of all its keys."""
    return unknown("key of hydra.launcher", key, names, listed_in=file)


def slurm_settings(values: Mapping[str, Any]) -> SlurmSettings:
    """Make SlurmSettings from the plain values of a YAML file and its overrides.

    Raises:
        UserError: A key is unknown, or a value is not allowed.
    """
    for key in values:
        if key not in (*SETTING_NAMES, "_target_"):
            raise unknown_setting(key)
    # A null key has its default, but for the key whose null means something else.
    known = {key: values[key] for key in SETTING_NAMES if key in values and (values[key] is not None or key in _NULL)}
    for key in _TUPLES:
        known[key] = _lines(key, known.get(key))
    for key in _MAPPINGS:
        known[key] = dict(known.get(key) or {})
        for option in known[key]:
            if str(option).replace("_", "-") in _OF_DLM:
                raise UserError(f"hydra.launcher.{key} has {option}, by which dlm finds its jobs again: leave it out")
    return SlurmSettings(**known)


def with_changes(settings: SlurmSettings, changes: Mapping[str, Any]) -> SlurmSettings:
    """Return the settings for some cells of a sweep.

    Raises:
        UserError: A key is unknown, holds for all cells of a sweep or is not what a job requests, or a value is not
            allowed.
    """
    for key in changes:
        if key in _OF_ALL_CELLS:
            raise UserError(f"launcher.set.{key}: this key holds for the whole sweep; set hydra.launcher.{key}")
    check_rule([key for key in changes if key in SETTING_NAMES], "")
    return slurm_settings({**{key: getattr(settings, key) for key in SETTING_NAMES}, **changes})


def _lines(key: str, value: Any) -> tuple[str, ...]:
    """Return a list of words or of shell lines. Raises UserError for anything else."""
    if isinstance(value, str) or not isinstance(value or [], Sequence):
        raise UserError(f"hydra.launcher.{key} is {value!r}: give a list, such as [{value}]")
    return tuple(str(line) for line in value or ())


def job_name(begin: str, submission: str) -> str:
    """Return the name of a job array in SLURM, which is unique, so that an interrupted submission can be looked up.

    It begins with the name of the sweep, or with the launcher's key ``name``.
    """
    return f"{begin}-{submission}"
