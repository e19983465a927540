"""Reserve a folder for one process at a time, even if several hosts share its file system.

The process that holds the folder keeps the file lease.json in it; the modification time of the file is a heartbeat.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.core.errors import ExitCode, UserError
from dlm.core.files import write_json
from dlm.core.typed import read_typed

HEARTBEAT_SEC = 10.0


# A lease on another host is dead after this long without a heartbeat. It is also dead if its heartbeat lies further in
# the future than this: the clocks of hosts that share a file system may differ by less. If the clock of the file server
# is set back further, a holder that lives beats again within HEARTBEAT_SEC, and ends if another one has taken over.
STALE_SEC = 60.0


def process_started(pid: int) -> str | None:
    """Return when a live process started, in clock ticks since boot; None if no such process is alive.

    The start time distinguishes the process that took a lease from a later process with the same pid.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]


class HeldError(UserError):
    """Raised if another live process holds the lease."""


class Lease:
    """Keep a second process out of a folder, for instance of a run directory: ``with Lease(run_dir): ...``

    A holder on this host is alive if its process exists, a holder on another host if its heartbeat is fresh.

    Args:
        folder: The folder to hold.
        doing: A past participle for the message to a second process; it states what this process does with the folder.
        patience_sec: How long to wait for another holder, in seconds.

    Raises:
        HeldError: Another live process still holds the folder after ``patience_sec``.
    """

    def __init__(self, folder: Path, *, doing: str = "run", patience_sec: float = 0.0) -> None:
        self.path = folder / "lease.json"
        self.doing, self.patience_sec = doing, patience_sec
        self._stop = threading.Event()
        self._folder: int | None = None

    def __enter__(self) -> Lease:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self.patience_sec
        while (holder := self._take()) is not None:
            if time.monotonic() >= deadline:
                raise HeldError(
                    f"{self.path.parent.name} is being {self.doing} by process {holder['pid']} on {holder['host']}: "
                    "wait for it or stop it, nothing was started"
                )
            time.sleep(0.2)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        holder = live_holder(self.path.parent)
        if holder is None or self._is_us(holder):  # else another process took over while this host was disconnected
            self.path.unlink(missing_ok=True)
        if self._folder is not None:
            os.close(self._folder)

    def _take(self) -> dict[str, Any] | None:
        """Take the lease if it is free. Return the other live holder, or None if this process has taken the lease."""
        with self._lock():
            holder = live_holder(self.path.parent)
            if holder is None:
                # By the open folder ``holds`` recognises this process, from before the lease names it.
                self._folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
                self._beat()
            return holder

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold a lock while the lease is read and taken, so that two processes cannot both take the lease."""
        lock = self.path.with_suffix(".lock")
        for _ in range(100):
            try:
                lock.touch(exist_ok=False)
                break
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):
                    # The process that made such an old lock has died.
                    if server_time(lock.parent) - lock.stat().st_mtime > HEARTBEAT_SEC:
                        lock.unlink()
                time.sleep(0.2)
        else:
            raise UserError(f"{lock} stays locked by another process: delete it if none is running")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)

    def _beat(self) -> None:
        """Write the lease file; its modification time is the heartbeat. Raises OSError if its folder is missing."""
        self.path.parent.stat()  # a file system that is away must not get a folder in its place
        pid = os.getpid()
        write_json(self.path, {"host": socket.gethostname(), "pid": pid, "started": process_started(pid)})

    def _keep(self) -> None:
        while not self._stop.wait(HEARTBEAT_SEC):
            with contextlib.suppress(OSError):  # a disk that is full or slow now may accept the next heartbeat
                self._end_if_taken_over()
                self._beat()

    def _end_if_taken_over(self) -> None:
        """End this process if another one took over because this host was disconnected or suspended for too long."""
        holder = live_holder(self.path.parent)
        if holder is not None and not self._is_us(holder):
            print(f"dlm: {self.path.parent.name} was taken over by process {holder['pid']} on {holder['host']}: "
                  "this one ends", file=sys.stderr, flush=True)  # fmt: skip
            os._exit(ExitCode.PREEMPTED)

    @staticmethod
    def _is_us(holder: dict[str, Any]) -> bool:
        return bool((holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid()))


def server_time(folder: Path) -> float:
    """Return the time of the clock that sets file times in ``folder``, in seconds since the epoch.

    The clocks of the hosts that share a file system may differ from this clock. If this process cannot write to the
    folder, the result is the time of this host.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b".")
            stream.flush()
            os.fsync(stream.fileno())
            return os.fstat(stream.fileno()).st_mtime
    except OSError:
        return time.time()


