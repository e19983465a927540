"""Train runs on two processes."""

import json
import os
import socket
import subprocess
import sys

from dlm import launch
from support import ROOT, TESTS


def start_two(module: str, *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """Start `python -m MODULE ARGUMENTS` twice, as the two processes of a run. Returns both, rank 0 first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Lightning starts no process of its own if LOCAL_RANK is set.
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": f"{ROOT}:{TESTS}", **environment}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env={**os.environ, **shared, "LOCAL_RANK": str(rank)}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def train_on_two(*runs: list[str]) -> None:
    """Train each run, given by its overrides, on the same two processes, so that both import torch only once."""
    processes = start_two("support.two_processes", json.dumps(runs))
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)


def _train(runs: list[list[str]]) -> int:
    for overrides in runs:
        sys.argv = ["dlm.launch", *overrides]
        code = launch.main()
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(_train(json.loads(sys.argv[1])))
