"""Lease a directory to one process at a time, across hosts."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlm.core.errors import ExitCode, UserError
from dlm.core.files import write_json

HEARTBEAT_SEC = 10.0


STALE_SEC = 60.0  # a lease on another host is dead after this long without a heartbeat


def _process_started(pid: int) -> str | None:
    """When ``pid`` started (clock ticks since boot), or None: tells a live process from a recycled pid."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]


class HeldError(UserError):
    """Another live process holds the lease."""


class Lease:
    """Keeps a second process out of a folder, for instance a live run directory. ``with Lease(run_dir): ...``

    Raises HeldError when another live process holds it and goes on holding it for ``patience_sec``. The holder is live
    when its process exists (same host) or its heartbeat is fresh (another host).
    """

    def __init__(self, folder: Path, *, doing: str = "run", patience_sec: float = 0.0) -> None:
        self.path = folder / "lease.json"
        self.doing, self.patience_sec = doing, patience_sec
        self._stop = threading.Event()

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
        if holder is None or self._is_us(holder):  # else another took it over while this host was cut off
            self.path.unlink(missing_ok=True)

    def _take(self) -> dict[str, Any] | None:
        """Who holds it; None when it is ours now."""
        with self._lock():
            holder = live_holder(self.path.parent)
            if holder is None:
                self._beat()
            return holder

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Held only while a lease is looked at and taken, so that two starters cannot both take it."""
        lock = self.path.with_suffix(".lock")
        for _ in range(100):
            try:
                os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):
                    if server_time(lock.parent) - lock.stat().st_mtime > HEARTBEAT_SEC:  # its owner died holding it
                        lock.unlink()
                time.sleep(0.2)
        else:
            raise UserError(f"{lock} stays locked by another process: delete it if none is running")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)

    def _beat(self) -> None:
        """The file's modification time is the heartbeat."""
        pid = os.getpid()
        write_json(self.path, {"host": socket.gethostname(), "pid": pid, "started": _process_started(pid)})

    def _keep(self) -> None:
        while not self._stop.wait(HEARTBEAT_SEC):
            with contextlib.suppress(OSError):  # a full or slow disk now; the next beat may reach it
                self._end_if_taken_over()
                self._beat()

    def _end_if_taken_over(self) -> None:
        """This host was cut off or stood still for so long that another took over: two must not go on."""
        holder = live_holder(self.path.parent)
        if holder is not None and not self._is_us(holder):
            print(f"dlm: {self.path.parent.name} was taken over by process {holder['pid']} on {holder['host']}: "
                  "this one ends", file=sys.stderr, flush=True)  # fmt: skip
            os._exit(ExitCode.PREEMPTED)

    @staticmethod
    def _is_us(holder: dict[str, Any]) -> bool:
        return bool((holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid()))


def server_time(folder: Path) -> float:
    """Now, by the clock that stamps the files of ``folder``: those of the nodes that share it may differ.

    By this host's own clock where it may not write there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b".")
            stream.flush()
            os.fsync(stream.fileno())
            return os.fstat(stream.fileno()).st_mtime
    except OSError:
        return time.time()


def live_holder(folder: Path, *, now: float | None = None) -> dict[str, Any] | None:
    """Who holds the lease of ``folder`` right now ({host, pid, started}), or None.

    ``now`` is its server_time where the caller knows it, to look at many folders for the price of one.
    """
    path = folder / "lease.json"
    try:
        holder: dict[str, Any] = json.loads(path.read_text())
        if holder["host"] == socket.gethostname():
            started = _process_started(int(holder["pid"]))
            return holder if started is not None and started == holder["started"] else None
        age = (server_time(folder) if now is None else now) - path.stat().st_mtime
        return holder if age < STALE_SEC else None
    except (OSError, ValueError, KeyError, TypeError):  # absent or unreadable: nobody can be holding it
        return None
