"""Remember a signal to stop that arrives before the run can act on it.

Importing torch takes seconds, and a signal without a handler ends the process: a job that starts near its time limit
would end without a single step. dlm.launch therefore calls ``remember`` before its slow imports, and the callback
Preemption checks later whether a signal has arrived.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_received: list[int] = []


def remember() -> None:
    """Install handlers that only record SIGTERM, SIGUSR1 and SIGUSR2."""
    for number in STOP:
        signal.signal(number, note)


def ignore() -> None:
    """Ignore SIGTERM, SIGUSR1 and SIGUSR2 while a process ends, so that they do not change its exit code.

    When one process of a preempted run has ended, SLURM sends SIGTERM to the others. The job is continued only if none
    of them ends with the code of a signal.
    """
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


def note(number: int, frame: FrameType | None = None) -> None:
    """Record the signal ``number``. This function is a signal handler."""
    _received.append(number)


def asked_to_stop() -> bool:
    """Return whether a signal to stop has arrived."""
    return bool(_received)


def forget() -> None:
    """Forget the recorded signals, before the next run of this process."""
    _received.clear()
