"""Kill runs with SIGKILL at random moments and look what of their history is on disk, in both records.

    python tests/kills_history.py [--runs 50] [--seed 0] [--out FILE.json]

Each run is a process that writes as a training run does (files.append_jsonl and loggers.WandbLogger, offline), a
hundred rows a second or ten in turn, and then says each on a pipe. The pipe is the truth; what
metrics.jsonl and the .wandb file lack of it must be younger than a second. Exit code 1 where it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dlm.collect.wandb_file import read_wandb_run
from dlm.core.files import read_jsonl

EVERY_SEC = (0.008, 0.1)
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


def kill_one(folder: Path, after_sec: float, *, every_sec: float = 0.008) -> dict[str, Any]:
    """Start a run with a row each ``every_sec``, kill it and W&B's own process ``after_sec`` past its first row.

    What each record lacks. W&B writes what fills 32 KiB at once: a slow run shows whether it flushes before that.
    """
    folder.mkdir()
    command = [sys.executable, "-c", WRITER, str(folder), str(every_sec)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline()]
    cores = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _child(path, process.pid)]
    time.sleep(after_sec)
    killed = time.time()
    for pid in (process.pid, *cores):
        os.kill(pid, signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    logged = {int(line.split()[0]): float(line.split()[1]) for line in said if line.endswith("\n")}
    wandb = read_wandb_run(folder, "s-a")
    records = {"metrics": read_jsonl(folder / "metrics.jsonl"), "wandb": wandb.history if wandb else []}
    result: dict[str, Any] = {"after_sec": round(after_sec, 3), "rows": len(logged)}
    for name, rows in records.items():
        steps = {row.get("step") for row in rows}
        lost = [at for step, at in logged.items() if step not in steps]
        result[name] = {"lost": len(lost), "oldest_lost_sec": round(killed - min(lost), 3) if lost else 0.0}
    result["config"] = wandb is not None and wandb.config.get("cell_id") == "a"
    return result


def _child(stat: Path, parent: int) -> bool:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1]) == parent
    except OSError:
        return False


def main() -> int:
    """Kill them all, say what was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the result here")
    options = parser.parse_args()
    drawn = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        kills = [
            kill_one(Path(folder) / str(place), drawn.uniform(0.0, 4.0), every_sec=EVERY_SEC[place % 2])
            for place in range(options.runs)
        ]
    worst = {name: max(kill[name]["oldest_lost_sec"] for kill in kills) for name in ("metrics", "wandb")}
    outcome = {
        "what": "SIGKILL of a run and of W&B's process: the oldest row that a record lacks, in seconds before the kill",
        "runs": len(kills),
        "worst_sec": worst,
        "rows_logged": sum(kill["rows"] for kill in kills),
        "rows_lost": {name: sum(kill[name]["lost"] for kill in kills) for name in worst},
        "configs_kept": sum(kill["config"] for kill in kills),
        "kills": kills,
        "command": " ".join(["python", "tests/kills_history.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    text = json.dumps(outcome, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0 if max(worst.values()) <= 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
