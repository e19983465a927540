"""locate: where configs/, sweeps/, the prepared data and the work directory are. Used by both halves.

In a checkout configs/ and sweeps/ stand beside the package; in an installed wheel they lie inside it.
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
    """The Hydra groups of one run; DLM_CONFIGS names another folder."""
    return Path(os.environ.get("DLM_CONFIGS") or _shipped("configs"))


def sweeps_dir() -> Path:
    """The sweep definitions that ship with dlm."""
    return _shipped("sweeps")


def workdir() -> Path:
    """Where sweeps live: DLM_WORKDIR, by default ./workdir."""
    return Path(os.environ.get("DLM_WORKDIR") or "workdir").absolute()


def data_dir() -> Path:
    """Where prepared data sets live: DLM_DATA, by default ./data."""
    return Path(os.environ.get("DLM_DATA") or "data").absolute()
