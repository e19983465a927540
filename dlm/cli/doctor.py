"""Check whether dlm can run on a cluster, first from the login node, then by one job: the verb `dlm doctor`."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.cli import login_node, screen
from dlm.cli.check import FAILED, OK, WARNING, Check, failed, ok
from dlm.cli.compute_node import node_checks, too_late, trouble
from dlm.cli.launcher import LAUNCHER_KEY, SLURM, chosen, is_local, slurm_of
from dlm.core import paths, text
from dlm.core.errors import ExitCode, UserError
from dlm.core.files import read_json
from dlm.core.git import code_origin
from dlm.submit.check_job import CheckJob, num_gpus, submit_check, wait_for, with_gpus
from dlm.submit.slurm import Slurm
from dlm.submit.snapshot import snapshot_code

if TYPE_CHECKING:
    from dlm.cli.options import DoctorOptions

LATE_SEC = 10.0  # how long a network file system may take to show what a job has written


def doctor(options: DoctorOptions) -> int:
    """Print a line for each check, and return the exit code of the command.

    Raises:
        UserError: There is no SLURM, or the launcher or one of its keys is unknown.
    """
    slurm = _cluster(options)
    token = paths.workdir() / "doctor" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}.token"
    checks = _shown(_login_checks(slurm, token, options))
    if options.no_job:
        print("no job was submitted (--no-job)")
    elif any(check.state == FAILED for check in checks):
        print("no job was submitted, because of what FAILED: mend it, and run the same command again")
    else:
        checks += _shown(_job_checks(slurm, token, options))
    return _conclude(checks)


def _shown(checks: Iterable[Check]) -> list[Check]:
    """Print each check as soon as it is known, and return all of them."""
    done = []
    for check in checks:
        screen.show_check(check)
        done.append(check)
    return done


def _cluster(options: DoctorOptions) -> Slurm:
    """Return the SLURM cluster with the settings of the command line."""
    words = options.override or ()
    for word in words:
        if not word.lstrip("+").startswith(LAUNCHER_KEY) or "=" not in word:
            raise UserError(f"--override {word}: `dlm doctor` takes hydra.launcher.KEY=VALUE only")
    launcher = SLURM if options.launcher == "auto" else chosen(options.launcher)
    if is_local(launcher):
        raise UserError(f"--launcher {launcher} runs cells on this machine: `dlm doctor` checks a SLURM cluster")
    slurm = slurm_of(words, allow_dirty=False, launcher=launcher, sweep=paths.workdir() / "doctor")
    slurm.check([])
    return replace(slurm, settings=with_gpus(slurm.settings, options.gpus))


def _login_checks(slurm: Slurm, token: Path, options: DoctorOptions) -> Iterator[Check]:
    """Yield what is found on the login node."""
    answers = login_node.slurm_check()
    yield answers
    if answers.state != FAILED:
        known, listed = login_node.read_partitions()
        yield listed
        if known:
            yield login_node.partition_check(slurm, known)
        yield login_node.arrays_check(slurm.settings)
        yield login_node.associations_check(slurm.settings)
        yield login_node.sacct_check()
    yield login_node.workdir_check(token, token.stem)
    yield login_node.code_check(slurm.settings)
    yield login_node.wandb_check()


def _job_checks(slurm: Slurm, token: Path, options: DoctorOptions) -> Iterator[Check]:
    """Submit the job, wait for it, and yield what it has found."""
    known, _ = login_node.read_partitions()
    has_gpus = any(part.num_gpus for part in login_node.chosen_partitions(slurm.settings, known))
    gpus = num_gpus(slurm.settings, options.gpus, has_gpus=has_gpus)
    try:
        origin = code_origin()
        code = snapshot_code(token.parent, origin=origin)
        environment = {"DLM_CODE": code.name, **(origin.environment() if origin else {})}
        job = submit_check(slurm, token, gpus=gpus, code=code, environment=environment)
    except UserError as error:
        yield failed("job", str(error), "change the key that is named, with --override or in the launcher's file")
        return
    print(f"job {job.job_id} looks at a node{' with a GPU' if gpus else ''}; its log: {job.log}", flush=True)
    yield from _ended(job, slurm, token, gpus, 60 * options.timeout)


def _ended(job: CheckJob, slurm: Slurm, token: Path, gpus: int, timeout_sec: float) -> Iterator[Check]:
    """Wait for the job, and yield what it has found or why it has found nothing. Cancel it if it takes too long."""
    began = time.monotonic()
    try:
        state = wait_for(
            job, timeout_sec=timeout_sec, say=lambda words: print(f"job {job.job_id}: {words}", flush=True)
        )
    except KeyboardInterrupt:
        slurm.cancel([job.job_id])
        print(f"job {job.job_id} is cancelled")
        raise
    found = _findings(job, patience_sec=LATE_SEC if state is not None and state.exit_code in (0, None) else 0)
    if found is not None:
        yield ok("job", f"job {job.job_id} was done {text.duration(time.monotonic() - began)} after its submission")
        yield from node_checks(found, token=token.stem, gpus=gpus)
    elif state is None or state.is_live:
        slurm.cancel([job.job_id])
        yield too_late(job, state, timeout_sec)
    else:
        yield trouble(job, state)


def _findings(job: CheckJob, *, patience_sec: float) -> Any:
    """Return what the job has written; None if there is nothing after so long."""
    deadline = time.monotonic() + patience_sec
    while not job.findings.is_file():
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.5)
    return read_json(job.findings)


def _conclude(checks: Sequence[Check]) -> int:
    """Print how many checks failed, and return the exit code of the command."""
    counts = Counter(check.state for check in checks)
    print(f"{counts[OK]} ok, {counts[WARNING]} with a warning, {counts[FAILED]} FAILED")
    return ExitCode.USER_ERROR if counts[FAILED] else ExitCode.DONE
