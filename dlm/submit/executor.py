"""Submit batch scripts with submitit: its executor writes the header and calls sbatch, and its jobs stand in the queue.

What the body of a script does is in ``script.py``. Every override below says what dlm needs beyond submitit.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils
from submitit.slurm.slurm import SlurmInfoWatcher

from dlm.core.errors import UserError, shown
from dlm.core.files import OWNER_ONLY, write_atomic
from dlm.core.names import is_one_line
from dlm.record.run import read_result
from dlm.submit.job import LAUNCHER_CONFIG
from dlm.submit.slurm_commands import JobLimitError, NoAnswerError, ask_sacct, ask_squeue, run
from dlm.submit.slurm_environment import sbatch_environment

LOG = "%A_%a_0_log.out"  # the log of a task's batch script, named as submitit names it
IDS = r"(%[jtAa]|[._-])+"  # a part of a path that submitit replaces by the id of a job


class _Watcher(SlurmInfoWatcher):
    """Learn the states of jobs from squeue too, because a cluster without accounting has no sacct."""

    def update(self) -> None:
        asked = self._registered - self._finished
        self._num_calls += 1
        queued, _ = ask_squeue((), users=[os.getuid()])
        ended, _ = ask_sacct(asked, ())
        self._last_status_check = time.time()
        known = {task.task_id: task for task in (*ended, *queued)}
        for job_id in asked & known.keys():
            self._info_dict[job_id] = {"JobID": job_id, "State": known[job_id].word}
            if not known[job_id].job_state.is_live:
                self._finished.add(job_id)

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether the job has ended. submitit does not know states such as SUSPENDED, and takes them for an end."""
        self.get_info(job_id, mode)
        return job_id in self._finished


class _Paths(utils.JobPaths):
    """Replace patterns such as %j in the names of files only, because a folder may have a % in its name."""

    def _format_id(self, path: Path | str) -> Path:
        path = Path(path)
        return path if path == self._folder else path.parent / super()._format_id(path.name)


class CellJob(submitit.SlurmJob[float]):
    """The job of a cell: a submitit job whose result is the validation loss in nats per token."""

    watcher = _Watcher(delay_s=60)

    def __init__(
        self, folder: Path | str, job_id: str, tasks: Sequence[int] = (0,), *, run_dir: Path | None = None
    ) -> None:
        super().__init__(folder, job_id, tasks)
        self._paths = _Paths(folder, job_id=job_id)
        self.run_dir = run_dir

    def _get_outcome_and_result(self) -> tuple[str, float]:
        """Return the loss from the record of the run, because there is no pickle of a result.

        Raises submitit's UncompletedJobError if the run has no result.
        """
        result = None if self.run_dir is None else read_result(self.run_dir)
        if result is None:
            words = f"job {self.job_id} ended as {self.state} without a result: see {self.run_dir}"
            raise utils.UncompletedJobError(words)
        return "success", result.loss


