"""The locations of configs/, sweeps/, the prepared data and the work directory.

In a checkout, configs/ and sweeps/ are next to the package; in an installed wheel they are inside the package.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from dlm.core.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
# The environment variables that name folders: (the default, what the folder is for).
FOLDERS = {"DLM_WORKDIR": ("workdir", "the folder of all sweeps"), "DLM_DATA": ("data", "the folder of all data sets")}


@functools.cache
def _shipped(name: str) -> Path:
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def configs_dir() -> Path:
    """Return the folder of the Hydra groups: DLM_CONFIGS, by default the folder that ships with dlm."""
    return Path(os.environ.get("DLM_CONFIGS") or _shipped("configs"))


def sweeps_dir() -> Path:
    """Return the folder of the sweep definitions that ship with dlm."""
    return _shipped("sweeps")


def workdir() -> Path:
    """Return the folder of the sweeps: DLM_WORKDIR, by default ./workdir. Raises UserError if it is a file."""
    return _folder("DLM_WORKDIR")


def data_dir() -> Path:
    """Return the folder of the prepared data sets: DLM_DATA, by default ./data. Raises UserError if it is a file."""
    return _folder("DLM_DATA")


def named_folder(variable: str) -> Path:
    """Return the folder that an environment variable of FOLDERS names, whatever is there."""
    return Path(os.environ.get(variable) or FOLDERS[variable][0]).absolute()


def _folder(variable: str) -> Path:
    folder = named_folder(variable)
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is no folder: set {variable} to {FOLDERS[variable][1]}")
    return folder
