"""Write real W&B runs in a separate process that stays alive, because importing wandb takes longer than a small run."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_runs(folder: Path, specs: Sequence[dict[str, Any]], **environment: str) -> None:
    """Log runs with the real W&B.

    Args:
        folder: The parent of the run directories.
        specs: Dictionaries with the keys dir (relative to ``folder``), id, group and rows, and optionally config, exit,
            mode, tags and summary.
        **environment: Additional environment variables. If any are given, a new process writes the runs.
    """
    for spec in specs:
        (folder / spec["dir"]).mkdir(parents=True, exist_ok=True)
    absolute = [{**spec, "dir": str((folder / spec["dir"]).absolute())} for spec in specs]
    writer = _start_writer(**environment) if environment else _writer()
    writer.stdin.write(json.dumps(absolute) + "\n")
    writer.stdin.flush()
    answer = writer.stdout.readline()
    if environment:
        _stop(writer)
    assert answer == "written\n", answer


def log_to_wandb(sweep_dir: Path, cell: Any, rows: Iterable[dict[str, Any]], **facts: Any) -> None:
    """Log rows as the run of a planned cell would; ``facts`` are further keys of the spec for ``write_runs``."""
    spec = {"dir": f"runs/{cell.cell_id}", "id": f"s-{cell.cell_id}", "group": "s", "rows": list(rows), **facts}
    write_runs(sweep_dir, [spec])


@functools.cache
def _writer() -> subprocess.Popen[str]:
    writer = _start_writer()
    atexit.register(_stop, writer)
    return writer


def _start_writer(**environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "WANDB_SILENT": "true", **environment}
    command = [sys.executable, __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def _stop(writer: subprocess.Popen[str]) -> None:
    writer.communicate()
    assert writer.returncode == 0


def _write(spec: dict[str, Any]) -> None:
    import wandb

    run = wandb.init(
        mode=spec.get("mode", "offline"),
        tags=spec.get("tags"),
        project="dlm",
        id=spec["id"],
        group=spec["group"],
        dir=spec["dir"],
        resume="allow",
        config=spec.get("config", {}),
        settings=wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off"),
    )
    for row in spec["rows"]:
        run.log(row)
    run.summary.update(spec.get("summary", {}))
    run.finish(exit_code=spec.get("exit", 0))


def main() -> None:
    """Read lines of JSON lists of specs from standard input, write the runs of each line, and confirm it."""
    import wandb

    last_second = dict[str, int]()
    for line in sys.stdin:
        for spec in json.loads(line):
            while last_second.get(spec["dir"]) == int(time.time()):  # W&B names the folder of an attempt by the second
                time.sleep(0.02)
            last_second[spec["dir"]] = int(time.time())
            _write(spec)
        wandb.teardown()  # W&B's process may write to the files until it ends
        print("written", flush=True)


if __name__ == "__main__":
    main()
