"""Keep a small job in the queue that looks after a sweep until its cells have ended: its batch script and its record.

The job runs `dlm follow FOLDER` (dlm.cli.follow), which submits what is worth submitting, and then puts the next
follower into the queue. That one starts when one of the sweep's arrays has ended, or some minutes after this one.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.core import paths
from dlm.core.files import read_json, write_atomic, write_json
from dlm.core.lease import Lease
from dlm.submit.job import SlurmSettings
from dlm.submit.script import option_lines
from dlm.submit.slurm import Slurm
from dlm.submit.submission import PATIENCE_SEC

RECORD, LOG = "ledger/follower.json", "ledger/follower.txt"
TIME_MIN, MEM_GIB = 30, 4  # what a follower asks for; fitting and drawing take a minute and less than 2 GiB


@dataclass(frozen=True, kw_only=True)
class Following:
    """How a sweep is looked after: what its followers do, and which of them is the latest."""

    override: tuple[str, ...] = ()  # the words of --override of the submission
    allow_dirty: bool = False
    mail: str | None = None  # who gets a mail of SLURM at the end
    webhook: str | None = None  # the URL that gets a POST at the end
    name: str | None = None  # the name of the latest follower's job, which no other job has; None before the first
    job_id: str | None = None  # the id of this job; None until SLURM has told it
    failures: int = 0  # how many looks in a row could submit nothing
    trouble: str | None = None  # what keeps the sweep from being looked after
    ended: str | None = None  # how it ended; None while the sweep is looked after

    @property
    def options(self) -> dict[str, Any]:
        """What the user asks for, without what has happened since."""
        return {name: getattr(self, name) for name in ("override", "allow_dirty", "mail", "webhook")}


def read_following(sweep_dir: Path) -> Following | None:
    """Return how a sweep is looked after; None if nobody has asked for it."""
    path = sweep_dir / RECORD
    if not path.is_file():
        return None
    content = read_json(path)
    return Following(**{**content, "override": tuple(content["override"])})


def write_following(sweep_dir: Path, following: Following) -> None:
    """Write down how a sweep is looked after. Only the owner may read it, because a webhook's URL is often a secret."""
    write_json(sweep_dir / RECORD, dataclasses.asdict(following))
    (sweep_dir / RECORD).chmod(0o600)


def is_in_queue(following: Following, slurm: Slurm) -> bool:
    """Whether the latest follower waits or runs. If SLURM does not answer, it is taken to be there."""
    if following.name is None or following.ended is not None:
        return False
    jobs = {} if following.job_id is None else {following.job_id: following.name}
    answer = slurm.states(jobs, names=[following.name])
    own = answer.states.get(following.job_id or answer.arrays.get(following.name, ""))
    return answer.silent or (own is not None and own.is_live)


def submit_follower(
    following: Following,
    sweep_dir: Path,
    slurm: Slurm,
    *,
    code: Path,
    environment: Mapping[str, str],
    arrays: Sequence[str],
) -> Following:
    """Put the next follower into the queue, and return the record that names it.

    Args:
        following: The record.
        sweep_dir: The folder of the sweep.
        slurm: The cluster.
        code: The snapshot of the code that the follower imports.
        environment: Variables to add to its environment.
        arrays: The ids of the arrays of the sweep that wait or run.

    Raises:
        UserError: SLURM refuses the job, or does not answer.
    """
    name = f"{sweep_dir.absolute().name}-follower-{uuid.uuid4().hex[:6]}"
    following = dataclasses.replace(following, name=name, job_id=None, trouble=None, ended=None)
    write_following(sweep_dir, following)  # before sbatch, so that its job is found by its name
    script = sweep_dir.absolute() / "ledger" / "follower.sbatch"
    write_atomic(script, _script(following, sweep_dir, slurm.settings, code, environment, arrays))
    following = dataclasses.replace(following, job_id=slurm.sbatch(script))
    write_following(sweep_dir, following)
    return following


def _script(
    following: Following,
    sweep_dir: Path,
    settings: SlurmSettings,
    code: Path,
    environment: Mapping[str, str],
    arrays: Sequence[str],
) -> str:
    """Return the batch script of a follower."""
    folder = sweep_dir.absolute()
    values = {
        "job-name": following.name,
        "output": f"{folder}/{LOG}".replace("%", "%%"),
        "open-mode": "append",
        "ntasks": 1,
        "cpus-per-task": 1,
        "mem": f"{MEM_GIB}G",
        "time": TIME_MIN,
        **{key: getattr(settings, key) for key in ("partition", "account", "qos")},
        **_begin(arrays, settings.follow_min),
        **settings.follower,
    }
    exported = {"DLM_WORKDIR": str(folder.parent), "DLM_DATA": str(paths.data_dir()), **environment}
    lines = [
        "#!/bin/bash",
        f"# Written by dlm: the job that looks after {folder.name}.",
        *(f"#SBATCH {option}" for option in option_lines(values)),
        "",
        "unset DLM_CONFIGS  # the snapshot's configs count",
        f"export PYTHONPATH={shlex.quote(str(code.absolute()))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
        *settings.setup,
        f'DLM_FOLLOWER="$SLURM_JOB_ID" {shlex.quote(sys.executable)} -P -m dlm.cli follow {shlex.quote(str(folder))}',
    ]
    return "\n".join(lines) + "\n"


def _begin(arrays: Sequence[str], minutes: int) -> dict[str, str]:
    """Return the option of sbatch that says when a follower starts.

    The first one starts after a minute. The others start when one of the arrays has ended, whatever the rest does, or
    `minutes` after the follower that submits them has started. (SLURM forgets an ended job after MinJobAge, five
    minutes by default, and then takes the time as over.)
    """
    before = os.environ.get("DLM_FOLLOWER")
    if before is None or not arrays:
        return {"begin": f"now+{1 if before is None else minutes}minutes"}
    return {"dependency": "?".join([*(f"afterany:{array}" for array in arrays), f"after:{before}+{minutes}"])}


def stop_following(folder: Path) -> str | None:
    """Stop looking after a sweep. Return what was done in words; None if nobody looks after it."""
    following = read_following(folder)
    if following is None or following.ended is not None:
        return None
    with Lease(folder, doing="submitted", patience_sec=PATIENCE_SEC):
        following = read_following(folder) or following
        write_following(folder, dataclasses.replace(following, ended="cancelled"))
    if following.job_id is not None:
        Slurm().cancel([following.job_id])
    return f"job {following.job_id}, which looks after the sweep: cancelled"


def follower_line(folder: Path) -> str | None:
    """Return how a sweep is looked after, for `dlm status`; None if nobody has asked for it."""
    try:
        following = read_following(folder)
    except PermissionError:  # see `write_following`
        return f"only {(folder / RECORD).owner()} can see how the sweep is looked after"
    if following is None:
        return None
    again = f"dlm submit {folder} --launcher submitit_slurm --then report"
    if following.ended is not None:
        return f"looked after until its end: {following.ended}"
    if following.trouble is not None:
        return f"nothing looks after the sweep any more ({following.trouble}); to go on: {again}"
    if not is_in_queue(following, Slurm()):
        return f"nothing looks after the sweep any more: job {following.job_id} has left the queue; to go on: {again}"
    return f"job {following.job_id} looks after the sweep, and then writes the report"