class Executor(submitit.SlurmExecutor):
    """submitit's executor for batch scripts of dlm, whose tasks read their cells from a file instead of a pickle.

    A pickle is renamed into place after sbatch has returned: if the submitting process dies in between, its jobs die
    too. It would also tie a job to the libraries of the submitting process.

    Args:
        folder: Where the logs of batch scripts go.
        parameters: The parameters by the names that all executors of submitit share.
        num_jobs: The number of tasks of a job array; None for a job that is no array.
        file: The launcher's file, for messages.
    """

    job_class = CellJob

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, Any],
        *,
        num_jobs: int | None = None,
        file: str = LAUNCHER_CONFIG,
    ) -> None:
        super().__init__(folder)
        self.launcher_file = file
        self.update_parameters(**self._convert_parameters(dict(parameters)))
        if num_jobs is not None:
            self.parameters["map_count"] = num_jobs  # also for one job, so that every cell is a task of an array

    @classmethod
    def affinity(cls) -> int:
        """Ask for nothing: srun is needed on the nodes only, and ``run`` says in one line if sbatch is absent."""
        return 2

    def write(self, body: str, script: Path) -> None:
        """Write a batch script with the header of this executor before anything is submitted.

        Raises UserError if a line break in a path or in another value would become a line of the script.

        The ledger notes the intent to submit it in between, so that a submission that is cut off can be looked up.
        Only the owner may read the script, because the launcher's key ``setup`` may export a secret.
        """
        header = {**self.parameters, **self.parameters.get("additional_parameters", {}), "the folder": str(script)}
        for key, value in header.items():
            if isinstance(value, str) and not is_one_line(value):
                raise UserError(
                    f"{key} of the batch script is {shown(value)}: no line break or other control character is allowed"
                )
        write_atomic(script, self._make_submission_file_text(body, script.stem), mode=OWNER_ONLY)

    def send(self, script: Path) -> str:
        """Submit a batch script and return the id of its job or array.

        Unlike submitit, call sbatch in a clean environment, with a time limit, and pass over what a site prints.

        Raises:
            UserError: SLURM refuses; the message quotes SLURM and names the keys that may be the cause.
            NoAnswerError: The controller did not answer.
        """
        done = run(self._make_submission_command(script), environment=sbatch_environment(script, os.environ))
        if done.returncode:
            words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise refusal(script, words, self.launcher_file)
        job_id = self._get_job_id_from_submission_command(done.stdout)
        if "map_count" in self.parameters:
            with contextlib.suppress(OSError):  # only another name of the script, which Job.paths tells
                _Paths(self.folder, job_id=f"{job_id}_0").submission_file.symlink_to(script.absolute())
        return job_id

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", "--parsable", str(submission_file_path)]

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        """Take the last line that is an id: sites print banners, and submitit would take a number from them."""
        text = string if isinstance(string, str) else string.decode()
        ids = re.findall(r"^(\d+)(?:;.*)?$", text, re.MULTILINE)
        if not ids:
            raise NoAnswerError(f"sbatch printed no job id: {' '.join(text.split())[:200]!r}")
        return str(ids[-1])


def log_folder(submitit_folder: str | None, default: Path) -> Path:
    """Return the folder for the logs of batch scripts: the key submitit_folder, or the default if it is null.

    SLURM creates no folders, so a job that starts before its own folder (`.submitit/%j`) exists would have no log.
    Therefore the path ends before the first part that names a job; the names of the logs hold the ids anyway.
    """
    if submitit_folder is None:
        return default.absolute()
    parts = Path(submitit_folder).expanduser().absolute().parts
    return Path(*itertools.takewhile(lambda part: not re.fullmatch(IDS, part), parts))


def log_pattern(folder: Path, name: str = LOG) -> str:
    """Return the value of sbatch's option --output for a log in a folder."""
    return f"{str(folder).replace('%', '%%')}/{name}"


def refusal(script: Path, words: str, file: str = LAUNCHER_CONFIG) -> UserError:
    """Return the error for a submission that sbatch has refused with these words; ``file`` is the launcher's."""
    error: type[UserError] = UserError
    if re.search("timed out|Unable to contact", words):
        error = NoAnswerError
    elif re.search("MaxSubmit", words) or (
        "job submit limit" in words and not re.search(r"(QOS|Assoc)\w*Limit", words)  # else SLURM names another limit
    ):
        error = JobLimitError
    if re.search("configuration source|contact slurm controller", words):
        return error(f"sbatch finds no SLURM controller: {words} (SLURM_CONF says where one is)")
    return error(f"sbatch refused {script}: {words} (change {key_behind(words)}, see {file})")


# (pattern in the error message of sbatch, keys of hydra.launcher that may be the cause), from messages of SLURM 22.05.
_BEHIND = (
    ("policy", ("qos", "account", "max_array_size", "timeout_min")),
    ("account", ("account", "partition")),
    ("partition", ("partition",)),
    ("time limit|--time", ("timeout_min",)),
    ("qos", ("qos",)),
    ("feature|constraint", ("constraint",)),
    ("memory", ("mem_gb", "mem_per_cpu", "mem_per_gpu")),
    ("array", ("max_array_size",)),
    ("generic resource|gres", ("gres", "gpus_per_node")),
    ("node configuration|cpu count|processors", ("gpus_per_node", "cpus_per_task", "nodes", "mem_gb", "partition")),
    ("node name", ("exclude", "nodelist")),
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
