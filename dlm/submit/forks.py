"""Start processes by fork from a process that has done its slow imports once: `python -m dlm.submit.forks MODULE`.

Importing torch and Lightning takes longer than training the smallest models. The server imports MODULE and calls its
function ``preload``, if there is one. It then answers requests, which are lines of JSON on its standard input: it forks
a process that runs ``MODULE.main()``, or it returns the exit code of such a process. The answers are lines of JSON on
its standard output, after the line `"ready"`. A forked process has the environment of the server.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO

from dlm.core import signals
from dlm.core.lease import process_started


class ForkServer:
    """The server, as the process that starts it sees it.

    Args:
        module: The module that forked processes run.
        environment: The environment of the server and of the forked processes.
        log: The file to which the imports may print.
    """

    def __init__(self, module: str, environment: Mapping[str, str], log: Path) -> None:
        with open(log, "ab") as stream:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "dlm.submit.forks", module],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        self._requests, self._answers = self._server.stdin, self._server.stdout
        self._is_ready = False

    def is_ready(self) -> bool:
        """Return whether the imports are over. If the server has ended, it is ready, and ``start`` fails."""
        if not self._is_ready and select.select([self._answers], [], [], 0)[0]:
            self._answers.readline()
            self._is_ready = True
        return self._is_ready

    def start(self, name: str, arguments: Sequence[str], log: Path) -> Forked:
        """Start a process whose output is appended to ``log``. The server must be ready.

        Args:
            name: The name of the process in `ps -o comm` and `top`.
            arguments: The arguments of the module.
            log: The file to which the process prints.

        Raises:
            OSError: The server has ended, or it cannot start the process.
        """
        answer = self._ask({"name": name, "arguments": list(arguments), "log": str(log)})
        if "failed" in answer:
            raise OSError(answer["failed"])
        return Forked(self, answer["pid"])

    def exit_code(self, pid: int) -> int | None:
        """Return the exit code of a process as ``subprocess`` does; None while it runs.

        Raises OSError if the server has ended.
        """
        code: int | None = self._ask({"pid": pid})["exit_code"]
        return code

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._requests.write(json.dumps(request).encode() + b"\n")
        answer = self._answers.readline()
        if not answer.endswith(b"\n"):
            raise OSError("the server of forks has ended")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the server, even during its imports. The processes that it has started go on."""
        self._server.kill()
        self._server.wait()
        self._requests.close()
        self._answers.close()


class Forked:
    """A process that a ForkServer has started, with those methods of ``subprocess.Popen`` that the local pool uses.

    The server keeps an ended process as a zombie until its exit code is asked for, so ``pid`` always means this
    process. If the server has ended, the exit code cannot be learnt: the process receives SIGTERM, and counts as ended
    by it.
    """

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid
        self._started, self._is_orphan = process_started(pid), False
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""
        if self._exit_code is None:
            try:
                self._exit_code = self._server.exit_code(self.pid)
            except OSError:
                self._exit_code = self._exit_code_of_orphan()
        return self._exit_code

    def _exit_code_of_orphan(self) -> int | None:
        if process_started(self.pid) != self._started or self._started is None:
            return -signal.SIGTERM
        if not self._is_orphan:
            self._is_orphan = True
            self._send(signal.SIGTERM)
        return None

    def wait(self) -> int:
        """Wait until the process has ended, and return its exit code."""
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.poll() is None:
            self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.poll() is None:
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # an orphan may have ended meanwhile
            os.kill(self.pid, number)


def main() -> int:
    """Serve until standard input ends. In a forked process, run the module's main function and return its exit code."""
    # The signals to stop do not end the server, and none is lost that is sent to a new process before it has handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *signals.STOP})
    with open(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what the imports print must not be taken for an answer
        module = importlib.import_module(sys.argv[1])
        getattr(module, "preload", lambda: None)()
        gc.freeze()  # forked processes then do not search the imports for garbage, which would also copy their memory
        request = _serve(answers)
    return 0 if request is None else _run(module, request)


def _serve(answers: TextIO) -> dict[str, Any] | None:
    """Answer requests until standard input ends. Returns, in a process that was forked for a request, the request."""
    answer: Any = "ready"
    while True:
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:  # nobody listens any more
            return None
        line = sys.stdin.readline()
        if not line.endswith("\n"):
            return None
        request: dict[str, Any] = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = {"exit_code": os.waitstatus_to_exitcode(status) if pid else None}
            continue
        try:
            pid = _fork(request["log"])
        except OSError as error:
            answer = {"failed": str(error)}
            continue
        if not pid:
            return request
        answer = {"pid": pid}


def _fork(log: str) -> int:
    """Fork with ``log`` as the output of the new process. Returns the pid of the new process, and 0 in that process.

    Raises OSError if no process can be started.
    """
    if (threads := len(os.listdir("/proc/self/task"))) > 1:  # a lock that another thread holds would never be released
        raise OSError(f"the server of forks has {threads} threads")
    opened = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            os.dup2(opened, 1)
            os.dup2(opened, 2)
    finally:
        os.close(opened)
    return pid


def _run(module: ModuleType, request: dict[str, Any]) -> int:
    """Run the main function of a module in a process that has just been forked, as `python -m MODULE` would."""
    signals.remember()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP)  # SIGINT stays blocked, as in every job of the pool
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    Path("/proc/self/comm").write_text(request["name"])
    sys.argv = [str(module.__file__), *request["arguments"]]
    sys.modules["__main__"] = module  # from it, Lightning learns how to start the other processes of a run
    return int(module.main())


def _end(exit_code: int) -> NoReturn:
    """End this process as ``sys.exit`` does, but let the operating system free the memory.

    To free it object by object, a forked process would first have to copy all memory that it shares with the server.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads that are not daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    exit_code = main()
    signals.ignore()
    _end(exit_code)
