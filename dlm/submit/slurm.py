"""Submit jobs to SLURM, query their states and cancel them, by calling the commands of SLURM."""

from __future__ import annotations

import re
import shutil
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.core.errors import UserError
from dlm.core.files import write_atomic
from dlm.core.lease import live_holder
from dlm.submit.cluster import Answer, Cluster, Event, Request, Submission
from dlm.submit.job import LAUNCHER_CONFIG, Job, SlurmSettings, job_name
from dlm.submit.limits import gpus_of, room_left, shares
from dlm.submit.partitions import controllers_array_limit
from dlm.submit.script import arrays, body_of, halves, job_line, parameters_of
from dlm.submit.slurm_commands import JobLimitError, NoAnswerError, ask_sacct, ask_squeue, output, printed, run
from dlm.submit.slurm_tasks import minutes

if TYPE_CHECKING:
    from dlm.submit.executor import CellJob, Executor

JOB_ID = r"\d+(_\d+)?"
CANCEL_AT_ONCE = 500  # the most ids in one call of scancel
NO_ROOM = "the sweep may not use more at once (hydra.launcher.max_running, max_gpus)"
NO_MORE_JOBS = "SLURM takes no more of your jobs for now"


@dataclass
class Slurm(Cluster):
    """The SLURM cluster to which sbatch submits jobs."""

    name = "slurm"
    queues = True
    settings: SlurmSettings = field(default_factory=SlurmSettings)
    file: str = LAUNCHER_CONFIG  # the launcher's file that has the settings, for messages

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise UserError if sbatch is not on PATH. Whether the jobs fit is checked by SLURM itself in ``submit``."""
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not on PATH: run this on a login node, or choose the launcher submitit_local")

    def max_time_min(self, settings: SlurmSettings) -> int | None:
        """Return the time limit of the partition in minutes, the shortest of several; None if sinfo shows no limit."""
        chosen = settings.partition
        only = [] if chosen is None else [f"--partition={chosen}"]
        rows = [line.split("|") for line in printed(["sinfo", "--noheader", "--format=%P|%l", *only]).splitlines()]
        limits = [minutes(row[1]) for row in rows if len(row) == 2 and (chosen or row[0].endswith("*"))]
        return min((limit for limit in limits if limit is not None), default=None)

    def max_array_size(self) -> int:
        """Return the most tasks in one array: the value of the settings, but at most the limit of the controller."""
        limit = controllers_array_limit()
        return self.settings.max_array_size if limit is None else min(self.settings.max_array_size, limit)

    def submit(self, request: Request) -> Submission:
        """Submit the jobs as arrays, one or more for each resource class; see ``Cluster``.

        Branches start when their trunk has ended, so the jobs of trunks must come before those of branches.
        """
        every = arrays(request, max_size=self.max_array_size())
        waiting = deque(zip(every, shares(every, room_left(self.settings, request.live), self.settings), strict=True))
        jobs: dict[str, CellJob] = {}
        postponed, times = dict[str, str](), list[float]()
        request.before_first()
        full: dict[tuple[str | None, ...], JobLimitError] = {}  # where SLURM takes no more jobs for now
        while waiting:
            array, at_once = waiting.popleft()
            first = array.jobs[0]
            settings = first.settings or self.settings
            place = (settings.partition, settings.account, settings.qos)
            if not at_once or (first.awaits is not None and first.awaits.trunk in postponed) or place in full:
                why = f"{NO_MORE_JOBS} ({full[place]})" if place in full else NO_ROOM
                postponed |= dict.fromkeys((job.name for job in array.jobs), why)
                continue
            trunk = None if first.awaits is None else jobs.get(first.awaits.trunk)
            before = None if first.awaits is None else first.awaits.job_id
            keep_pace(times, self.settings.sbatch_per_min)
            try:
                jobs |= self._submit_array(
                    array, at_once=at_once, after=before if trunk is None else trunk.job_id, num_before=len(jobs)
                )
                for job in array.jobs if trunk is None and before is None else ():
                    if job.awaits is not None and live_holder(job.run_dir.with_name(job.awaits.trunk)) is None:
                        request.on_event(Event(kind="alone", job=job))
            except JobLimitError as error:
                if len(array.jobs) > 1:
                    waiting.extendleft(reversed(halves(array, at_once)))
                else:
                    full[place] = error
                    waiting.appendleft((array, at_once))
        if full and not jobs and not request.live:
            raise next(iter(full.values()))
        ids = {name: job.job_id for name, job in jobs.items()}
        return Submission(submitted=tuple(jobs), job_ids=ids, jobs=jobs, postponed=postponed)

    def _submit_array(self, array: Request, *, at_once: int, after: str | None, num_before: int) -> dict[str, CellJob]:
        """Submit a job array, and return the jobs of its cells.

        Args:
            array: The array.
            at_once: How many of its tasks may run at once.
            after: The id of a job that must have ended before.
            num_before: The number of cells of the same request that are submitted already, for messages.
        """
        from dlm.submit.executor import CellJob, Executor, log_folder, log_pattern  # submitit is slow to import

        settings = array.jobs[0].settings or self.settings
        name = job_name(settings.name or array.ledger.title, array.submission)
        logs = log_folder(settings.submitit_folder, array.ledger.folder)
        log = log_pattern(logs)
        parameters = parameters_of(array, settings, name=name, log=log, at_once=at_once, after=after)
        executor = Executor(logs, parameters, num_jobs=len(array.jobs), file=self.file)
        script = array.ledger.folder.absolute() / f"{array.submission}.sbatch"
        write_atomic(script.with_suffix(".jobs"), "".join(job_line(job) + "\n" for job in array.jobs))
        executor.write(body_of(array, settings), script)
        for folder in (logs, *(job.run_dir for job in array.jobs)):  # an extended plan keeps cells with a directory
            folder.mkdir(parents=True, exist_ok=True)
        array.ledger.intent(
            array.submission,
            array.jobs,
            cluster=self.name,
            code=array.code,
            name=name,
            logs=logs if settings.submitit_folder is not None else None,
            at_once=at_once,
            gpus=gpus_of(array.jobs[0], self.settings),
        )
        array_id = self._send(array, executor, script, name=name, num_before=num_before)
        ids = {job.name: f"{array_id}_{index}" for index, job in enumerate(array.jobs)}
        array.ledger.submitted(array.submission, ids)
        return {job.name: CellJob(logs, ids[job.name], run_dir=job.run_dir) for job in array.jobs}

    def _send(self, array: Request, executor: Executor, script: Path, *, name: str, num_before: int) -> str:
        """Call sbatch, and return the id of the array.

        If sbatch fails, SLURM may have the array nevertheless. The ledger records a refusal only if SLURM certainly
        does not have the array.
        """
        try:
            return executor.send(script)
        except UserError as error:
            answer = self.states({}, names=[name])
            if name in answer.arrays:
                return answer.arrays[name]
            if not (answer.silent and isinstance(error, NoAnswerError)):  # else the next submission looks it up
                array.ledger.refused(array.submission, str(error))
            taken = "1 cell was" if num_before == 1 else f"{num_before} cells were"
            so_far = f"; {taken} taken before, and the same command submits the rest"
            raise type(error)(f"{error}{so_far if num_before else ''}") from error

    def states(
        self,
        jobs: Mapping[str, str],
        *,
        names: Iterable[str] = (),
        users: Collection[int] = (),
        release: bool = False,
    ) -> Answer:
        """Query squeue and sacct for the states of tasks and the ids of arrays; see ``Cluster``.

        squeue lists the tasks that wait or run and, for some minutes, those that have ended; sacct lists those that
        have ended. Tasks must also match the name of their array, because the job ids of a newly installed controller
        start again from the beginning.
        """
        looked_up = set(names)
        all_names = looked_up | set(jobs.values())
        if not all_names:
            return Answer()
        queued, no_queue = ask_squeue(all_names, users)
        ended, no_account = ask_sacct(jobs, looked_up)  # asked last: a job may leave the queue between the two queries
        if no_queue is None:  # a job that is not in the queue has ended, even if accounting lists it as running
            ended = [task for task in ended if not task.job_state.is_live]
        tasks = {task.task_id: task for task in (*ended, *queued) if task.name in all_names}  # squeue takes precedence
        for task_id in jobs.keys() & tasks.keys() if release else ():
            if tasks[task_id].is_held:
                output(["scontrol", "release", task_id])
        taken = [task for task in tasks.values() if task.name in looked_up and task.is_accepted]
        return Answer(
            states={task_id: task.job_state for task_id, task in tasks.items()},
            arrays={str(task.name): task.task_id.split("_")[0] for task in taken},
            warnings=tuple(filter(None, (no_account, no_queue))),
            silent=no_queue is not None,
        )

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel tasks; a task that has already ended is not an error.

        Raises UserError with SLURM's message if SLURM refuses. Also raises it for an id that is none, because the ids
        come from files, and scancel would obey a word such as --user=NAME.
        """
        for one in ids:
            if not re.fullmatch(JOB_ID, one):
                raise UserError(
                    f"{one!r} is no id of a job, and nothing was cancelled: mend it in the ledger/ of the sweep"
                )
        for start in range(0, len(ids), CANCEL_AT_ONCE):
            output(["scancel", *ids[start : start + CANCEL_AT_ONCE]])

    def requeue(self, job_id: str) -> None:
        """Put a job that runs into the queue again. Raises UserError with SLURM's message if SLURM refuses."""
        output(["scontrol", "requeue", job_id])


def keep_pace(times: list[float], per_min: int | None) -> None:
    """Sleep until the rate limit allows one more submission, then append the time of that submission to ``times``.

    Args:
        times: The times of the earlier submissions, by time.monotonic.
        per_min: The most submissions within any minute; None sets no limit.
    """
    if per_min is not None and len(times) >= per_min:
        time.sleep(max(0.0, times[-per_min] + 60 - time.monotonic()))
    times.append(time.monotonic())


def slurm_answers(timeout_sec: float = 5.0) -> bool:
    """Whether sbatch exists and a controller says that it is UP; decides what LAUNCHER=auto chooses."""
    if shutil.which("sbatch") is None:
        return False
    try:
        return re.search(r"\bUP\b", run(["scontrol", "ping"], timeout_sec).stdout) is not None
    except UserError:
        return False
