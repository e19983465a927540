"""Keep a small job in the queue that looks after a sweep until its cells have ended: its batch script and its record.

The job runs `dlm follow FOLDER` (dlm.cli.follow), which submits what is worth submitting, and then puts the next
follower into the queue. That one starts when one of the sweep's arrays has ended, or some minutes after this one.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core import paths
from dlm.core.files import OWNER_ONLY, write_json
from dlm.core.lease import Lease
from dlm.core.typed import read_typed
from dlm.record.outcomes import State
from dlm.submit.job import SlurmSettings
from dlm.submit.progress import cells_at_once
from dlm.submit.script import exports, in_header
from dlm.submit.slurm import Slurm
from dlm.submit.submission import PATIENCE_SEC

if TYPE_CHECKING:
    from dlm.submit.table import CellStatus

RECORD, LOG = "ledger/follower.json", "follower.txt"
TIME_MIN, MEM_GIB = 30, 4  # what a follower asks for; fitting and drawing take a minute and less than 2 GiB


@dataclass(frozen=True, kw_only=True)
class Following:
    """How a sweep is looked after: what its followers do, and which of them is the latest."""

    launcher: str = "submitit_slurm"
    override: tuple[str, ...] = ()  # the words of --override of the submission
    cell: tuple[str, ...] = ()  # the words of --cell
    pilot: bool = False
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
        return {
            name: getattr(self, name)
            for name in ("launcher", "override", "cell", "pilot", "allow_dirty", "mail", "webhook")
        }


def read_following(sweep_dir: Path) -> Following | None:
    """Return how a sweep is looked after; None if nobody has asked for it."""
    path = sweep_dir / RECORD
    if not path.is_file():
        return None
    return read_typed(path, Following)


def write_following(sweep_dir: Path, following: Following) -> None:
    """Write down how a sweep is looked after. Only the owner may read it, because a webhook's URL is often a secret."""
    write_json(sweep_dir / RECORD, dataclasses.asdict(following), mode=OWNER_ONLY)


def is_in_queue(following: Following, slurm: Slurm) -> bool:
    """Whether the latest follower waits or runs. If SLURM does not answer, it is taken to be there."""
    if following.name is None or following.ended is not None:
        return False
    jobs = {} if following.job_id is None else {following.job_id: following.name}
    answer = slurm.states(jobs, names=[following.name])
    own = answer.states.get(following.job_id or answer.arrays.get(following.name, ""))
    return answer.silent or (own is not None and own.is_live)


def is_looked_after(folder: Path) -> bool:
    """Whether a follower of the sweep waits or runs, as far as this user may know."""
    try:
        following = read_following(folder)
    except PermissionError:  # see `write_following`
        return False
    return following is not None and following.trouble is None and is_in_queue(following, Slurm())


def is_under_way(cells: Sequence[CellStatus], sweep_dir: Path) -> bool:
    """Whether a watch of a sweep has more to come: a cell runs or will be started, or a job looks after the sweep.

    Between two cells on this machine, some seconds pass in which none runs. A cell that waits for a process here does
    not count by itself, because that process may have died.
    """
    if any(cell.state in (State.RUNNING, State.SUBMITTED) for cell in cells):
        return True
    starts_soon = cells_at_once(cells, time.time()) > 0 and any(cell.is_expected for cell in cells)
    return starts_soon or is_looked_after(sweep_dir)


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
    from dlm.submit.executor import Executor, log_pattern  # submitit is slow to import

    name = f"{sweep_dir.absolute().name}-follower-{uuid.uuid4().hex[:6]}"
    following = dataclasses.replace(following, name=name, job_id=None, trouble=None, ended=None)
    write_following(sweep_dir, following)  # before sbatch, so that its job is found by its name
    script = sweep_dir.absolute() / "ledger" / "follower.sbatch"
    values = _requests(slurm.settings, name=name, log=log_pattern(script.parent, LOG), arrays=arrays)
    executor = Executor(script.parent, values, file=slurm.file)
    executor.write(_body(sweep_dir.absolute(), slurm.settings, code, environment), script)
    following = dataclasses.replace(following, job_id=executor.send(script))
    write_following(sweep_dir, following)
    return following


def submit_mail(address: str, sweep_dir: Path, slurm: Slurm) -> None:
    """Have SLURM send a mail that says that a sweep has ended, by an empty job that asks for one.

    Raises:
        UserError: SLURM refuses the job, or does not answer.
    """
    from dlm.submit.executor import Executor

    script = sweep_dir.absolute() / "ledger" / "mail.sbatch"
    values = _requests(slurm.settings, name=f"{sweep_dir.absolute().name}-has-ended", log="/dev/null", arrays=None)
    values |= {"timeout_min": 1, "mail_type": "END", "mail_user": address}
    executor = Executor(script.parent, values, file=slurm.file)
    executor.write("true", script)
    executor.send(script)


def _requests(settings: SlurmSettings, *, name: str | None, log: str, arrays: Sequence[str] | None) -> dict[str, Any]:
    """Return what a follower requests, as parameters of submitit's executor.

    Args:
        settings: The launcher's keys.
        name: The name of the job.
        log: The file for what it prints, with the patterns of sbatch.
        arrays: The arrays of the sweep that wait or run; None for a job that starts at once.
    """
    chosen = {key: getattr(settings, key) for key in ("partition", "account", "qos")}
    return {
        **{key: value for key, value in chosen.items() if value is not None},
        "name": name,
        "tasks_per_node": 1,
        "cpus_per_task": 1,
        "mem_gb": MEM_GIB,
        "timeout_min": TIME_MIN,
        "wckey": settings.wckey,
        "signal_delay_s": 0,
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": {
            "output": log,
            "requeue": True,  # see ``Slurm.requeue``
            **({} if arrays is None else _begin(arrays, settings.follow_min)),
            **in_header(settings.follower),
        },
    }


def _body(folder: Path, settings: SlurmSettings, code: Path, environment: Mapping[str, str]) -> str:
    """Return what the batch script of a follower does, in bash."""
    exported = {"DLM_WORKDIR": str(folder.parent), "DLM_DATA": str(paths.data_dir()), **environment}
    lines = [
        f"# Written by dlm: the job that looks after {folder.name}.",
        *exports(code, exported),
        *settings.setup,
        f'DLM_FOLLOWER="$SLURM_JOB_ID" {shlex.quote(sys.executable)} -P -m dlm.cli follow {shlex.quote(str(folder))}',
    ]
    return "\n".join(lines)


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
    # Anyone who can write the record can write the id of another job into it.
    if "-follower-" not in (following.name or "") or not is_in_queue(following, Slurm()):
        return f"job {following.job_id}, which looked after the sweep, is not in the queue"
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
