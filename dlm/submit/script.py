"""Group jobs into job arrays, and say what the batch script of an array requests and does.

Jobs that need the same resources share an array. submitit writes the header of the script (``executor.py``). A user can
read a script, edit it and submit it by hand.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlm.core.errors import NOTHING_TO_DO, ExitCode, UserError
from dlm.submit.cluster import Request
from dlm.submit.job import THREAD_VARIABLES, Job, Resources, SlurmSettings

LONGEST_DELAY_S = 65535  # the longest delay that sbatch --signal accepts


def arrays(request: Request, *, max_size: int) -> list[Request]:
    """Divide a request into one request for each job array; job i of such a request becomes task i of the array.

    The jobs of an array need the same resources and settings, wait for the same trunk and keep their order; an array
    has at most ``max_size`` jobs.
    """
    classes: dict[tuple[Resources, str | None, str], list[Job]] = {}
    for job in request.jobs:
        trunk = None if job.awaits is None else job.awaits.trunk
        classes.setdefault((job.resources, trunk, repr(job.settings)), []).append(job)
    found: list[Request] = []
    for members in classes.values():
        for start in range(0, len(members), max_size):
            name, jobs = f"{request.submission}-{len(found)}", members[start : start + max_size]
            found.append(dataclasses.replace(request, submission=name, jobs=jobs))
    return found


def halves(array: Request, at_once: int) -> list[tuple[Request, int]]:
    """Return the array as two with about half the jobs each, and how many tasks of each may run at once."""
    middle = (len(array.jobs) + 1) // 2
    parts = (array.jobs[:middle], array.jobs[middle:])
    return [
        (dataclasses.replace(array, submission=f"{array.submission}-{i}", jobs=jobs), (at_once + 1 - i) // 2)
        for i, jobs in enumerate(parts)
    ]


def job_line(job: Job) -> str:
    """Return the line of a job in the jobs file: the run directory and the overrides, quoted for a shell.

    Raises:
        UserError: The run directory or an override contains a line break or a null character.
    """
    words = (str(job.run_dir.absolute()), *job.overrides)
    for word in words:
        if "\n" in word or "\0" in word:
            raise UserError(f"{job.name} has an override with a line break, {word!r}: write it on one line")
    return shlex.join(words)


# SLURM itself requeues a job that it preempts without a grace period. A cancelled job is no longer RUNNING, so the
# script does not requeue it.
REQUEUE = (
    "# The cell is to be continued: it was told to stop and wrote a checkpoint, or another process still runs it.",
    "# Array and task together name the task: one task of each array has the id of the array, which means all tasks.",
    'task="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
    f'if [ "$code" -eq {ExitCode.PREEMPTED:d} ] && [ "$(squeue -h -j "$task" -o %T)" = RUNNING ]{{and_may}}; then',
    '    scontrol requeue "$task"',
    "fi",
)
# Without srun, SLURM tells the batch script alone that the job is to stop, so the script passes this on.
PASS_ON = (
    'cell=""',
    'trap \'[ -z "$cell" ] || kill -USR2 "$cell"\' USR2 TERM',
)
WITHOUT_SRUN = (
    '    {python} dlm.launch "$@" >> "$run_dir/log.txt" 2>> "$run_dir/{errors}" &',
    "    cell=$!",
    '    while kill -0 "$cell" 2> /dev/null; do wait "$cell" || true; done  # a signal interrupts wait',
    '    wait "$cell" || code=$?  # bash keeps the exit code of the cell',
)


def body_of(array: Request, settings: SlurmSettings) -> str:
    """Return what the batch script of a job array does, in bash.

    Args:
        array: The array, one of the requests that ``arrays`` returns.
        settings: The launcher's keys.

    Raises:
        UserError: The settings give the GPUs of a node another number of tasks, or count time limits without any.
    """
    need = array.jobs[0].resources
    if need.gpus_per_node > 1 and need.tasks_per_node != need.gpus_per_node:
        raise UserError(
            f"{array.jobs[0].name} has {need.gpus_per_node} GPUs on a node and hydra.launcher.tasks_per_node is "
            f"{need.tasks_per_node}: each GPU needs a task; set it to null"
        )
    if settings.max_num_timeout is not None and need.time_min is None:
        raise UserError("hydra.launcher.max_num_timeout counts time limits, and there is none: set timeout_min too")
    jobs_file = shlex.quote(f"{array.ledger.folder.absolute()}/{array.submission}.jobs")
    python = f"{shlex.quote(sys.executable)} -P -m"
    lines = [
        f"# Written by dlm: {len(array.jobs)} cells of {array.ledger.title}, submission {array.submission}.",
        "# Task i runs line i+1 of the jobs file: a run directory, then the overrides of dlm.launch.",
        *exports(array.code, {"DLM_SUBMISSION": array.submission, **array.environment}),
        "export DLM_GPUS_HELD=$((${SLURM_GPUS_ON_NODE:-0} * ${SLURM_NNODES:-1}))",
        *thread_exports(need),
        *settings.setup,  # before `set -u`, because the startup files of shells and of conda read unset variables
        "set -u",
        *(() if settings.use_srun else PASS_ON),
        f'eval "set -- $(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {jobs_file})"',
        "run_dir=$1",
        "shift",
        'mkdir -p "$run_dir"',
        "code=0",
        "began=$(date +%s)",
        f'{python} dlm.submit.admit "$run_dir" || code=$?',
        'if [ "$code" -eq 0 ]; then',
        *_cell_lines(need, settings, python),
        f'    if [ "$code" -ne 0 ] && {python} dlm.submit.stopped "$run_dir" "$began"; then',
        f"        code={ExitCode.PREEMPTED:d}  # srun may report a rank that it killed because the others had left",
        "    fi",
        f'elif [ "$code" -eq {NOTHING_TO_DO} ]; then',
        "    code=0  # admit has printed why",
        "fi",
        *(["set +u", *settings.teardown] if settings.teardown else ()),
        *(_requeue_lines(need, settings, python) if settings.requeue else ()),
        'exit "$code"  # the exit code of the task is that of the cell',
    ]
    return "\n".join(lines)


def exports(code: Path, environment: Mapping[str, str]) -> list[str]:
    """Return the lines that make a job import the snapshot ``code`` and set the variables of its environment."""
    return [
        "unset DLM_CONFIGS  # the snapshot's configs count",
        f"export PYTHONPATH={shlex.quote(str(code.absolute()))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
    ]


def thread_exports(need: Resources) -> list[str]:
    """Return the lines that tell the libraries of a job how many threads they may use."""
    return [f"export {name}={need.cpus_per_task}" for name in THREAD_VARIABLES]


def srun_options(need: Resources, settings: SlurmSettings) -> tuple[str, str]:
    """Return (the option for the cores of a task, the options of `srun_args`), each with a space at its end."""
    cpus = f"--cpus-per-task={need.cpus_per_task} " if settings.cpus_per_gpu is None else ""
    return cpus, "".join(f"{shlex.quote(word)} " for word in settings.srun_args)


def _cell_lines(need: Resources, settings: SlurmSettings, python: str) -> Sequence[str]:
    """Return the lines that run a cell, and set `code` to its exit code if it fails."""
    if not settings.use_srun:
        errors = "log.txt" if settings.stderr_to_stdout else "err.txt"
        return [line.format(python=python, errors=errors) for line in WITHOUT_SRUN]
    error = "" if settings.stderr_to_stdout else ' --error="$logs/err.txt"'
    cpus, more = srun_options(need, settings)
    return [
        "    logs=${run_dir//%/%%}  # srun replaces patterns such as %t in the names of logs",
        "    srun --unbuffered --kill-on-bad-exit=1 --open-mode=append \\",
        f'        {cpus}--output="$logs/log.txt"{error} {more}\\',
        f'        {python} dlm.launch "$@" || code=$?',
    ]


def _requeue_lines(need: Resources, settings: SlurmSettings, python: str) -> list[str]:
    """Return the lines that put a cell that is to be continued into the queue again."""
    and_may = ""
    if settings.max_num_timeout is not None:
        assert need.time_min is not None
        # SLURM may send the signal up to a minute early.
        at = max(0, need.time_min * 60 - _delay_sec(need, settings) - 60)
        count = f'{python} dlm.submit.timeouts "$run_dir" {settings.max_num_timeout}'
        and_may = f' &&\n    {{ [ "$SECONDS" -lt {at} ] || {count}; }}'
    return [line.replace("{and_may}", and_may) for line in REQUEUE]


def _delay_sec(need: Resources, settings: SlurmSettings) -> int:
    """Return how long before its time limit a cell is told to stop: at most a quarter of the limit."""
    limit_sec = math.inf if need.time_min is None else need.time_min * 60
    return min(settings.signal_delay_s, int(min(limit_sec / 4, LONGEST_DELAY_S)))


# Settings that are passed to sbatch as they are, if they are given.
PASSED_ON = (
    "partition", "account", "qos", "constraint", "exclude", "nodelist", "gres", "cpus_per_gpu",
    "gpus_per_task", "mem_per_cpu", "mem_per_gpu", "mail_type", "mail_user",
)  # fmt: skip


def parameters_of(
    array: Request, settings: SlurmSettings, *, name: str, log: str, at_once: int, after: str | None = None
) -> dict[str, Any]:
    """Return what a job array requests, as parameters of submitit's executor.

    Args:
        array: The array, one of the requests that ``arrays`` returns.
        settings: The launcher's keys.
        name: The name of the array in SLURM.
        log: The file for what the batch script prints, with the patterns of sbatch.
        at_once: How many tasks of the array may run at once.
        after: The id of a job that must have ended, in whatever way, before the array starts.
    """
    need = array.jobs[0].resources
    num_tasks = need.nodes * need.tasks_per_node
    if not settings.use_srun and num_tasks > 1:
        raise UserError(
            f"hydra.launcher.use_srun is false, and {array.jobs[0].name} needs {num_tasks} tasks: set it to true"
        )
    has_own_memory = settings.mem_per_cpu is not None or settings.mem_per_gpu is not None
    has_own_gpus = settings.gres is not None or settings.gpus_per_task is not None
    more = in_header(settings.additional_parameters)
    waits_for = [more.pop("dependency", None), settings.dependency, None if after is None else f"afterany:{after}"]
    delay_sec = _delay_sec(need, settings)
    values = {
        "nodes": need.nodes,
        "tasks_per_node": need.tasks_per_node,
        "cpus_per_task": need.cpus_per_task if settings.cpus_per_gpu is None else None,
        "gpus_per_node": need.gpus_per_node if need.gpus_per_node and not has_own_gpus else None,
        "mem_gb": None if has_own_memory else need.mem_gib,
        "comment": " ".join([*(settings.comment or "").split(), "dlm", array.submission]),
        "dependency": ",".join(filter(None, waits_for)) or None,
        **{key: getattr(settings, key) for key in PASSED_ON},
        "exclusive": settings.exclusive or None,
    }
    without_srun = {} if settings.use_srun else {"signal": f"B:USR2@{delay_sec}"}
    return {
        **{key: value for key, value in values.items() if value is not None},
        "name": name,
        "timeout_min": need.time_min,  # given even if None, because submitit would ask for five minutes
        "wckey": settings.wckey,  # submitit's own default would be refused where wckeys are checked
        "array_parallelism": at_once,
        "signal_delay_s": delay_sec,
        "stderr_to_stdout": True,  # of the batch script; the body divides the output of the cell
        "use_srun": False,  # the body calls srun between its checks
        "additional_parameters": {
            "output": log,
            "requeue" if settings.requeue else "no-requeue": True,
            **without_srun,
            **more,
        },
    }


def in_header(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of sbatch in submitit's form: with underscores, and True for an option that takes no value."""
    return {key.replace("-", "_"): True if value is None else value for key, value in options.items()}
