"""Train runs on two processes."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from dlm import launch
from support import ROOT, TESTS

SECONDS = 600  # the longest time that a run may take, on a busy machine


@contextlib.contextmanager
def two_processes(module: str, *arguments: str, **environment: str) -> Iterator[list[subprocess.Popen]]:
    """Run `python -m MODULE ARGUMENTS` twice, as the two processes of a run. Yields both, rank 0 first.

    At the end of the block, the processes are killed if they still run, and their output is printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Lightning starts no process of its own if LOCAL_RANK is set.
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": f"{ROOT}:{TESTS}", **environment}
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=output, stderr=output,
                env={**os.environ, **shared, "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()
            output.seek(0)
            print(output.read())


def train_on_two(*runs: list[str]) -> None:
    """Train each run, given by its overrides, on the same two processes, so that both import torch only once."""
    with two_processes("support.two_processes", json.dumps(runs)) as processes:
        assert [process.wait(SECONDS) for process in processes] == [0, 0]


def _train(runs: list[list[str]]) -> int:
    for overrides in runs:
        sys.argv = ["dlm.launch", *overrides]
        code = launch.main()
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(_train(json.loads(sys.argv[1])))
