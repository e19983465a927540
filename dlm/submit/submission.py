"""dispatch: jobs -> processes here or arrays on SLURM. The one submission core, called by submit and launchers."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlm.core.errors import UserError
from dlm.core.git import code_origin
from dlm.core.lease import Lease
from dlm.record.outcomes import State
from dlm.submit.job import Job, job_name
from dlm.submit.ledger import CellNow, Ledger
from dlm.submit.local import Event, LocalPool
from dlm.submit.script import Array, arrays, write_script
from dlm.submit.slurm import Slurm
from dlm.submit.snapshot import check_clean, snapshot_code
from dlm.submit.state import local_ending, reconciled

UNSURE = "did not answer|timed out|Unable to contact"  # what sbatch may say of a job that SLURM has taken all the same


PATIENCE_SEC = 120.0  # for another submission of the same sweep; longer than a dead one's lease stays fresh


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What became of every cell asked for."""

    submitted: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)  # cell -> why nothing was started
    job_ids: Mapping[str, str] = field(default_factory=dict)  # SLURM's
    endings: Mapping[str, tuple[State, str | None]] = field(default_factory=dict)  # of local processes
    exit_codes: Mapping[str, int] = field(default_factory=dict)  # of local processes, -9 for SIGKILL
    interrupted: bool = False  # by Ctrl-C or SIGTERM: some cells never started

    @property
    def failed(self) -> dict[str, tuple[State, str | None]]:
        """The local endings that are neither done nor to be continued."""
        fine = (State.DONE, State.PREEMPTED)
        return {name: ending for name, ending in self.endings.items() if ending[0] not in fine}


def submit_jobs(
    jobs: Sequence[Job],
    *,
    cluster: LocalPool | Slurm,
    sweep_dir: Path,
    was: Mapping[str, CellNow] | None = None,
    steps: Mapping[str, int] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Submission:
    """The submission core: on SLURM returns when sbatch has taken every array, locally when every process ended.

    ``was`` (cell -> the state that makes it run again) and ``steps`` (cell -> planned last step) come from the plan.
    On SLURM the caller holds ``submitting``.
    """
    if not jobs:
        return Submission()
    origin = code_origin()
    if isinstance(cluster, Slurm) and not cluster.settings.allow_dirty:
        check_clean(origin)
    ledger, code = Ledger(sweep_dir), snapshot_code(sweep_dir, origin=origin)
    submission = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    facts = {"DLM_CODE": code.name, **(origin.environment() if origin else {})}
    if isinstance(cluster, Slurm):
        return _submit_to_slurm(jobs, cluster, ledger, submission=submission, code=code, was=was or {}, facts=facts)
    ledger.intent(submission, cluster="local", jobs=jobs, code=code, was=was or {})
    endings: dict[str, tuple[State, str | None]] = {}

    def record(event: Event) -> None:
        if event.kind == "ended" and event.exit_code is not None:
            name = event.job.name
            ending = local_ending(event.job, event.exit_code, steps=(steps or {}).get(name))
            endings[name] = ending
            ledger.ended(name, state=ending[0], exit_code=event.exit_code, reason=ending[1])
        on_event(event)

    def wanted(job: Job) -> bool:
        return job.name not in ledger.cancelled_now()

    facts["DLM_SUBMISSION"] = submission
    result = cluster.run(jobs, code=code, environment=facts, wanted=wanted, on_event=record, on_tick=on_tick)
    return Submission(
        submitted=tuple(job.name for job in jobs),
        endings=endings,
        exit_codes=result.exit_codes,
        interrupted=result.interrupted,
    )


@contextlib.contextmanager
def submitting(cluster: LocalPool | Slurm, sweep_dir: Path, cell_ids: Sequence[str]) -> Iterator[None]:
    """On SLURM one submission of a sweep at a time, after what an earlier one left unfinished is written down.

    Raises UserError when another goes on for over PATIENCE_SEC. Here the leases of the cells suffice.
    """
    if not isinstance(cluster, Slurm):
        yield
        return
    cluster.check_there()
    with Lease(sweep_dir, doing="submitted", patience_sec=PATIENCE_SEC):
        reconciled(sweep_dir, cell_ids, repair=True)
        yield


def _submit_to_slurm(
    jobs: Sequence[Job],
    cluster: Slurm,
    ledger: Ledger,
    *,
    submission: str,
    code: Path,
    was: Mapping[str, CellNow],
    facts: Mapping[str, str],
) -> Submission:
    job_ids: dict[str, str] = {}
    pace = Pace(cluster.settings.sbatch_per_min)
    for array in arrays(jobs, submission=submission, max_size=cluster.max_array_size()):
        script = write_script(array, settings=cluster.settings, code=code, folder=ledger.folder, facts=facts)
        for job in array.jobs:  # a plan that grows keeps the cells that have a directory
            job.run_dir.mkdir(parents=True, exist_ok=True)
        pace.wait()
        ledger.intent(array.submission, cluster="slurm", jobs=array.jobs, code=code, was=was)
        array_id = _sbatch(cluster, script, array, ledger, taken=len(job_ids))
        ids = {job.name: f"{array_id}_{index}" for index, job in enumerate(array.jobs)}
        ledger.submitted(array.submission, ids)
        job_ids |= ids
    return Submission(submitted=tuple(job_ids), job_ids=job_ids)


def _sbatch(cluster: Slurm, script: Path, array: Array, ledger: Ledger, *, taken: int) -> str:
    """The id of an array; a refusal is written down, unless SLURM has the array all the same (sbatch timed out)."""
    try:
        return cluster.sbatch(script)
    except UserError as error:
        name = job_name(ledger.folder.absolute().parent.name, array.submission)
        answer = cluster.states({}, names=[name])
        if name in answer.arrays:
            return answer.arrays[name]
        if not answer.silent or not re.search(UNSURE, str(error)):  # else the next submission looks it up
            ledger.refused(array.submission, str(error))
        so_far = f"; {taken} cells were taken before, and the same command submits the rest" if taken else ""
        raise UserError(f"{error}{so_far}") from error


class Pace:
    """At most ``per_min`` calls of ``wait`` return in any minute; None sets no limit."""

    def __init__(self, per_min: int | None) -> None:
        self.per_min, self.times = per_min, list[float]()

    def wait(self) -> None:
        """Until the next one may go ahead."""
        if self.per_min is None:
            return
        if len(self.times) >= self.per_min:
            time.sleep(max(0.0, self.times[-self.per_min] + 60 - time.monotonic()))
        self.times.append(time.monotonic())


def override(key: str, value: str) -> str:
    """``key=value`` in Hydra's grammar, quoted where it must be."""
    return f"{key}={quote(value)}"


def quote(value: str) -> str:
    """A text value in Hydra's grammar. Raises UserError for what would be an interpolation."""
    if "${" in value:
        raise UserError(f"{value!r} holds '${{', which Hydra would replace: use a path without it")
    name = re.fullmatch(r"/[\w./+@%-]*|[A-Za-z][\w-]*", value, flags=re.ASCII)
    if name and value.lower() not in ("true", "false", "null", "nan", "inf"):
        return value
    # Inside quotes a backslash counts only before a quote (Hydra's override grammar).
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"'{escaped}'"
