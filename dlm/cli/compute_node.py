"""Turn what a job has found on its node, or why there is no such job, into the lines of `dlm doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlm.cli.check import Check, failed, ok, warning
from dlm.core import text
from dlm.submit.cell_now import JobState
from dlm.submit.check_job import UNSEEN_PYTHON, UNSEEN_WORKDIR, CheckJob
from dlm.submit.job_endings import last_line

APART_SEC = 5.0  # how far clocks may differ
SHARED = "choose a folder that all nodes share: DLM_WORKDIR"
IN_CONTAINER = " (in a container: mount it, see hydra.launcher.srun_args)"
SETUP = "hydra.launcher.setup"


def node_checks(found: Mapping[str, Any], *, token: str, gpus: int) -> list[Check]:
    """Return the lines of what a job has found.

    Args:
        found: What ``dlm.train.node_check`` has written.
        token: What the login node has written to the work directory.
        gpus: How many GPUs the job has requested, at least.
    """
    return [
        _host(found),
        _workdir(found, token),
        _clock(found),
        _setup(found),
        *(_module(name, result) for name, result in found["modules"].items()),
        _gpu(found["cuda"], gpus),
        _sbatch(found),
    ]


def _host(found: Mapping[str, Any]) -> Check:
    cores, threads = found["num_cpus"], found["omp_threads"]
    words = f"{found['host']}: {cores} core{'s' if cores != 1 else ''}, OMP_NUM_THREADS={threads}"
    if str(threads).isdecimal() and int(threads) > cores:
        return warning("node", words, f"more threads than cores: see hydra.launcher.cpus_per_task and {SETUP}")
    return ok("node", words)


def _workdir(found: Mapping[str, Any], token: str) -> Check:
    if found["token"] != token:
        return failed("node workdir", "the node sees another folder of the same name", SHARED)
    return ok("node workdir", "the node reads and writes it")


def _clock(found: Mapping[str, Any]) -> Check:
    apart_sec = found["clock_ahead_sec"]
    words = f"{abs(apart_sec):.1f} s {'ahead of' if apart_sec >= 0 else 'behind'} the clock of the file server"
    if abs(apart_sec) > APART_SEC:
        return warning("node clock", words, "ask the administrators to set it; times in logs and W&B are wrong")
    return ok("node clock", words)


def _setup(found: Mapping[str, Any]) -> Check:
    if trouble := found["setup_trouble"]:
        return warning("node setup", f"these commands failed: {trouble[:300]}", f"mend {SETUP} if they matter")
    return ok("node setup", f"no command of {SETUP} failed")


def _module(name: str, result: Mapping[str, Any]) -> Check:
    if error := result.get("error"):
        return failed(f"node {name}", error, f"install dlm where the nodes see it, or mend {SETUP}")
    return ok(f"node {name}", f"{name} {result['found']}")


def _gpu(cuda: Mapping[str, Any], gpus: int) -> Check:
    if error := cuda.get("error"):
        return failed("node GPU", error, f"compare `nvidia-smi` in a job with the CUDA of torch; see {SETUP}")
    seen, built_for = cuda["found"]["gpus"], cuda["found"]["built_for"]
    built = f"torch is built for CUDA {built_for}" if built_for else "torch is built without CUDA"
    if len(seen) < gpus:
        advice = "install a torch for the driver of the nodes (`nvidia-smi`), or run with --gpus 0"
        return failed("node GPU", f"{gpus} requested, and torch sees {len(seen)}; {built}", advice)
    if not seen:
        return ok("node GPU", "none requested")
    words = f"{len(seen)} x {seen[0]['name']}, {seen[0]['memory_gib']:.0f} GiB; {built}"
    if not cuda["found"]["bf16"]:
        return warning("node GPU", f"{words}; no bf16", "train with trainer.precision=32-true, or on newer GPUs")
    return ok("node GPU", f"{words}; bf16")


def _sbatch(found: Mapping[str, Any]) -> Check:
    if found["sbatch"] is None:
        advice = "without it, `--then report` cannot submit cells again: use --no-then, and repeat the command"
        return warning("node sbatch", "sbatch is not on PATH in jobs", advice)
    return ok("node sbatch", found["sbatch"])


def trouble(job: CheckJob, state: JobState | None) -> Check:
    """Return the line for a job that has ended without findings."""
    words = "SLURM does not answer" if state is None else state.words
    code = None if state is None else state.exit_code
    said = last_line(job.log)
    if code == UNSEEN_WORKDIR or (said is None and state is not None and state.could_not_start):
        return failed("node workdir", f"the node does not see {job.findings.parent}", f"{SHARED}{IN_CONTAINER}")
    if code == UNSEEN_PYTHON:
        return failed("node python", said or words, f"install dlm in a folder that all nodes share{IN_CONTAINER}")
    if said is None:
        return failed("job", f"{words}; it has printed nothing", f"see {job.findings.with_suffix('.sbatch')}")
    return failed("job", f"{words}; its last line: {said}", f"mend {SETUP} or the cause; the log is {job.log}")


def too_late(job: CheckJob, state: JobState | None, timeout_sec: float) -> Check:
    """Return the line for a job that was cancelled because it had not ended in time."""
    words = "SLURM did not answer" if state is None else state.words
    found = f"not done after {text.duration(timeout_sec)}: {words}; job {job.job_id} is cancelled"
    return failed("job", found, "wait longer (--timeout MINUTES), or try another hydra.launcher.partition or --gpus 0")
