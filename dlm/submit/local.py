"""pool: jobs -> processes on this machine, as many at once as its cores and GPUs allow. Called by submit.

The children stay in the process group of the parent: `kill -9` of the group ends everything, and the next call
goes on from the checkpoints. The parent is the one owner of the signals: Ctrl-C or SIGTERM is passed on as
SIGTERM (a cell then writes a checkpoint and exits 75), waited for, and never leaves an orphan.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from dlm.core.errors import ExitCode, UserError
from dlm.core.lease import live_holder
from dlm.core.paths import PACKAGE
from dlm.record.run import read_result
from dlm.submit.job import THREAD_VARIABLES, Job

LOG = "log.txt"


HELD = (ExitCode.USER_ERROR, ExitCode.PREEMPTED)  # how one ends that finds its cell held by another process


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a job: started, ended (with its exit code), deferred (another process runs it), or
    skipped (done by another or cancelled meanwhile)."""

    kind: Literal["started", "ended", "deferred", "skipped"]
    job: Job
    pid: int | None = None
    exit_code: int | None = None  # -9 when SIGKILL ended it
    wall_sec: float | None = None


@dataclass(frozen=True, kw_only=True)
class PoolResult:
    """How every job that ran ended; ``interrupted`` by Ctrl-C or SIGTERM, the rest never started."""

    exit_codes: dict[str, int]
    interrupted: bool


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float
    gpus: list[str]
    stopped: bool = False  # told to end, because it is not wanted any more


