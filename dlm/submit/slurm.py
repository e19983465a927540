"""Submit jobs to SLURM, ask for their states and cancel them, through its commands."""

from __future__ import annotations

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
from dlm.submit.slurm_tasks import ACCOUNT_COLUMNS, QUEUE_COLUMNS, Task, minutes, parse_tasks

ANSWER_TIMEOUT_SEC = 30.0  # for squeue and sacct, whose answer one can do without
COMMAND_TIMEOUT_SEC = 60.0  # for the other commands: a busy controller answers late
LONGEST_ARGUMENT = 100_000  # characters; Linux allows 128 KiB
LOOK_BACK = "30days"  # how old an interrupted submission may be and still be looked up
CANCEL_AT_ONCE = 500  # ids in one call of scancel
LAUNCHER_CONFIG = "configs/hydra/launcher/submitit_slurm.yaml"


class NoAnswerError(UserError):
    """A command of SLURM failed because the controller did not answer: it may have done what was asked all the same."""


@dataclass
class Slurm(Cluster):
    """The cluster that sbatch talks to."""

    name = "slurm"
    queues = True
    settings: SlurmSettings = field(default_factory=SlurmSettings)

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise UserError where there is no sbatch; whether the jobs fit is for SLURM to say."""
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not on PATH: run this on a login node, or choose LAUNCHER=submitit_local")

    def max_time_min(self) -> int | None:
        """The longest time limit of the partition, of the shortest of several; None when sinfo names none."""
        chosen = self.settings.partition
        only = [] if chosen is None else [f"--partition={chosen}"]
        rows = [line.split("|") for line in _printed(["sinfo", "--noheader", "--format=%P|%l", *only]).splitlines()]
        limits = [minutes(row[1]) for row in rows if len(row) == 2 and (chosen or row[0].endswith("*"))]
        return min((limit for limit in limits if limit is not None), default=None)

    def max_array_size(self) -> int:
        """The most tasks in one array: as the settings say, but no more than the controller allows."""
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", _printed(["scontrol", "show", "config"]))
        return min(self.settings.max_array_size, int(found[1])) if found else self.settings.max_array_size

    def submit(self, request: Request) -> Submission:
        """Submit the jobs as arrays, one or more for each resource class; see ``Cluster``."""
        job_ids, times = dict[str, str](), list[float]()
        for array in arrays(request, max_size=self.max_array_size()):
            script = write_script(array, self.settings)
            for job in array.jobs:  # a cell with a directory stays in the plan when the plan grows
                job.run_dir.mkdir(parents=True, exist_ok=True)
            keep_pace(times, self.settings.sbatch_per_min)
            array.ledger.intent(array, cluster=self.name)
            array_id = self._submit_array(array, script, num_before=len(job_ids))
            ids = {job.name: f"{array_id}_{index}" for index, job in enumerate(array.jobs)}
            array.ledger.submitted(array.submission, ids)
            job_ids |= ids
        return Submission(submitted=tuple(job_ids), job_ids=job_ids)

    def _submit_array(self, array: Request, script: Path, *, num_before: int) -> str:
        """The id of an array. An error of sbatch is a refusal unless SLURM has the array, or may have it."""
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
            UserError: SLURM refuses, in its own words and with the keys that may be the cause.
            NoAnswerError: The controller did not answer.
        """
        done = _run(["sbatch", "--parsable", str(script)])
        if done.returncode == 0:
            return done.stdout.strip().split(";")[0]
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        error = NoAnswerError if re.search("timed out|Unable to contact", words) else UserError
        if re.search("configuration source|contact slurm controller", words):
            raise error(f"sbatch finds no SLURM controller: {words} (SLURM_CONF says where one is)")
        raise error(f"sbatch refused {script}: {words} (change {key_behind(words)}, see {LAUNCHER_CONFIG})")

    def states(self, jobs: Mapping[str, str], *, names: Iterable[str] = (), release: bool = False) -> Answer:
        """Ask squeue and sacct for the states of tasks and for the ids of arrays; see ``Cluster``.

        squeue knows the tasks that wait and run and, for some minutes, those that have ended; sacct knows those that
        have ended. The names of the arrays are compared too, because a new controller counts its ids from the start.
        """
        looked_up = set(names)
        all_names = looked_up | set(jobs.values())
        if not all_names:
            return Answer()
        joined = f"--name={','.join(sorted(all_names))}"
        queue = ["squeue", "--noheader", "--array", "--states=all", f"--Format={QUEUE_COLUMNS}"]
        queued, no_queue = _ask([*queue, joined] if len(joined) < LONGEST_ARGUMENT else queue)
        ended, no_account = _ask_sacct(jobs, looked_up)  # last: a job may leave the queue between the two questions
        if no_queue is None:  # a job that the queue does not hold is over, whatever accounting believes
            ended = [task for task in ended if not task.job_state.is_live]
        tasks = {task.task_id: task for task in (*ended, *queued) if task.name in all_names}  # the queue knows better
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
        """Cancel tasks; one that has ended is no error. Raises UserError with SLURM's own words."""
        for start in range(0, len(ids), CANCEL_AT_ONCE):
            _output(["scancel", *ids[start : start + CANCEL_AT_ONCE]])


def keep_pace(times: list[float], per_min: int | None) -> None:
    """Sleep until one more submission in the last minute is allowed, then add its time to ``times``.

    Args:
        times: When the earlier submissions were made, by time.monotonic.
        per_min: The most submissions in any minute; None sets no limit.
    """
    if per_min is not None and len(times) >= per_min:
        time.sleep(max(0.0, times[-per_min] + 60 - time.monotonic()))
    times.append(time.monotonic())


# What sbatch says and the keys of hydra.launcher that may be the cause (the words of SLURM 22.05, observed).
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
    """The keys of the launcher that may have led to a refusal of sbatch, given SLURM's words."""
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


def _run(command: list[str], timeout_sec: float = COMMAND_TIMEOUT_SEC) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_sec, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not on PATH") from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(f"{command[0]} did not answer within {timeout_sec:g} s: try again later") from error


def _output(command: list[str], timeout_sec: float = COMMAND_TIMEOUT_SEC) -> str:
    """What a command prints. Raises UserError when it fails, with SLURM's own words."""
    done = _run(command, timeout_sec)
    if done.returncode:
        raise UserError(f"{command[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def _printed(command: list[str]) -> str:
    """What a command prints, even if it fails. Raises NoAnswerError when it does not end in time."""
    return _run(command).stdout


def _ask(command: list[str]) -> tuple[list[Task], str | None]:
    """The tasks that squeue or sacct shows, or a warning when the command fails."""
    try:
        return list(parse_tasks(_output(command, ANSWER_TIMEOUT_SEC))), None
    except UserError as error:
        return [], str(error)


def _ask_sacct(jobs: Mapping[str, str], names: set[str]) -> tuple[list[Task], str | None]:
    """The tasks that accounting knows of these job ids and array names, or a warning when it does not answer."""
    sacct = ["sacct", "--noheader", "--parsable2", "--allocations", "--allusers", f"--format={ACCOUNT_COLUMNS}"]
    arrays_of = ",".join(sorted({task_id.split("_")[0] for task_id in jobs}))
    by_id, warning = _ask([*sacct, f"--jobs={arrays_of}"]) if jobs else ([], None)
    if not names:
        return by_id, warning
    by_name, warning = _ask([*sacct, f"--name={','.join(sorted(names))}", f"--starttime=now-{LOOK_BACK}"])
    return by_id + by_name, warning
