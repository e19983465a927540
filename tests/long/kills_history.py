"""Kill runs with SIGKILL at random moments and check what of their history is on disk, in both records.

    python tests/long/kills_history.py [--runs 50] [--seed 0] [--out FILE.json]

Each run is a process that logs as a training run does (append_jsonl, and WandbLogger offline), in turn a hundred rows
a second or ten, and then prints each row on a pipe. What metrics.jsonl and the .wandb file lack of the printed rows
must be younger than a second. The exit code is 1 where it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for support

from support.killed_run import kill_logging_run

EVERY_SEC = (0.008, 0.1)


def main() -> int:
    """Kill the runs and print what was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the result here")
    options = parser.parse_args()
    drawn = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        kills = [
            kill_logging_run(Path(folder) / str(place), drawn.uniform(0.0, 4.0), every_sec=EVERY_SEC[place % 2])
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
        "command": " ".join(["python", "tests/long/kills_history.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    text = json.dumps(outcome, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0 if max(worst.values()) <= 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