class LocalPool:
    """Runs jobs as subprocesses. ``cores`` and ``gpus`` are what may be used, by default all that this process may.

    ``module`` is what each runs (`python -P -m module overrides`); ``code`` a folder that goes first on PYTHONPATH.
    ``cpus_per_task`` overrides what the jobs ask for. After an interruption the children have ``grace_sec``.
    """

    def __init__(
        self,
        *,
        cores: int | None = None,
        cpus_per_task: int | None = None,
        gpus: Sequence[str] | None = None,
        module: str = "dlm.launch",
        grace_sec: float = 120.0,
        poll_sec: float = 0.1,
    ) -> None:
        self.cores = cores or len(os.sched_getaffinity(0))
        self.cpus_per_task = cpus_per_task
        self.gpus = list(gpus) if gpus is not None else None  # looked for when a job wants one
        self.module = module
        self.grace_sec = grace_sec
        self.poll_sec = poll_sec
        self._running: list[_Running] = []
        self._deferred: set[str] = set()
        self._facts: dict[str, str] = {}
        self._signals = 0

    def run(
        self,
        jobs: Sequence[Job],
        *,
        code: Path | None = None,
        environment: Mapping[str, str] | None = None,
        wanted: Callable[[Job], bool] = lambda job: True,
        on_event: Callable[[Event], None] = lambda event: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> PoolResult:
        """Run all jobs and wait; ``environment`` is added to ours.

        A job that is not ``wanted`` any more is not started, and ended with SIGTERM when it runs.

        Raises UserError, before anything starts, for a job that cannot fit.
        """
        for job in jobs:
            self._check_fits(job)
        waiting, codes = list(jobs), dict[str, int]()
        self._facts = dict(environment or {})
        with self._owning_signals():
            try:
                while (waiting or self._running) and not self._signals:
                    self._start_what_fits(waiting, code, wanted, on_event)
                    self._end_unwanted(wanted)
                    self._reap(codes, waiting, on_event)
                    on_tick()
                    time.sleep(self.poll_sec)
            finally:
                self._stop(codes, on_event)
            return PoolResult(exit_codes=codes, interrupted=self._signals > 0)

    def cpus(self, job: Job) -> int:
        """Cores that a job occupies."""
        return (self.cpus_per_task or job.resources.cpus_per_task) * job.resources.tasks_per_node

    def _check_fits(self, job: Job) -> None:
        need = job.resources
        if need.nodes > 1:
            raise UserError(f"{job.name} needs {need.nodes} nodes: run it through SLURM (LAUNCHER=submitit_slurm)")
        if need.gpus_per_node and self.gpus is None:
            self.gpus = visible_gpus()
        if self.gpus is not None and need.gpus_per_node > len(self.gpus):
            raise UserError(
                f"{job.name} needs {need.gpus_per_node} GPUs and this machine offers {len(self.gpus)}: "
                "use a cluster (LAUNCHER=submitit_slurm) or trainer=cpu"
            )

    def _free_gpus(self) -> list[str]:
        taken = {gpu for running in self._running for gpu in running.gpus}
        return [gpu for gpu in self.gpus or [] if gpu not in taken]

    def _fits(self, job: Job) -> bool:
        """Whether there is room now; a job larger than the machine runs alone."""
        if not self._running:
            return True
        used = sum(self.cpus(running.job) for running in self._running)
        return used + self.cpus(job) <= self.cores and job.resources.gpus_per_node <= len(self._free_gpus())

    def _start_what_fits(
        self,
        waiting: list[Job],
        code: Path | None,
        wanted: Callable[[Job], bool],
        on_event: Callable[[Event], None],
    ) -> None:
        """Start jobs in order while there is room; one that runs elsewhere is looked at again later."""
        for job in list(waiting):
            if not self._fits(job):
                return
            if not wanted(job):
                waiting.remove(job)
                on_event(Event(kind="skipped", job=job))
            elif live_holder(job.run_dir) is not None:
                self._defer(job, on_event)
            elif job.name in self._deferred and read_result(job.run_dir) is not None:
                waiting.remove(job)  # whoever ran it has finished it
                on_event(Event(kind="skipped", job=job))
            else:
                waiting.remove(job)
                self._running.append(self._start(job, code))
                on_event(Event(kind="started", job=job, pid=self._running[-1].process.pid))

    def _end_unwanted(self, wanted: Callable[[Job], bool]) -> None:
        for running in self._running:
            if not running.stopped and not wanted(running.job):
                running.process.terminate()
                running.stopped = True

    def _defer(self, job: Job, on_event: Callable[[Event], None]) -> None:
        if job.name not in self._deferred:
            self._deferred.add(job.name)
            on_event(Event(kind="deferred", job=job))

    def _start(self, job: Job, code: Path | None) -> _Running:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        gpus = self._free_gpus()[: job.resources.gpus_per_node]
        command = [sys.executable, "-P", "-m", self.module, *job.overrides]
        # Ctrl-C reaches the whole group: with SIGINT blocked (a child inherits that) only the parent acts on it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with open(job.run_dir / LOG, "ab") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(job, code, gpus),
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return _Running(job=job, process=process, started=time.monotonic(), gpus=gpus)

    def _environment(self, job: Job, code: Path | None, gpus: list[str]) -> dict[str, str]:
        threads = str(self.cpus_per_task or job.resources.cpus_per_task)
        path = [str(code or PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, threads)}
        environment["PYTHONPATH"] = os.pathsep.join(path)
        if code is not None:
            environment.pop("DLM_CONFIGS", None)  # the snapshot's configs count
        environment |= self._facts
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return environment

    def _reap(
        self,
        codes: dict[str, int],
        waiting: list[Job] | None,
        on_event: Callable[[Event], None],
    ) -> None:
        """Take note of the children that ended; ``waiting`` is None when nothing may be started again."""
        for running in list(self._running):
            exit_code = running.process.poll()
            if exit_code is None:
                continue
            self._running.remove(running)
            job = running.job
            if waiting is not None and exit_code in HELD and live_holder(job.run_dir):
                waiting.append(job)  # another process took the lease between our look and the child's
                self._defer(job, on_event)
                continue
            codes[job.name] = exit_code
            wall_sec = time.monotonic() - running.started
            on_event(Event(kind="ended", job=job, exit_code=exit_code, wall_sec=wall_sec))

    def _stop(self, codes: dict[str, int], on_event: Callable[[Event], None]) -> None:
        """End what still runs: SIGTERM, a grace, SIGKILL. A second signal to the parent ends the grace."""
        for running in self._running:
            running.process.terminate()
        deadline, signals = time.monotonic() + self.grace_sec, self._signals
        while self._running and time.monotonic() < deadline and self._signals == signals:
            self._reap(codes, None, on_event)
            time.sleep(self.poll_sec)
        for running in self._running:
            running.process.kill()
            running.process.wait()
        self._reap(codes, None, on_event)

    @contextlib.contextmanager
    def _owning_signals(self) -> Iterator[None]:
        """Count SIGINT and SIGTERM instead of dying of them (only the main thread may install handlers)."""

        def count(number: int, frame: FrameType | None) -> None:
            self._signals += 1

        self._signals = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def visible_gpus() -> list[str]:
    """The GPUs this process may use: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists, else none."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu.strip() for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):  # no driver: no GPUs
        return []
    return done.stdout.split()
