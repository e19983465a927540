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

# Small pages, so that several are asked for; on a busy machine no wait is worth a line.
SETTINGS = {"RUNS_A_PAGE": 3, "STEPS_A_PAGE": 2000, "NOTICE_SEC": 100.0}


class Answer(NamedTuple):
    """What a command ended with and wrote."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that a user's mistake shows."""
        assert self.code == 2 and len(self.err.strip().splitlines()) == 1 and self.err.startswith("dlm: "), self
        return self.err.strip()


def dlm(server: WandbServer, *arguments: str | Path) -> Answer:
    """Run `dlm ...` in this process, where wandb is imported already; its environment is that of ``server``."""
    from dlm.cli import main
    from dlm.collect import wandb_server

    wandb_server._api.cache_clear()  # a process of its own would log in again
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
    """Run `dlm ...` in a process of its own.

    Args:
        server: The server that W&B is sent to.
        *arguments: The arguments of `dlm`.
        patches: Statements to run first, with dlm.collect.wandb_server as ``api``.
        **environ: More environment variables.
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
