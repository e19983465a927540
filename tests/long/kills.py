"""Kill a run with SIGKILL at random moments, checkpoint writes included, and compare it with an undisturbed run.

    python tests/long/kills.py [--kills 20] [--seed 0] [--out FILE.json] [OVERRIDE ...]

The run trains a tiny model on the standard library's sources, in real processes. A third of the kills wait until a
checkpoint is being written. The exit code is 1 when a number of the loss curve or of the result differs by one bit.
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
from collections.abc import Sequence
from pathlib import Path

from dlm.core.files import read_jsonl
from dlm.record.run import merge_metrics, read_result, read_status

STEPS, FIRST_CHECKPOINT = 6000, 60
RUN = ("experiment=debug", "logger=none", "model=8k", "data.block_size=32", f"training.steps={STEPS}",
       f"callbacks.checkpoint.every_n_steps={FIRST_CHECKPOINT}", "trainer.log_every_n_steps=10",
       "validation.num_sequences=16", "validation.draws=2")  # fmt: skip
CURVE = ("train/loss", "val/loss", "val/loss_se", "grad_norm", "weight_norm", "lr")


def start(run_dir: Path, log: Path, overrides: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start the run in a process group of its own."""
    with open(log, "ab") as stream:
        return subprocess.Popen([sys.executable, "-m", "dlm.launch", *RUN, *overrides, f"paths.run_dir={run_dir}"],
                                stdout=stream, stderr=stream, start_new_session=True)  # fmt: skip


def logged_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, 0 when there is none. A last line that is only half written does not count."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0


def being_written(run_dir: Path) -> bool:
    """Whether a checkpoint is being written: begun and not yet sealed."""
    return any((run_dir / "checkpoints").glob(".step_*"))


def kill_at(step: int, *, in_a_write: bool, run_dir: Path, log: Path, overrides: Sequence[str]) -> dict[str, object]:
    """Start or resume the run, kill it past ``step``, and return what was seen at that moment."""
    process = start(run_dir, log, overrides)
    while logged_step(run_dir) < step or not (run_dir / "checkpoints").is_dir():
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself with {process.returncode}, see {log}")
        time.sleep(0.001)
    while in_a_write and not being_written(run_dir) and process.poll() is None:
        pass
    os.killpg(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(f"the run ended before it was killed, with {process.returncode}")
    return {"step": logged_step(run_dir), "in_a_write": being_written(run_dir)}


def curve(run_dir: Path) -> dict[int, dict[str, float]]:
    """The loss curve by step. Where a step was repeated, its last value counts."""
    return {row["step"]: {name: row[name] for name in CURVE if name in row}
            for row in merge_metrics(read_jsonl(run_dir / "metrics.jsonl"))}  # fmt: skip


def main() -> int:
    """Train undisturbed, train with kills, compare the two and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the killed run only")
    options = parser.parse_args()
    drawn = random.Random(options.seed)
    steps = sorted(drawn.sample(range(FIRST_CHECKPOINT, STEPS - FIRST_CHECKPOINT), options.kills))
    with tempfile.TemporaryDirectory() as folder:
        calm, killed, log = (Path(folder) / name for name in ("calm", "killed", "log.txt"))
        if code := start(calm, log).wait():
            raise SystemExit(f"the undisturbed run ended with {code}: {log.read_text()[-2000:]}")
        kills = [kill_at(step, in_a_write=place % 3 == 0, run_dir=killed, log=log, overrides=options.overrides)
                 for place, step in enumerate(steps)]  # fmt: skip
        if code := start(killed, log, options.overrides).wait():
            raise SystemExit(f"the last attempt ended with {code}: {log.read_text()[-2000:]}")
        a, b, results = curve(calm), curve(killed), [read_result(calm), read_result(killed)]
        status = read_status(killed)
        assert status is not None and results[0] is not None and results[1] is not None
        same = a == b and (results[0].loss, results[0].loss_se) == (results[1].loss, results[1].loss_se)
        numbers = sum(len(row) for row in a.values())
        outcome = {
            "what": "SIGKILL at random moments against an undisturbed run, bit for bit",
            "same": same,
            "numbers_compared": numbers + 2,
            "kills": len(kills),
            "kills_inside_a_checkpoint_write": sum(bool(kill["in_a_write"]) for kill in kills),
            "attempts": status.attempts,
            "steps": STEPS,
            "steps_redone": status.steps_redone,
            "loss": [results[0].loss, results[1].loss],
            "moments": kills,
            "seed": options.seed,
            "command": " ".join(["python", "tests/long/kills.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        }
    text = json.dumps(outcome, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
