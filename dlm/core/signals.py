"""signals: whether this process was told to stop, even before there was anything to stop. Called by launch, first of
all, by Preemption and train.

Importing torch takes seconds, and a signal that finds nobody ends a process: a job whose time limit is near when it
starts would end without one step. Here it is remembered, until the run's own Preemption asks.
"""

from __future__ import annotations

import signal
from types import FrameType

_came: list[int] = []


def remember() -> None:
    """From now on SIGTERM, SIGUSR1 and SIGUSR2 are only noted."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, note)


def note(number: int, frame: FrameType | None = None) -> None:
    """One came."""
    _came.append(number)


def asked_to_stop() -> bool:
    """Whether one came."""
    return bool(_came)


def forget() -> None:
    """For the next run of this process."""
    _came.clear()
