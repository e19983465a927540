"""Run measurements in a process of their own, which is ended when it fails or takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import ROOT

START_LIMIT = 180.0  # seconds until a process must have said what the device is
PROGRAM = ("-m", "benchmarks.card.child")


class Lost(Exception):
    """The process gave no answer; the message says why."""


class Worker:
    """A process that measures one row after the other: `python -m benchmarks.card.child`.

    Args:
        settings: What the process must know, see benchmarks/card/child.py.
        log: The file for its output.
        program: What python runs.
    """

    def __init__(self, settings: dict[str, Any], log: Path, *, program: Sequence[str] = PROGRAM) -> None:
        self._command, self._log = [sys.executable, *program, json.dumps(settings)], log
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self.reached = ""  # what the process last said that it has reached

    def start(self, *, timeout: float) -> dict[str, Any]:
        """Start the process; return what it says of the device. Raises Lost."""
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
                start_new_session=True,
            )  # fmt: skip
        self._rest, self.reached = b"", "start"
        return self._answer(min(timeout, START_LIMIT))

    def ask(self, request: dict[str, Any], *, limit: float, left: float) -> dict[str, Any]:
        """Let the process measure a row, and start one if there is none.

        Args:
            request: The row.
            limit: Seconds for the row.
            left: Seconds for the start and the row together.

        Returns:
            The answer of the process.

        Raises:
            Lost: There was no answer. The process is gone.
        """
        began = time.monotonic()
        if self._process is None:
            self.start(timeout=left)
        assert self._process is not None and self._process.stdin is not None
        self.reached = "start"
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which reading its answer shows
        return self._answer(min(limit, left - (time.monotonic() - began)))

    def _answer(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        try:
            while True:
                line = self._line(deadline - time.monotonic())
                answer: dict[str, Any] = json.loads(line)
                if "reached" not in answer:
                    return answer
                self.reached = answer["reached"]
        except TimeoutError:
            self.end()
            raise Lost(f"no answer within {timeout:.0f} s, after: {self.reached}") from None
        except EOFError:
            code = self.end()
            raise Lost(f"its process ended with {code}, after: {self.reached}") from None

    def _line(self, timeout: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise TimeoutError
                more = os.read(self._process.stdout.fileno(), 65536)
                if not more:
                    raise EOFError
                self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    @property
    def pid(self) -> int | None:
        """The number of the process, if there is one."""
        return None if self._process is None else self._process.pid

    def end(self) -> int | None:
        """Kill the process and all that it has started. Returns its exit code; None if there was none."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)  # a process that is ending keeps its own exit code
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        return code


def lines_of_parent() -> queue.Queue[str]:
    """Read standard input in a thread, which ends this process and its children once the parent is gone."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines
