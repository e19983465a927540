"""Remember a signal to stop that arrives before the run can act on it, and end a command at Ctrl-C.

Importing torch takes seconds, and a signal without a handler ends the process: a job that starts near its time limit
would end without a single step. dlm.launch therefore calls ``remember`` before its slow imports, and the callback
Preemption checks later whether a signal has arrived.

Ctrl-C (SIGINT) is acknowledged at once. While a command does its first imports, it ends the command; later it raises
KeyboardInterrupt, so that nothing half-written stays. A second Ctrl-C kills the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from dlm.core.errors import ExitCode, causes

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


def say(line: str) -> None:
    """Write a line to standard error. Unlike ``print``, a signal handler may call this at any moment."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"dlm: {line}\n".encode())


def exit_at_ctrl_c() -> None:
    """Let Ctrl-C end this process at once, which has done nothing but imports so far.

    An import that is interrupted by an exception may turn it into another one.
    """
    signal.signal(signal.SIGINT, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    say("stopped")
    os._exit(ExitCode.INTERRUPTED)


@contextlib.contextmanager
def interrupted_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in this block, and a second one kill this process."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        exec("")  # else CPython ends by SIGINT, not with an exit code, if Ctrl-C hit the `exec` of a string


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt. This function is a signal handler."""
    if not is_interrupted():
        say("stopping; Ctrl-C again to kill")
    note(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def is_interrupted() -> bool:
    """Return whether Ctrl-C has been pressed."""
    return signal.SIGINT in _received


def is_end_by_ctrl_c(error: BaseException) -> bool:
    """Return whether Ctrl-C is the reason why a command ends with ``error``; otherwise the user has to see the error.

    A command that has stopped in good order ends with SystemExit. A library may turn KeyboardInterrupt into another
    exception; C code that runs during an import even drops it from the causes of that exception.
    """
    import traceback  # late, because the handler of Ctrl-C is not installed before this file is imported

    if not is_interrupted():
        return False
    is_of_import = isinstance(error, ImportError) or any(
        frame.f_code.co_name == "<module>" for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    return isinstance(error, SystemExit) or is_of_import or any(isinstance(e, KeyboardInterrupt) for e in causes(error))


def asked_to_stop() -> bool:
    """Return whether a signal to stop has arrived."""
    return bool(_received)


def forget() -> None:
    """Forget the recorded signals, before the next run of this process."""
    _received.clear()
