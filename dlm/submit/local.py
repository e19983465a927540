"""Run jobs as processes on this machine, as many at once as its cores and GPUs allow.

The child processes stay in the process group of the parent: `kill -9` of the group ends all of them, and the next
submission continues from the checkpoints. Only the parent handles signals: it forwards Ctrl-C and SIGTERM as SIGTERM,
upon which a cell writes a checkpoint and exits with 75, and it waits for the children, so that none is left behind.
Jobs with one thread and no GPU are forked from a process that has imported torch and Lightning (forks.py), which saves
each of them several seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, auto
from pathlib import Path
from types import FrameType
from typing import Any

from dlm.core import signals
from dlm.core.errors import ExitCode, UserError
from dlm.core.lease import live_holder
from dlm.record.outcomes import State, goes_on
from dlm.record.run import has_checkpoint, read_result
from dlm.submit.cell_now import LOCAL
from dlm.submit.cluster import Cluster, Event, Request, Submission
from dlm.submit.forks import Forked, ForkServer
from dlm.submit.job import LAUNCHERS, THREAD_VARIABLES, Job, SlurmSettings, unknown_setting
from dlm.submit.job_endings import local_ending

HELD = (ExitCode.USER_ERROR, ExitCode.PREEMPTED)  # exit codes of a process that finds its cell held by another


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """The keys of configs/hydra/launcher/submitit_local.yaml: those of the plugin, and dlm's own."""

    timeout_min: int | None = None  # a job that takes longer is told to stop and writes a checkpoint
    nodes: int | None = None
    tasks_per_node: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: int | None = None  # as in submitit, nothing enforces it on this machine
    name: str | None = None  # this and the next keys have no effect: jobs are named by their cells, and log there
    submitit_folder: str | None = None
    stderr_to_stdout: bool = True
    cores: int | None = None
    grace_sec: float = 120.0


def local_settings(values: Mapping[str, Any]) -> LocalSettings:
    """Make LocalSettings from plain values. Raises UserError for an unknown key, and for more than one node."""
    allowed = [item.name for item in fields(LocalSettings)]
    for key in values:
        if key not in (*allowed, "_target_"):
            raise unknown_setting(key, names=allowed, file=f"{LAUNCHERS}/submitit_local.yaml")
    if (values.get("nodes") or 1) > 1:
        raise UserError(f"hydra.launcher.nodes is {values['nodes']}: this machine is one node; use submitit_slurm")
    return LocalSettings(**{key: value for key in allowed if (value := values.get(key)) is not None})


@dataclass(kw_only=True)
class LocalPool(Cluster):
    """This machine as a cluster. Its jobs have no ids: their states follow from their leases and the ledger.

    Args:
        cores: The number of cores that all jobs together may use; by default all cores that this process may use.
        gpus: The GPUs that may be used, named as in CUDA_VISIBLE_DEVICES; by default ``visible_gpus``.
        module: The module that each job runs: `python -P -m module overrides`.
        grace_sec: The time for the children to end after an interruption before they are killed.
        timeout_min: The time after which a job is told to stop; None sets no limit.
        poll_sec: The time between two checks of the children.
        settings: What every job requests; with ``allow_dirty``, jobs may run code that is not committed.
    """

    name = LOCAL
    queues = False

    cores: int | None = None
    gpus: Sequence[str] | None = None  # None until a job needs a GPU
    module: str = "dlm.launch"
    grace_sec: float = 120.0
    timeout_min: float | None = None
    poll_sec: float = 0.1
    settings: SlurmSettings = field(default_factory=lambda: SlurmSettings(allow_dirty=True))

    @classmethod
    def of(cls, keys: LocalSettings) -> LocalPool:
        """Return this machine as the keys of a launcher's file describe it."""
        return cls(
            cores=keys.cores,
            grace_sec=keys.grace_sec,
            timeout_min=keys.timeout_min,
            settings=SlurmSettings(
                cpus_per_task=keys.cpus_per_task,
                tasks_per_node=keys.tasks_per_node,
                gpus_per_node=keys.gpus_per_node,
                allow_dirty=True,
            ),
        )

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise UserError for a job that needs several nodes, or more GPUs than this machine offers."""
        for job in jobs:
            need = job.resources
            if need.nodes > 1:
                raise UserError(f"{job.name} needs {need.nodes} nodes: choose the launcher submitit_slurm")
            if need.gpus_per_node and self.gpus is None:
                self.gpus = visible_gpus()
            if need.gpus_per_node > len(self.gpus or ()):
                raise UserError(
                    f"{job.name} needs {need.gpus_per_node} GPUs and this machine offers {len(self.gpus or ())}: "
                    "choose the launcher submitit_slurm, or trainer=cpu"
                )

    def submit(self, request: Request) -> Submission:
        """Run all jobs and wait for them; see ``Cluster``. A job that is cancelled in the meantime receives SIGTERM."""
        request.ledger.intent(request.submission, request.jobs, cluster=self.name, code=request.code)
        return _PoolRun(self, request).to_its_end()

    def cancel(self, ids: Sequence[str]) -> None:
        """Do nothing, because jobs on this machine have no ids; their processes are stopped with SIGTERM instead."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes] | Forked
    started: float  # by time.monotonic
    gpus: list[str]
    was_told_to_end: bool = False


