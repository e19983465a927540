"""Submit one small job that looks at its node, for `dlm doctor`, and wait until it has ended.

The job requests what the launcher's keys say, like the job of a cell, and runs ``dlm.train.node_check``.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dlm.core.errors import UserError
from dlm.record.outcomes import State
from dlm.submit.cell_now import JobState
from dlm.submit.cluster import Request
from dlm.submit.job import Job, Resources, SlurmSettings
from dlm.submit.ledger import Ledger
from dlm.submit.resources import HOST_GIB
from dlm.submit.script import exports, parameters_of, srun_options, thread_exports
from dlm.submit.slurm import Slurm
from dlm.submit.slurm_commands import ask_sacct, ask_squeue

TIME_MIN = 10  # the time limit of the job; imports from a slow file system can take minutes
POLL_SEC, TELL_SEC = 2.0, 15.0
# How the job ends if its node lacks what it needs to begin.
UNSEEN_WORKDIR, UNSEEN_PYTHON = 66, 67


@dataclass(frozen=True, kw_only=True)
class CheckJob:
    """The job that looks at its node."""

    job_id: str
    name: str
    findings: Path  # what it finds, as JSON
    log: Path


def submit_check(slurm: Slurm, token: Path, *, gpus: int, code: Path, environment: Mapping[str, str]) -> CheckJob:
    """Submit the job.

    Args:
        slurm: The cluster, with the settings of the launcher.
        token: A file in the work directory that the job is to read. What it finds is written next to it.
        gpus: How many GPUs the job requests, unless the settings name GPUs in another way.
        code: The snapshot of the code that the job imports.
        environment: Variables to add to its environment.

    Raises:
        UserError: SLURM refuses the job, or does not answer.
    """
    from dlm.submit.executor import Executor, log_folder, log_pattern  # submitit is slow to import

    settings = dataclasses.replace(slurm.settings, requeue=False, dependency=None)
    need = check_resources(settings, gpus=gpus, max_time_min=slurm.max_time_min(settings))
    name = f"dlm-doctor-{token.stem}"
    job = Job(name=name, overrides=(), run_dir=token.parent, resources=need)
    request = Request(submission=name, jobs=[job], ledger=Ledger(token.parent), code=code, environment=environment)
    logs = log_folder(settings.submitit_folder, token.parent)
    logs.mkdir(parents=True, exist_ok=True)
    log = log_pattern(logs, f"{name}.txt")
    executor = Executor(logs, parameters_of(request, settings, name=name, log=log, at_once=1), file=slurm.file)
    script = token.with_suffix(".sbatch")
    executor.write(check_body(request, settings, token), script)
    job_id = executor.send(script)
    return CheckJob(job_id=job_id, name=name, findings=token.with_suffix(".json"), log=logs / f"{name}.txt")


def check_resources(settings: SlurmSettings, *, gpus: int, max_time_min: int | None) -> Resources:
    """Return what the job requests: one task on one node, whatever a cell needs."""
    return Resources(
        gpus_per_node=gpus,
        cpus_per_task=settings.cpus_per_task or 1,
        mem_gib=HOST_GIB[gpus > 0] if settings.mem_gb is None else settings.mem_gb,
        time_min=min(TIME_MIN, max_time_min or TIME_MIN),
    )


def check_body(request: Request, settings: SlurmSettings, token: Path) -> str:
    """Return what the batch script of the job does, in bash."""
    need = request.jobs[0].resources
    cpus, more = srun_options(need, settings)
    srun = f"srun --unbuffered --nodes=1 --ntasks=1 {cpus}{more}" if settings.use_srun else ""
    lines = [
        "# Written by dlm doctor: a job that looks at its node.",
        *exports(request.code, request.environment),
        *thread_exports(need),
        'DLM_SETUP_TROUBLE=""',
        """trap 'DLM_SETUP_TROUBLE+="$BASH_COMMAND (exit code $?); "' ERR""",
        *settings.setup,
        "trap - ERR",
        "set -u",
        'DLM_SBATCH="$(command -v sbatch || true)"',
        "export DLM_SETUP_TROUBLE DLM_SBATCH",
        "code=0",
        f"{srun}bash -c {shlex.quote(_look(token))} || code=$?",
        *settings.teardown,
        'exit "$code"',
    ]
    return "\n".join(lines)


def _look(token: Path) -> str:
    """Return the command that looks at the node where, and in the container in which, a cell would run."""
    seen, python, findings = (shlex.quote(str(path)) for path in (token, sys.executable, token.with_suffix(".json")))
    lines = [
        f'[ -r {seen} ] || {{ echo "$(hostname)" does not see {seen}; exit {UNSEEN_WORKDIR}; }}',
        f'[ -x {python} ] || {{ echo "$(hostname)" does not see {python}; exit {UNSEEN_PYTHON}; }}',
        f"exec {python} -P -m dlm.train.node_check {findings}",
    ]
    return "\n".join(lines)


def job_now(job: CheckJob) -> JobState | None:
    """Return the state of the job; None if SLURM does not answer."""
    queued, silence = ask_squeue([job.name], [])
    if silence is None and not queued:  # accounting may lag behind, and lists it as running
        ended, _ = ask_sacct([job.job_id], [])
        states = [task.job_state for task in ended if not task.job_state.is_live]
        return states[0] if states else JobState(state=State.LOST, words="SLURM does not say how the job ended")
    return queued[0].job_state if queued else None


def wait_for(job: CheckJob, *, timeout_sec: float, say: Callable[[str], None]) -> JobState | None:
    """Wait until the job has ended, and return its last state; None if SLURM has never told it.

    Args:
        job: The job.
        timeout_sec: How long to wait; the state that is returned after that is that of a job that waits or runs.
        say: Called every 15 s with the state of the job in words.
    """
    deadline, next_tell = time.monotonic() + timeout_sec, time.monotonic() + POLL_SEC
    last: JobState | None = None
    while True:
        now = job_now(job)
        last = now or last
        if (now is not None and not now.is_live) or time.monotonic() >= deadline:
            return last
        if time.monotonic() >= next_tell:
            say("SLURM does not answer" if now is None else now.words)
            next_tell = time.monotonic() + TELL_SEC
        time.sleep(POLL_SEC)


def with_gpus(settings: SlurmSettings, asked: int | None) -> SlurmSettings:
    """Return the settings of the job if the user asks for so many GPUs; None leaves them as they are.

    Raises UserError if the settings name GPUs by a key that allows no other number.
    """
    if asked == 0:
        return dataclasses.replace(settings, gres=None, gpus_per_task=None, mem_per_gpu=None, cpus_per_gpu=None)
    for key in ("gres", "gpus_per_task"):
        if asked is not None and getattr(settings, key) is not None:
            raise UserError(f"--gpus {asked}: hydra.launcher.{key} is {getattr(settings, key)}, so change that key")
    return settings


def num_gpus(settings: SlurmSettings, asked: int | None, *, has_gpus: bool) -> int:
    """Return how many GPUs the job must find; by default one, if the settings or the partition have any."""
    if asked is not None:
        return asked
    if settings.gpus_per_node is not None:
        return min(settings.gpus_per_node, 1)
    return int(has_gpus or settings.gres is not None or settings.gpus_per_task is not None)
