"""Run the commands of SLURM in a clean environment, and query squeue and sacct."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Mapping

from dlm.core.errors import UserError
from dlm.submit.slurm_environment import clean
from dlm.submit.slurm_tasks import ACCOUNT_COLUMNS, QUEUE_COLUMNS, Task, parse_tasks

ANSWER_TIMEOUT_SEC = 30.0  # for squeue and sacct, without whose answers dlm can still continue
COMMAND_TIMEOUT_SEC = 60.0  # for the other commands: a busy controller answers late
LONGEST_ARGUMENT = 100_000  # characters of one command-line argument; Linux allows 128 KiB
LOOK_BACK = "30days"  # sacct looks up interrupted submissions that are at most this old


class NoAnswerError(UserError):
    """The SLURM controller did not answer a command. It may have carried out the request all the same."""


class JobLimitError(UserError):
    """SLURM takes no more jobs of this user, account or QOS for now."""


def run(
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


def output(command: list[str], timeout_sec: float = COMMAND_TIMEOUT_SEC) -> str:
    """Run a command and return its output. Raises UserError with the error message of SLURM if the command fails."""
    done = run(command, timeout_sec)
    if done.returncode:
        raise UserError(f"{command[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def printed(command: list[str]) -> str:
    """What a command prints, even if it fails. Raises NoAnswerError when it does not end in time."""
    return run(command).stdout


def _ask(command: list[str]) -> tuple[list[Task], str | None]:
    """Run squeue or sacct. Returns (the tasks that it lists, a warning if the command fails, otherwise None)."""
    try:
        return list(parse_tasks(output(command, ANSWER_TIMEOUT_SEC))), None
    except UserError as error:
        return [], str(error)


def ask_squeue(names: Collection[str], users: Collection[int]) -> tuple[list[Task], str | None]:
    """List the tasks that wait or run and, for some minutes, those that have ended.

    Args:
        names: The names of the arrays to list; those of others are listed too if the names make too long an argument.
        users: The ids of the users whose tasks are listed; if empty, those of all users.

    Returns:
        (the tasks, a warning if squeue fails, otherwise None).
    """
    command = ["squeue", "--noheader", "--array", "--states=all", f"--Format={QUEUE_COLUMNS}"]
    if users:
        command.append(f"--user={','.join(map(str, sorted(users)))}")
    joined = f"--name={','.join(sorted(names))}"
    return _ask([*command, joined] if names and len(joined) < LONGEST_ARGUMENT else command)


def ask_sacct(jobs: Collection[str], names: Collection[str]) -> tuple[list[Task], str | None]:
    """Query sacct for tasks by job id and by array name.

    Args:
        jobs: Task ids.
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
