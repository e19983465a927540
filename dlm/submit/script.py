"""Group jobs into job arrays, and write a batch script for each array.

Jobs that need the same resources share an array. A user can read a script, edit it and submit it by hand.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm.core.errors import NOTHING_TO_DO, ExitCode, UserError
from dlm.core.files import write_atomic
from dlm.submit.cluster import Request
from dlm.submit.job import THREAD_VARIABLES, Job, Resources, SlurmSettings, job_name

LONGEST_DELAY_S = 65535  # the longest delay that sbatch --signal accepts


def arrays(request: Request, *, max_size: int) -> list[Request]:
    """Divide a request into one request for each job array; job i of such a request becomes task i of the array.

    The jobs of an array need the same resources, wait for the same trunk and keep their order; an array has at most
    ``max_size`` jobs.
    """
    classes: dict[tuple[Resources, str | None], list[Job]] = {}
    for job in request.jobs:
        trunk = None if job.awaits is None else job.awaits.trunk
        classes.setdefault((job.resources, trunk), []).append(job)
    found: list[Request] = []
    for members in classes.values():
        for start in range(0, len(members), max_size):
            name, jobs = f"{request.submission}-{len(found)}", members[start : start + max_size]
            found.append(dataclasses.replace(request, submission=name, jobs=jobs))
    return found


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
    f'if [ "$code" -eq {ExitCode.PREEMPTED:d} ] && [ "$(squeue -h -j "$task" -o %T)" = RUNNING ]; then',
    '    scontrol requeue "$task"',
    "fi",
)


def sbatch_script(array: Request, settings: SlurmSettings, *, after: str | None = None) -> str:
    """Return the text of the batch script of one job array.

    Args:
        array: The array, one of the requests that ``arrays`` returns.
        settings: The launcher's keys.
        after: The id of a job that must have ended, in whatever way, before the array starts.
    """
    folder, num_cpus = array.ledger.folder.absolute(), array.jobs[0].resources.cpus_per_task
    jobs_file = shlex.quote(f"{folder}/{array.submission}.jobs")
    error = "" if settings.stderr_to_stdout else ' --error="$logs/err.txt"'
    python = f"{shlex.quote(sys.executable)} -P -m"
    lines = [
        "#!/bin/bash",
        f"# Written by dlm: {len(array.jobs)} cells of {array.ledger.title}, submission {array.submission}.",
        "# Task i runs line i+1 of the jobs file: a run directory, then the overrides of dlm.launch.",
        *(f"#SBATCH {option}" for option in _options(array, settings, after)),
        "",
        "unset DLM_CONFIGS  # the snapshot's configs count",
        f"export PYTHONPATH={shlex.quote(str(array.code.absolute()))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export DLM_SUBMISSION={array.submission}",
        "export DLM_GPUS_HELD=$((${SLURM_GPUS_ON_NODE:-0} * ${SLURM_NNODES:-1}))",
        *(f"export {name}={shlex.quote(value)}" for name, value in array.environment.items()),
        *(f"export {name}={num_cpus}" for name in THREAD_VARIABLES),
        *settings.setup,  # before `set -u`, because the startup files of shells and of conda read unset variables
        "set -u",
        f'eval "set -- $(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {jobs_file})"',
        "run_dir=$1",
        "shift",
        "logs=${run_dir//%/%%}  # srun replaces patterns such as %t in the names of logs",
        'mkdir -p "$run_dir"',
        "code=0",
        "began=$(date +%s)",
        f'{python} dlm.submit.admit "$run_dir" || code=$?',
        'if [ "$code" -eq 0 ]; then',
        "    srun --kill-on-bad-exit=1 --open-mode=append \\",
        f'        --cpus-per-task={num_cpus} --output="$logs/log.txt"{error} \\',
        f'        {python} dlm.launch "$@" || code=$?',
        f'    if [ "$code" -ne 0 ] && {python} dlm.submit.stopped "$run_dir" "$began"; then',
        f"        code={ExitCode.PREEMPTED:d}  # srun may report a rank that it killed because the others had left",
        "    fi",
        f'elif [ "$code" -eq {NOTHING_TO_DO} ]; then',
        "    code=0  # admit has printed why",
        "fi",
        *(REQUEUE if settings.requeue else ()),
        'exit "$code"  # the exit code of the task is that of the cell',
    ]
    return "\n".join(lines) + "\n"


def _options(array: Request, settings: SlurmSettings, after: str | None) -> list[str]:
    """Return the options of sbatch for a job array, as in `--nodes=1`."""
    need = array.jobs[0].resources
    limit_s = math.inf if need.time_min is None else need.time_min * 60
    delay_s = min(settings.signal_delay_s, int(min(limit_s / 4, LONGEST_DELAY_S)))  # leave a short job time to train
    more = dict(settings.additional_parameters)
    if after is not None:
        more["dependency"] = ",".join(filter(None, (more.get("dependency"), f"afterany:{after}")))
    values: dict[str, Any] = {
        "job-name": job_name(array.ledger.title, array.submission),
        "array": f"0-{len(array.jobs) - 1}%{settings.array_parallelism}",
        "output": f"{array.ledger.folder.absolute()}".replace("%", "%%") + "/slurm-%A_%a.txt",
        "open-mode": "append",
        "comment": " ".join(filter(None, (settings.comment, f"dlm {array.submission}"))),
        "nodes": need.nodes,
        "ntasks-per-node": need.tasks_per_node,
        "cpus-per-task": need.cpus_per_task,
        "gpus-per-node": need.gpus_per_node if need.gpus_per_node and settings.gres is None else None,
        "mem": None if need.mem_gib is None else f"{need.mem_gib}G",
        "time": need.time_min,
        **{key: getattr(settings, key) for key in ("partition", "account", "qos", "constraint", "exclude", "gres")},
        "signal": f"USR1@{delay_s}" if settings.signal_delay_s else None,  # "B:" would signal only the batch shell
        "requeue" if settings.requeue else "no-requeue": True,
        **{key: True if value is None else value for key, value in more.items()},
    }
    return option_lines(values)


def option_lines(values: Mapping[str, Any]) -> list[str]:
    """Return options of sbatch, as in `--nodes=1`. None omits an option; True marks an option that takes no value."""
    given = {name: value for name, value in values.items() if value is not None}
    return [f"--{name}" if value is True else f"--{name}={_word(str(value))}" for name, value in given.items()]


def _word(text: str) -> str:
    """Return ``text`` as one word of an #SBATCH line, with double quotes and backslashes where necessary."""
    if re.fullmatch(r"[\w@%+=:,./&|*?\[\]-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def write_script(array: Request, settings: SlurmSettings, *, after: str | None = None) -> Path:
    """Write the jobs file and the batch script of a job array, and return the path of the script.

    The arguments are those of ``sbatch_script``.
    """
    script = array.ledger.folder.absolute() / f"{array.submission}.sbatch"
    write_atomic(script.with_suffix(".jobs"), "".join(job_line(job) + "\n" for job in array.jobs))
    write_atomic(script, sbatch_script(array, settings, after=after))
    return script
