"""Measure `dlm collect` on many long runs, and again when nothing has changed; results go to benchmarks/results/.

    python benchmarks/collect.py [--runs 1000] [--rows 10000] [--folder DIR]

The script makes a planned sweep whose run directories look like those of finished runs: result.json, status.json,
config.yaml, env.json, and a metrics.jsonl with the keys and the number of digits of a real one. 1,000 runs of 10,000
logged steps take about 3 GB. Every call of `dlm collect` is a process of its own. In the result, `first` is the first
call, `unchanged` are the calls after it, and `one_changed` is a call after one run was rewritten.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import ROOT, write_result
from dlm.data.manifest import Manifest, PackedFile, write_manifest
from dlm.plan.cells import Plan
from dlm.plan.definition import SweepSpec
from dlm.plan.grid import cell_config, make_plan
from dlm.plan.store import write_plan
from dlm.record.outcomes import State
from dlm.record.run import Result, Status


def make_sweep(folder: Path, runs: int) -> tuple[Path, Plan]:
    """Plan a sweep of ``runs`` cells, on a data set whose manifest says that it is prepared."""
    data = folder / "data" / "stdlib"
    data.mkdir(parents=True)
    (data / "x.bin").write_bytes(b"1234")
    files = (PackedFile(name="x.bin", tokens=10**12, bytes=4, sha256="0"),)
    splits = {"train": files, "validation": files}
    write_manifest(data, Manifest(name="stdlib", tokenizer="bytes", vocab_size=256, bos_id=0, splits=splits))
    os.environ["DLM_DATA"] = str(folder / "data")
    spec = SweepSpec(
        name="many", budgets=(1e14,), convention="full_masked_head", models=("33k",), seeds=tuple(range(runs)),
        set={"optimizer.lr": 5e-3}, hardware={"device": "cpu", "gpus_per_node": 0},
    )  # fmt: skip
    return folder / "many", write_plan(folder / "many", make_plan(spec))


def metrics(steps: int, tokens_per_step: int, rows: int, drawn: random.Random) -> str:
    """The text of a metrics.jsonl with ``rows`` logged steps up to the planned last one, and ten validations."""
    at = [max(round(steps * (row + 1) / rows), 1) for row in range(rows)]
    lines = []
    for row, step in enumerate(at):
        said: dict[str, Any] = {"step": step, "tokens": step * tokens_per_step, "time": 1.7e9 + step / 7, "attempt": 1}
        lines.append({**said, "train/loss": 3 + drawn.random(), "lr": drawn.random() / 1e3, "overflows": 0.0,
                      "grad_norm": drawn.random(), "weight_norm": 30 * drawn.random(), "step_time": drawn.random() / 10,
                      "memory_bytes": 510935040.0, "tokens_per_sec": 1e5 * drawn.random()})  # fmt: skip
        if (row + 1) % (rows // 10) == 0:
            lines.append({**said, "val/loss": 2.5, "val/loss_se": 0.01})
    return "".join(json.dumps(line) + "\n" for line in lines)


def fill(sweep_dir: Path, plan: Plan, rows: int) -> int:
    """Write every run directory. Returns the total bytes of all metrics.jsonl."""
    size = 0
    texts = [metrics(plan.cells[0].steps, plan.cells[0].tokens // plan.cells[0].steps, rows, random.Random(seed))
             for seed in range(3)]  # fmt: skip
    for place, cell in enumerate(plan.cells):
        run_dir = sweep_dir / "runs" / cell.cell_id
        run_dir.mkdir(parents=True)
        size += (run_dir / "metrics.jsonl").write_text(texts[place % 3])
        result = Result(
            cell_id=cell.cell_id, step=cell.steps, tokens=cell.tokens, loss=2.5, loss_se=0.01, estimator="mc",
            wall_sec=1e4, tokens_per_sec=1e5, device="cpu", num_devices=1, gpu_hours=0.0, attempts=1, steps_redone=0,
            unique_tokens=cell.tokens, epochs=1.0, data_hash=str(plan.data_hash), unigram_entropy=3.2, finished=1.7e9,
        )  # fmt: skip
        status = Status(state=State.DONE, step=cell.steps, steps=cell.steps, attempts=1, exit_code=0, started=1.7e9,
                        updated=1.7e9)  # fmt: skip
        for name, value in (("result", dataclasses.asdict(result)), ("status", dataclasses.asdict(status)),
                            ("env", {"attempts": [{"git_sha": "0", "device": "cpu"}]})):  # fmt: skip
            (run_dir / f"{name}.json").write_text(json.dumps(value))
        (run_dir / "config.yaml").write_text(yaml.safe_dump(cell_config(cell.groups, cell.overrides)))
    return size


def collect(sweep_dir: Path) -> dict[str, float]:
    """Run `dlm collect` once. Returns its seconds of wall time and of processor time."""
    began, before = time.perf_counter(), os.times()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "dlm.cli", "collect", str(sweep_dir)], check=True, env=environment,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(time.perf_counter() - began, 2), "processor_seconds": round(processor, 2)}


def main() -> None:
    """Make the runs, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where to make them; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sweep_dir, plan = make_sweep(Path(folder), options.runs)
        size = fill(sweep_dir, plan, options.rows)
        rows: dict[str, Any] = {"runs": len(plan.cells), "logged_steps": options.rows, "metrics_gb": size / 1e9}
        rows["first"] = collect(sweep_dir)
        rows["history_parquet_gb"] = (sweep_dir / "history.parquet").stat().st_size / 1e9
        rows["unchanged"] = [collect(sweep_dir) for _ in range(3)]
        last = sweep_dir / "runs" / plan.cells[-1].cell_id / "metrics.jsonl"
        last.write_text(last.read_text())
        rows["one_changed"] = collect(sweep_dir)
    print(json.dumps(rows, indent=2))
    command = f"python benchmarks/collect.py --runs {options.runs} --rows {options.rows}"
    print(write_result(f"collect_cpu_{datetime.date.today()}", rows, command=command, packages=("pyarrow", "pandas")))


if __name__ == "__main__":
    main()
