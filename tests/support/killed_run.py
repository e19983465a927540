"""Kill a process that logs like a training run, and determine which rows its records lack."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dlm.collect.wandb_file import read_wandb_run
from dlm.core.files import read_jsonl

WRITER = """
import sys, time
from pathlib import Path
from dlm.core.files import append_jsonl
from dlm.train.wandb_logger import WandbLogger
from dlm.record.run import metrics_row
run_dir = Path(sys.argv[1])
logger = WandbLogger(project="dlm", id="s-a", group="s", save_dir=run_dir, offline=True, resume="allow")
logger.log_hyperparams({"cell_id": "a", "record": {"attempt": 1}})
step = 0
while True:
    step += 1
    row = metrics_row(step=step, tokens=step, attempt=1, **{"train/loss": 1 / step, "lr": 1e-3})
    append_jsonl(run_dir / "metrics.jsonl", row)
    logger.log_metrics(row, step)
    print(step, row["time"], flush=True)
    time.sleep(float(sys.argv[2]))
"""


def kill_logging_run(folder: Path, after_sec: float, *, every_sec: float) -> dict[str, Any]:
    """Start a run, kill it and W&B's process with SIGKILL, and compare its records with the rows printed to a pipe.

    Args:
        folder: A new folder for the run directory.
        after_sec: The time from the first row to the kill.
        every_sec: The time between two rows. W&B writes its buffer of 32 KiB when it is full. A slow run does not fill
            it and shows whether W&B also flushes earlier.

    Returns:
        The number of rows that were logged and, for each record (metrics, wandb), the number of rows that it lacks and
        the age of the oldest of these at the kill. ``config`` is whether W&B has the run's configuration.
    """
    folder.mkdir()
    command = [sys.executable, "-c", WRITER, str(folder), str(every_sec)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline()]
    children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _is_child(path, process.pid)]
    time.sleep(after_sec)
    killed = time.time()
    for pid in (process.pid, *children):
        os.kill(pid, signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    logged = {int(line.split()[0]): float(line.split()[1]) for line in said if line.endswith("\n")}
    wandb = read_wandb_run(folder, "s-a")
    records = {"metrics": read_jsonl(folder / "metrics.jsonl"), "wandb": wandb.history}
    result: dict[str, Any] = {"after_sec": round(after_sec, 3), "rows": len(logged)}
    for name, rows in records.items():
        steps = {row.get("step") for row in rows}
        lost = [at for step, at in logged.items() if step not in steps]
        result[name] = {"lost": len(lost), "oldest_lost_sec": round(killed - min(lost), 3) if lost else 0.0}
    result["config"] = wandb.config.get("cell_id") == "a"
    return result


def _is_child(stat: Path, parent: int) -> bool:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1]) == parent
    except OSError:
        return False
