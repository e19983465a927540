"""Record the environment of each attempt at a run in env.json: host, job, device, packages and code."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch

from dlm.core.files import write_json
from dlm.core.git import running_code
from dlm.core.typed import read_typed

PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "wandb", "numpy")


SLURM_FACTS = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_NODELIST", "JOB_PARTITION")


@dataclass(frozen=True, kw_only=True)
class _Environment:
    """The content of env.json."""

    attempts: tuple[Mapping[str, Any], ...]


def device_name(device: torch.device) -> str:
    """Return a readable name of a device, such as 'NVIDIA H200' or 'cpu (x86_64)'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def write_environment(run_dir: Path, trainer: L.Trainer) -> dict[str, Any]:
    """Add this attempt to env.json, which lists the attempts at a run, oldest first.

    Returns:
        The facts that are also logged: the number of the attempt, the commit and the device.
    """
    origin = running_code()
    path = run_dir / "env.json"
    attempts = list(read_typed(path, _Environment).attempts) if path.is_file() else []
    attempts.append(
        {
            "started": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "submission": os.environ.get("DLM_SUBMISSION"),
            "code": os.environ.get("DLM_CODE"),  # the code snapshot that runs; None for the live code
            "slurm": {name: os.environ[f"SLURM_{name}"] for name in SLURM_FACTS if f"SLURM_{name}" in os.environ},
            "device": device_name(trainer.strategy.root_device),
            "num_devices": trainer.world_size,
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in PACKAGES},
            "command": sys.argv,
            "git_sha": None if origin is None else origin.sha,
            "git_dirty": None if origin is None else bool(origin.changed),
        }
    )
    write_json(path, {"attempts": attempts})
    return {"attempt": len(attempts), **{key: attempts[-1][key] for key in ("git_sha", "device")}}
