"""Remember a signal to stop that arrives before the run can act on it.

Importing torch takes seconds, and a signal without a handler ends the process: a job that starts near its time limit
would end without one step. launch therefore calls ``remember`` first of all, and the callback Preemption asks later
whether a signal arrived.
"""

from __future__ import annotations

import signal
from types import FrameType

_received: list[int] = []


def remember() -> None:
    """From now on only note SIGTERM, SIGUSR1 and SIGUSR2."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, note)


def note(number: int, frame: FrameType | None = None) -> None:
    """A signal handler that notes the signal."""
    _received.append(number)


def asked_to_stop() -> bool:
    """Whether a signal to stop has arrived."""
    return bool(_received)


def forget() -> None:
    """Forget the signals so far, before the next run of this process."""
    _received.clear()
