"""Make the environment of SLURM's commands: without what an enclosing job, or a setting for interactive use, put there.

Inside a job and in a notebook on a cluster, variables such as SLURM_MEM_PER_CPU describe the enclosing job, and sbatch
and srun would apply them to the new jobs. SBATCH_* variables take precedence over the options of a batch script.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

# Prefixes of the variables that change what SLURM's commands do or print.
FOREIGN = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SALLOC_", "PMI_")
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")  # which cluster to speak to, and as whom

# SBATCH_* variable -> the option of sbatch that it sets, where the name does not say it.
_OPTIONS = {
    "ARRAY_INX": "array",
    "TIMELIMIT": "time",
    "MEM_PER_NODE": "mem",
    "CPUS_PER_TASK": "cpus-per-task",
    "NO_REQUEUE": "requeue",
    "JOB_NAME": "job-name",
}
# Options that contradict each other -> one of them.
_ONE_OF = {
    "no-requeue": "requeue",
    **dict.fromkeys(("mem-per-cpu", "mem-per-gpu"), "mem"),
    **dict.fromkeys(("gres", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"), "gpus"),
}
_NEVER = ("WAIT", "TEST_ONLY", "JOBID", "DEBUG")  # sbatch would block, submit nothing, or print what is no job id


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without the variables of SLURM, except those in KEPT."""
    return {name: value for name, value in environment.items() if name in KEPT or not name.startswith(FOREIGN)}


def sbatch_environment(script: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of sbatch: `clean`, with those SBATCH_* variables whose option the script does not set.

    Sites set these variables on purpose, so they count where the launcher's key is null. A line on stderr names them.
    """
    options = re.findall(r"^#SBATCH --([\w-]+)", script.read_text(), re.MULTILINE)
    # A cell without GPUs asks for none by naming none, so a variable must not give it any.
    chosen = {"gpus", *(_ONE_OF.get(name, name) for name in options)}
    counting = {
        name: value
        for name, value in environment.items()
        if name.startswith("SBATCH_") and name.removeprefix("SBATCH_") not in _NEVER and _option_of(name) not in chosen
    }
    if counting:
        listed = ", ".join(f"{name}={value}" for name, value in sorted(counting.items()))
        print(f"dlm: sbatch also obeys {listed}, from your environment", file=sys.stderr)
    return {**clean(environment), **counting}


def _option_of(variable: str) -> str:
    """Return the option of sbatch that a variable sets: SBATCH_PARTITION -> partition."""
    word = variable.removeprefix("SBATCH_")
    option = _OPTIONS.get(word, word.lower().replace("_", "-"))
    return _ONE_OF.get(option, option)