@dataclass(frozen=True, kw_only=True)
class _Holder:
    """The content of lease.json."""

    host: str
    pid: int
    started: str | None


def live_holder(folder: Path, *, now: float | None = None) -> dict[str, Any] | None:
    """Return the live process that holds the lease of ``folder``: {host, pid, started}; None if there is none.

    Args:
        folder: The folder whose lease is checked.
        now: The ``server_time`` of the folder, if known. Folders of one file system share it, so one call is enough.
    """
    path = folder / "lease.json"
    try:
        holder = read_typed(path, _Holder)
        if holder.host == socket.gethostname():
            started = process_started(holder.pid)
            return vars(holder) if started is not None and started == holder.started else None
        age = (server_time(folder) if now is None else now) - path.stat().st_mtime
        return vars(holder) if -STALE_SEC < age < STALE_SEC else None
    except (OSError, UserError):  # absent or unreadable: nobody holds it
        return None


def stop_holder(folder: Path) -> str | None:
    """Send SIGTERM to the process that holds the lease of ``folder``, if that is a process of this user on this host.

    Anyone who can write to the folder can write any process id into its lease. Therefore the process must have started
    when the lease says, and hold the folder (``holds``). It is addressed by a handle, so that the id cannot pass to
    another process before the signal.

    Returns:
        What was done or why nothing was done, in words; None if nobody holds the lease.
    """
    holder = live_holder(folder)
    if holder is None:
        return None
    name = f"process {holder['pid']}"
    if holder["host"] != socket.gethostname():
        return f"runs as {name} on {holder['host']}: stop it there"
    if holder["pid"] <= 1 or holder["pid"] == os.getpid():
        return f"{folder / 'lease.json'} names {name}, which is no run: not stopped; delete that file"
    with _handle_of(holder["pid"]) as handle:
        if process_started(holder["pid"]) != holder["started"] or not holds(holder["pid"], folder):
            return f"{folder / 'lease.json'} names {name}, which is not a run of yours in that folder: not stopped"
        with contextlib.suppress(ProcessLookupError):  # it has ended in the meantime
            if handle is None:
                os.kill(holder["pid"], signal.SIGTERM)
            else:
                signal.pidfd_send_signal(handle, signal.SIGTERM)
    return f"SIGTERM to {name}"


@contextlib.contextmanager
def _handle_of(pid: int) -> Iterator[int | None]:
    """Yield a handle that always means the process that has this id now; None on kernels older than Linux 5.3."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:  # or the process has ended, which the check of its start shows
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def holds(pid: int, folder: Path) -> bool:
    """Whether a process of this user holds the lease of ``folder``: it keeps the folder open as long as it does.

    Its command line would not tell: that of a run by hand names no folder, and that of a forked run is the server's.
    """
    process = Path(f"/proc/{pid}")
    try:
        if process.stat().st_uid != os.geteuid():
            return False
        here = folder.stat()
        return any(_is_same(handle, here) for handle in (process / "fd").iterdir())
    except OSError:  # it has ended, or belongs to another user
        return False


def _is_same(handle: Path, there: os.stat_result) -> bool:
    try:
        found = handle.stat()
    except OSError:  # closed in the meantime
        return False
    return os.path.samestat(found, there)
