"""The locations of configs/, sweeps/, the prepared data and the work directory.

In a checkout, configs/ and sweeps/ are next to the package; in an installed wheel they are inside the package.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


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
    """Return the folder of the sweeps: DLM_WORKDIR, by default ./workdir."""
    return Path(os.environ.get("DLM_WORKDIR") or "workdir").absolute()


def data_dir() -> Path:
    """Return the folder of the prepared data sets: DLM_DATA, by default ./data."""
    return Path(os.environ.get("DLM_DATA") or "data").absolute()
