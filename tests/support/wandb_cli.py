"""Run the `dlm` command against the stand-in W&B server."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from support import ROOT
from support.wandb_server import WandbServer

# Small pages, so that requests span several pages. NOTICE_SEC is large, so that a busy machine causes no notices.
SETTINGS = {"RUNS_A_PAGE": 3, "STEPS_A_PAGE": 2000, "NOTICE_SEC": 100.0}


class Answer(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The error message, after asserting that it is the single line of a user error (exit code 2)."""
        assert self.code == 2 and len(self.err.strip().splitlines()) == 1 and self.err.startswith("dlm: "), self
        return self.err.strip()


def dlm(server: WandbServer, *arguments: str | Path) -> Answer:
    """Run `dlm ...` in this process, where wandb is imported already and the environment points to ``server``."""
    from dlm.cli import main
    from dlm.collect import wandb_server

    wandb_server._api.cache_clear()  # a new process would log in again
    server.asked.clear()
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.multiple(wandb_server, **SETTINGS),
        mock.patch.object(sys, "argv", ["dlm", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


def dlm_process(server: WandbServer, *arguments: str | Path, patches: str = "", **environ: str) -> Answer:
    """Run `dlm ...` in a new process.

    Args:
        server: The server that the W&B client uses.
        *arguments: The arguments of `dlm`.
        patches: Python statements to run first; ``api`` is dlm.collect.wandb_server.
        **environ: Additional environment variables.
    """
    settings = [f"api.{name} = {value}" for name, value in SETTINGS.items()]
    lines = ["import dlm.collect.wandb_server as api", *settings, patches, "from dlm.cli import main", "main()"]
    env = {**os.environ, **server.env, "PYTHONPATH": str(ROOT), **environ}
    server.asked.clear()
    command = [sys.executable, "-c", "\n".join(lines), *map(str, arguments)]
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False
    )
    return Answer(done.returncode, done.stdout, done.stderr)
