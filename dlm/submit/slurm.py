"""Submit jobs to SLURM, query their states and cancel them, by calling the commands of SLURM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlm.core.errors import UserError
from dlm.submit.cluster import Answer, Cluster, Request, Submission
from dlm.submit.job import Job, SlurmSettings, job_name
from dlm.submit.script import arrays, write_script
from dlm.submit.slurm_environment import clean, sbatch_environment
from dlm.submit.slurm_tasks import ACCOUNT_COLUMNS, QUEUE_COLUMNS, Task, minutes, parse_tasks

ANSWER_TIMEOUT_SEC = 30.0  # for squeue and sacct, without whose answers dlm can still continue
COMMAND_TIMEOUT_SEC = 60.0  # for the other commands: a busy controller answers late
LONGEST_ARGUMENT = 100_000  # characters of one command-line argument; Linux allows 128 KiB
LOOK_BACK = "30days"  # sacct looks up interrupted submissions that are at most this old
CANCEL_AT_ONCE = 500  # the most ids in one call of scancel
LAUNCHER_CONFIG = "configs/hydra/launcher/submitit_slurm.yaml"


class NoAnswerError(UserError):
    """The SLURM controller did not answer a command. It may have carried out the request all the same."""


@dataclass
class Slurm(Cluster):
    """The SLURM cluster to which sbatch submits jobs."""

    name = "slurm"
    queues = True
    settings: SlurmSettings = field(default_factory=SlurmSettings)

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise UserError if sbatch is not on PATH. Whether the jobs fit is checked by SLURM itself in ``submit``."""
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not on PATH: run this on a login node, or choose LAUNCHER=submitit_local")

    def max_time_min(self) -> int | None:
        """Return the time limit of the partition in minutes, the shortest of several; None if sinfo shows no limit."""
        chosen = self.settings.partition
        only = [] if chosen is None else [f"--partition={chosen}"]
        rows = [line.split("|") for line in _printed(["sinfo", "--noheader", "--format=%P|%l", *only]).splitlines()]
        limits = [minutes(row[1]) for row in rows if len(row) == 2 and (chosen or row[0].endswith("*"))]
        return min((limit for limit in limits if limit is not None), default=None)

    def max_array_size(self) -> int:
        """Return the most tasks in one array: the value of the settings, but at most the limit of the controller."""
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", _printed(["scontrol", "show", "config"]))
        return min(self.settings.max_array_size, int(found[1])) if found else self.settings.max_array_size

    def submit(self, request: Request) -> Submission:
        """Submit the jobs as arrays, one or more for each resource class; see ``Cluster``.

        Branches start when their trunk has ended, so the jobs of trunks must come before those of branches.
        """
        job_ids, times = dict[str, str](), list[float]()
        for array in arrays(request, max_size=self.max_array_size()):
            awaited = array.jobs[0].awaits
            after = None if awaited is None else job_ids.get(awaited.trunk, awaited.job_id)
            script = write_script(array, self.settings, after=after)
            for job in array.jobs:  # when a plan is extended, it keeps the cells that have a directory
                job.run_dir.mkdir(parents=True, exist_ok=True)
            keep_pace(times, self.settings.sbatch_per_min)
            array.ledger.intent(array.submission, array.jobs, cluster=self.name, code=array.code)
            array_id = self._submit_array(array, script, num_before=len(job_ids))
            ids = {job.name: f"{array_id}_{index}" for index, job in enumerate(array.jobs)}
            array.ledger.submitted(array.submission, ids)
            job_ids |= ids
        return Submission(submitted=tuple(job_ids), job_ids=job_ids)

    def _submit_array(self, array: Request, script: Path, *, num_before: int) -> str:
        """Submit a job array and return its id.

        If sbatch fails, SLURM may have the array nevertheless. The ledger records a refusal only if SLURM certainly
        does not have the array.
        """
        try:
            return self.sbatch(script)
        except UserError as error:
            name = job_name(array.ledger.title, array.submission)
            answer = self.states({}, names=[name])
            if name in answer.arrays:
                return answer.arrays[name]
            if not (answer.silent and isinstance(error, NoAnswerError)):  # else the next submission looks it up
                array.ledger.refused(array.submission, str(error))
            so_far = f"; {num_before} cells were taken before, and the same command submits the rest"
            raise UserError(f"{error}{so_far if num_before else ''}") from error

    def sbatch(self, script: Path) -> str:
        """Submit a batch script and return the id of its array.

        Raises:
            UserError: SLURM refuses; the message quotes SLURM and names the keys that may be the cause.
            NoAnswerError: The controller did not answer.
        """
        done = _run(["sbatch", "--parsable", str(script)], environment=sbatch_environment(script, os.environ))
        if done.returncode == 0:
            ids = re.findall(r"^(\d+)(?:;.*)?$", done.stdout, re.MULTILINE)  # a site may print a banner around the id
            if not ids:
                raise NoAnswerError(f"sbatch printed no job id: {' '.join(done.stdout.split())[:200]!r}")
            return str(ids[-1])
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        error = NoAnswerError if re.search("timed out|Unable to contact", words) else UserError
        if re.search("configuration source|contact slurm controller", words):
            raise error(f"sbatch finds no SLURM controller: {words} (SLURM_CONF says where one is)")
        raise error(f"sbatch refused {script}: {words} (change {key_behind(words)}, see {LAUNCHER_CONFIG})")

    def states(self, jobs: Mapping[str, str], *, names: Iterable[str] = (), release: bool = False) -> Answer:
        """Query squeue and sacct for the states of tasks and the ids of arrays; see ``Cluster``.

        squeue lists the tasks that wait or run and, for some minutes, those that have ended; sacct lists those that
        have ended. Tasks must also match the name of their array, because the job ids of a newly installed controller
        start again from the beginning.
        """
        looked_up = set(names)
        all_names = looked_up | set(jobs.values())
        if not all_names:
            return Answer()
        joined = f"--name={','.join(sorted(all_names))}"
        queue = ["squeue", "--noheader", "--array", "--states=all", f"--Format={QUEUE_COLUMNS}"]
        queued, no_queue = _ask([*queue, joined] if len(joined) < LONGEST_ARGUMENT else queue)
        ended, no_account = _ask_sacct(jobs, looked_up)  # asked last: a job may leave the queue between the two queries
        if no_queue is None:  # a job that is not in the queue has ended, even if accounting lists it as running
            ended = [task for task in ended if not task.job_state.is_live]
        tasks = {task.task_id: task for task in (*ended, *queued) if task.name in all_names}  # squeue takes precedence
        for task_id in jobs.keys() & tasks.keys() if release else ():
            if tasks[task_id].is_held:
                _output(["scontrol", "release", task_id])
        taken = [task for task in tasks.values() if task.name in looked_up and task.is_accepted]
        return Answer(
            states={task_id: task.job_state for task_id, task in tasks.items()},
            arrays={str(task.name): task.task_id.split("_")[0] for task in taken},
            warnings=tuple(filter(None, (no_account, no_queue))),
            silent=no_queue is not None,
        )

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel tasks; a task that has already ended is not an error.

        Raises UserError with SLURM's message if SLURM refuses.
        """
        for start in range(0, len(ids), CANCEL_AT_ONCE):
            _output(["scancel", *ids[start : start + CANCEL_AT_ONCE]])


def keep_pace(times: list[float], per_min: int | None) -> None:
    """Sleep until the rate limit allows one more submission, then append the time of that submission to ``times``.

    Args:
        times: The times of the earlier submissions, by time.monotonic.
        per_min: The most submissions within any minute; None sets no limit.
    """
    if per_min is not None and len(times) >= per_min:
        time.sleep(max(0.0, times[-per_min] + 60 - time.monotonic()))
    times.append(time.monotonic())


# (pattern in the error message of sbatch, keys of hydra.launcher that may be the cause), from messages of SLURM 22.05.
_BEHIND = (
    ("policy", ("qos", "account", "max_array_size", "timeout_min")),
    ("account", ("account", "partition")),
    ("partition", ("partition",)),
    ("time limit|--time", ("timeout_min",)),
    ("qos", ("qos",)),
    ("feature|constraint", ("constraint",)),
    ("memory", ("mem_gb",)),
    ("array", ("max_array_size",)),
    ("generic resource|gres", ("gres", "gpus_per_node")),
    ("node configuration|cpu count|processors", ("gpus_per_node", "cpus_per_task", "nodes", "mem_gb", "partition")),
    ("node name", ("exclude",)),
    ("reservation|option", ("additional_parameters",)),
)


def key_behind(words: str) -> str:
    """Return the keys of the launcher that may be the cause of an error message of sbatch."""
    if re.search("dependency", words, re.IGNORECASE):
        return "branches of the definition to false, because branches wait for their trunk by --dependency"
    for pattern, keys in _BEHIND:
        if re.search(pattern, words, re.IGNORECASE):
            return " or ".join(f"hydra.launcher.{key}" for key in keys)
    return "hydra.launcher.*"


def slurm_answers(timeout_sec: float = 5.0) -> bool:
    """Whether sbatch exists and a controller says that it is UP; decides what LAUNCHER=auto chooses."""
    if shutil.which("sbatch") is None:
        return False
    try:
        return re.search(r"\bUP\b", _run(["scontrol", "ping"], timeout_sec).stdout) is not None
    except UserError:
        return False


def _run(
    command: list[str], timeout_sec: float = COMMAND_TIMEOUT_SEC, *, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM, by default in an environment without any of the variables that change what it does."""
    env = clean(os.environ) if environment is None else environment
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_sec, check=False, env=env)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not on PATH") from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(f"{command[0]} did not answer within {timeout_sec:g} s: try again later") from error


