"""Kill a sweep with shared trunks with SIGKILL at random moments, and compare it with one that trains every cell alone.

    python tests/long/kills_sweep.py [--kills 10] [--seed 0]

Both sweeps train six tiny cells on this machine. The first is killed when its cells together have reached a random
step, again and again. The second has no shared trunks and is not disturbed. The exit code is 1 when the loss of a cell
differs by one bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from dlm.record.run import read_result, read_status, read_validation

DEFINITION = {
    "name": "killed",
    "budgets": [1e10, 2e10, 4e10],
    "convention": "full_masked_head",
    "models": ["4k", "8k"],
    "groups": {"data": "stdlib", "trainer": "cpu", "scheduler": "wsd", "logger": "none"},
    "set": {"optimizer.lr": 5e-3, "scheduler.warmup_tokens_per_param": 0.5, "scheduler.decay_fraction": 0.5,
            "validation.num_sequences": 64, "validation.times": 2},
    "branches": True,
    "hardware": {"device": "cpu", "gpus_per_node": 0},
}  # fmt: skip


def start(folder: Path, **changes: object) -> subprocess.Popen[bytes]:
    """Start the sweep in a process group of its own."""
    path = folder / "definition.yaml"
    path.write_text(yaml.safe_dump({**DEFINITION, **changes}))
    command = [sys.executable, "-m", "dlm.cli", "submit", str(path), "--launcher", "submitit_local", "--yes"]
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                                env={**os.environ, "DLM_WORKDIR": str(folder)})  # fmt: skip


def steps_of(folder: Path) -> dict[str, int]:
    """The step that each cell has reached. A branch begins at its branch point."""
    found = {path.parent.name: read_status(path.parent) for path in folder.glob("killed/runs/*/status.json")}
    return {name: status.step for name, status in found.items() if status is not None}


def outcomes(runs: Path) -> Mapping[str, tuple[float, float, list[float]]]:
    """The final loss of every finished cell, its error, and the loss of every validation sequence."""
    found = {run_dir.name: read_result(run_dir) for run_dir in sorted(runs.iterdir())}
    return {
        name: (result.loss, result.loss_se, read_validation(runs / name)) for name, result in found.items() if result
    }


def main() -> int:
    """Run both sweeps, compare them and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    drawn = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        calm.mkdir()
        killed.mkdir()
        if code := start(calm, branches=False).wait():
            raise SystemExit(f"the undisturbed sweep ended with {code}: {(calm / 'log.txt').read_text()[-2000:]}")
        total = sum(cell["steps"] for cell in json.loads((calm / "killed/plan.json").read_text())["cells"])
        moments = []
        for wanted in sorted(drawn.sample(range(1, total - total // 20), options.kills)):
            process = start(killed)
            while process.poll() is None and sum(steps_of(killed).values()) < wanted:
                time.sleep(0.01)
            steps = steps_of(killed)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            moments.append({"exit_code": process.wait(), "steps": steps})
        if code := start(killed).wait():
            raise SystemExit(f"the last attempt ended with {code}: {(killed / 'log.txt').read_text()[-2000:]}")
        first, second = outcomes(calm / "killed" / "runs"), outcomes(killed / "killed" / "runs")
        logs = "".join(path.read_text() for path in killed.glob("killed/runs/*/log.txt"))
        outcome = {
            "what": "a sweep with shared trunks and SIGKILL at random moments against one that trains every cell alone",
            "same": first == second,
            "cells": len(first),
            "killed": sum(moment["exit_code"] == -signal.SIGKILL for moment in moments),
            "started_from_a_trunk": logs.count("starting from the checkpoint of its trunk"),
            "started_from_nothing_instead": logs.count("starting from nothing instead"),
            "went_on": logs.count("going on from step_"),
            "moments": moments,
            "seed": options.seed,
        }
    print(json.dumps(outcome, indent=1))
    has_shared = outcome["killed"] > 0 and outcome["started_from_a_trunk"] > 0 and outcome["went_on"] > 0
    return 0 if outcome["same"] and outcome["cells"] == 6 and has_shared else 1


if __name__ == "__main__":
    sys.exit(main())