class Trunk(Enum):
    """What a branch can expect of its trunk."""

    READY = auto()  # the checkpoint is there
    COMING = auto()  # the trunk waits or runs
    INTERRUPTED = auto()  # the trunk has ended too early, and the next submission continues it
    GONE = auto()  # the trunk will not write the checkpoint


class _PoolRun:
    """One submission to a LocalPool while it runs."""

    def __init__(self, pool: LocalPool, request: Request) -> None:
        self.pool, self.request = pool, request
        self.waiting, self.running = list(request.jobs), list[_Running]()
        self.deferred: set[str] = set()  # ids of cells that were found to be run by another process
        self.endings: dict[str, tuple[State, str | None]] = {}
        self.skipped: dict[str, str] = {}
        self.exit_codes: dict[str, int] = {}
        self.num_signals = 0
        self.server: ForkServer | None = None  # started for the first job that is forked

    def to_its_end(self) -> Submission:
        """Start jobs as capacity allows, until all have ended or this process receives SIGINT or SIGTERM."""
        with self._owning_signals():
            try:
                while (self.waiting or self.running) and not self.num_signals:
                    self._start_what_fits()
                    self._end_what_must()
                    self._reap()
                    self.request.on_tick()
                    time.sleep(self.pool.poll_sec)
            finally:
                self._stop()
                if self.server is not None:
                    self.server.close()
        return Submission(
            submitted=tuple(job.name for job in self.request.jobs),
            skipped=self.skipped,
            endings=self.endings,
            exit_codes=self.exit_codes,
            interrupted=self.num_signals > 0,
        )

    def _start_what_fits(self) -> None:
        """Start the waiting jobs in order while there is capacity; a cell that another process runs keeps waiting."""
        for job in list(self.waiting):
            if not self._fits(job):
                return
            if live_holder(job.run_dir) is not None and not self._is_cancelled(job):
                self._defer(job)
                continue
            trunk = self._trunk_of(job)
            if trunk is Trunk.COMING:
                continue
            if not self._is_ready(job):
                return
            self.waiting.remove(job)
            is_done = job.name in self.deferred and read_result(job.run_dir) is not None
            if is_done or self._is_cancelled(job):
                self.request.on_event(Event(kind="skipped", job=job))
                continue
            if trunk is Trunk.INTERRUPTED and job.awaits is not None:
                state, reason = self.endings[job.awaits.trunk]
                self.skipped[job.name] = f"its trunk {job.awaits.trunk} is {state} ({reason}) and has to go on first"
                continue
            if trunk is Trunk.GONE:
                self.request.on_event(Event(kind="alone", job=job))
            self.running.append(self._start(job))
            self.request.on_event(Event(kind="started", job=job, pid=self.running[-1].process.pid))

    def _trunk_of(self, job: Job) -> Trunk | None:
        """Return what a branch can expect of its trunk; None for a job that waits for no checkpoint."""
        at = job.awaits
        if at is None:
            return None
        run_dir = job.run_dir.with_name(at.trunk)
        if has_checkpoint(run_dir, at.step):
            return Trunk.READY
        here = (*self.waiting, *(running.job for running in self.running))
        if any(other.name == at.trunk for other in here) or live_holder(run_dir) is not None:
            return Trunk.COMING
        ending = self.endings.get(at.trunk)
        if ending is not None and goes_on(ending[0]) and at.trunk not in self.request.ledger.cancelled_now():
            return Trunk.INTERRUPTED
        return Trunk.GONE

    def _fits(self, job: Job) -> bool:
        """Whether there is capacity for a job now. A job that needs more cores than may be used runs alone."""
        if not self.running:
            return True
        cores = self.pool.cores or len(os.sched_getaffinity(0))
        used = sum(_num_cores(running.job) for running in self.running)
        return used + _num_cores(job) <= cores and job.resources.gpus_per_node <= len(self._free_gpus())

    def _free_gpus(self) -> list[str]:
        taken = {gpu for running in self.running for gpu in running.gpus}
        return [gpu for gpu in self.pool.gpus or () if gpu not in taken]

    def _is_cancelled(self, job: Job) -> bool:
        return job.name in self.request.ledger.cancelled_now()

    def _end_what_must(self) -> None:
        """Tell the jobs to stop that were cancelled or have used up their time."""
        limit_sec = float("inf") if self.pool.timeout_min is None else self.pool.timeout_min * 60
        for running in self.running:
            is_late = time.monotonic() - running.started > limit_sec
            if not running.was_told_to_end and (is_late or self._is_cancelled(running.job)):
                running.process.terminate()
                running.was_told_to_end = True

    def _defer(self, job: Job) -> None:
        if job.name not in self.deferred:
            self.deferred.add(job.name)
            self.request.on_event(Event(kind="deferred", job=job))

    def _start(self, job: Job) -> _Running:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        gpus = self._free_gpus()[: job.resources.gpus_per_node]
        started, log = time.monotonic(), job.run_dir / "log.txt"
        process = self._fork(job, log) or self._spawn(job, log, gpus)
        return _Running(job=job, process=process, started=started, gpus=gpus)

    def _fork(self, job: Job, log: Path) -> Forked | None:
        """Start a job by fork. Returns None if it needs a process that does its own imports."""
        if self.server is None or not _is_forked(job):
            return None
        try:
            return self.server.start(job.name, job.overrides, log)
        except OSError as error:
            with open(log, "a") as stream:
                stream.write(f"dlm: not forked but started anew: {error}\n")
            return None

    def _spawn(self, job: Job, log: Path, gpus: list[str]) -> subprocess.Popen[bytes]:
        with open(log, "ab") as stream, _without_ctrl_c():
            return subprocess.Popen(
                [sys.executable, "-P", "-m", self.pool.module, *job.overrides],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=self._environment(job, gpus),
            )

    def _is_ready(self, job: Job) -> bool:
        """Whether a job can be started now. A job that is forked has to wait until the server has done its imports."""
        if not _is_forked(job):
            return True
        if self.server is None:
            job.run_dir.mkdir(parents=True, exist_ok=True)
            with _without_ctrl_c():
                self.server = ForkServer(self.pool.module, self._environment(job, []), job.run_dir / "log.txt")
        return self.server.is_ready()

    def _environment(self, job: Job, gpus: list[str]) -> dict[str, str]:
        path = [str(self.request.code), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            **dict.fromkeys(THREAD_VARIABLES, str(job.resources.cpus_per_task)),
            "PYTHONPATH": os.pathsep.join(path),
            **self.request.environment,
            "DLM_SUBMISSION": self.request.submission,
        }
        environment.pop("DLM_CONFIGS", None)  # the job must use the configs of the snapshot
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return environment

    def _reap(self, *, may_wait: bool = True) -> None:
        """Record the exit of every child that has ended.

        With ``may_wait``, a job whose cell is held by another process returns to the waiting jobs instead.
        """
        for running in list(self.running):
            exit_code, job = running.process.poll(), running.job
            if exit_code is None:
                continue
            self.running.remove(running)
            if may_wait and exit_code in HELD and live_holder(job.run_dir):
                self.waiting.append(job)  # another process took the lease after our check of it
                self._defer(job)
                continue
            state, reason = local_ending(job, exit_code)
            self.exit_codes[job.name], self.endings[job.name] = exit_code, (state, reason)
            self.request.ledger.ended(job.name, state=state, exit_code=exit_code, reason=reason)
            wall_sec = time.monotonic() - running.started
            self.request.on_event(Event(kind="ended", job=job, exit_code=exit_code, wall_sec=wall_sec))

    def _stop(self) -> None:
        """Stop the jobs that still run: SIGTERM first, and SIGKILL after the grace period.

        A further signal to the parent ends the grace period at once.
        """
        for running in self.running:
            running.process.terminate()
        deadline, num_signals = time.monotonic() + self.pool.grace_sec, self.num_signals
        while self.running and time.monotonic() < deadline and self.num_signals == num_signals:
            self._reap(may_wait=False)
            time.sleep(self.pool.poll_sec)
        for running in self.running:
            running.process.kill()
            running.process.wait()
        self._reap(may_wait=False)

    @contextlib.contextmanager
    def _owning_signals(self) -> Iterator[None]:
        """Count SIGINT and SIGTERM instead of being ended by them. Outside the main thread, this does nothing."""

        def count(number: int, frame: FrameType | None) -> None:
            self.num_signals += 1
            if number == signal.SIGINT:
                signals.note(number)  # it decides the exit code of the command
            if self.num_signals == 1:
                signals.say("stopping after this step; Ctrl-C again to kill")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Block SIGINT. A child inherits this, so only the parent reacts to Ctrl-C, which reaches the whole group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_forked(job: Job) -> bool:
    """Whether a job is forked: it uses neither a GPU nor several threads.

    CUDA may not work in a forked process. Libraries read from the environment how many threads to use when they are
    imported, and OpenBLAS then starts them; a process with several threads cannot be forked safely.
    """
    return job.resources.gpus_per_node == 0 and job.resources.cpus_per_task == 1


def _num_cores(job: Job) -> int:
    return job.resources.cpus_per_task * job.resources.tasks_per_node


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use: those in CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu.strip() for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
    try:
        return subprocess.check_output(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], text=True).split()
    except (OSError, subprocess.CalledProcessError):  # no driver, so no GPUs
        return []