def _output(command: list[str], timeout_sec: float = COMMAND_TIMEOUT_SEC) -> str:
    """Run a command and return its output. Raises UserError with the error message of SLURM if the command fails."""
    done = _run(command, timeout_sec)
    if done.returncode:
        raise UserError(f"{command[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def _printed(command: list[str]) -> str:
    """What a command prints, even if it fails. Raises NoAnswerError when it does not end in time."""
    return _run(command).stdout


def _ask(command: list[str]) -> tuple[list[Task], str | None]:
    """Run squeue or sacct. Returns (the tasks that it lists, a warning if the command fails, otherwise None)."""
    try:
        return list(parse_tasks(_output(command, ANSWER_TIMEOUT_SEC))), None
    except UserError as error:
        return [], str(error)


def _ask_sacct(jobs: Mapping[str, str], names: set[str]) -> tuple[list[Task], str | None]:
    """Query sacct for tasks by job id and by array name.

    Args:
        jobs: Task id -> name of the job array.
        names: The names of arrays whose ids are unknown.

    Returns:
        (the tasks that sacct lists, a warning if the last query failed, otherwise None).
    """
    sacct = ["sacct", "--noheader", "--parsable2", "--allocations", "--allusers", f"--format={ACCOUNT_COLUMNS}"]
    arrays_of = ",".join(sorted({task_id.split("_")[0] for task_id in jobs}))
    by_id, warning = _ask([*sacct, f"--jobs={arrays_of}"]) if jobs else ([], None)
    if not names:
        return by_id, warning
    by_name, warning = _ask([*sacct, f"--name={','.join(sorted(names))}", f"--starttime=now-{LOOK_BACK}"])
    return by_id + by_name, warning
