"""Make a small planned sweep, and write run directories by hand, to test how records are collected."""

import dataclasses
from pathlib import Path

import yaml

from dlm.core.files import append_jsonl, write_json
from dlm.core.recipe import derive
from dlm.data.manifest import Manifest, PackedFile, write_manifest
from dlm.plan.cells import Plan
from dlm.plan.definition import SweepSpec
from dlm.plan.grid import cell_config, make_plan
from dlm.plan.store import write_plan
from dlm.record.outcomes import State
from dlm.record.run import metrics_row, write_result, write_status, write_validation
from dlm.record.wandb import RESULT_PREFIX, described
from support.stub_cell import result, status

LOSS = 2.5


def planned(tmp_path: Path, monkeypatch, **changes) -> tuple[Path, Plan]:
    """Plan a sweep of six cells, none of them started, on dummy data. Returns its folder and its plan.

    ``changes`` replace keys of the definition.
    """
    monkeypatch.setenv("DLM_DATA", str(tmp_path / "data"))
    folder = tmp_path / "data/stdlib"
    folder.mkdir(parents=True)
    (folder / "x.bin").write_bytes(b"1234")
    files = (PackedFile(name="x.bin", tokens=10**9, bytes=4, sha256="0"),)
    splits = {"train": files, "validation": files}
    write_manifest(folder, Manifest(name="stdlib", tokenizer="bytes", vocab_size=256, bos_id=0, splits=splits))
    definition = {
        "name": "s",
        "budgets": (1e10, 2e10),
        "convention": "full_masked_head",
        "models": ("4k", "8k", "19k"),
        "set": {"optimizer.lr": 5e-3, "validation.num_sequences": 64},
        "hardware": {"device": "cpu", "gpus_per_node": 0},
    }
    sweep_dir = tmp_path / "work/s"
    return sweep_dir, write_plan(sweep_dir, make_plan(SweepSpec(**{**definition, **changes})))


def final_rows(cell, loss: float = LOSS) -> list[dict]:
    """Return the metrics of three logged steps and of the final validation."""
    size = cell.tokens // cell.steps
    steps = [1, cell.steps // 2, cell.steps]
    rows = [
        metrics_row(step=s, tokens=s * size, **{"train/loss": 3 + 1 / s, "lr": 1e-3 / s, "grad_norm": 1.0})
        for s in steps
    ]
    return [*rows, metrics_row(step=cell.steps, tokens=cell.tokens, **{"val/loss": loss, "val/loss_se": 0.01})]


def started(sweep_dir: Path, plan, cell, rows: list[dict]) -> Path:
    """Write the run directory of a cell that has started, with ``rows`` as its metrics, and return its path."""
    run_dir = sweep_dir / "runs" / cell.cell_id
    run_dir.mkdir(parents=True, exist_ok=True)
    config = {**cell_config(cell.groups, cell.overrides), "sweep": "s", "cell_id": cell.cell_id}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    write_json(run_dir / "env.json", {"attempts": [{"git_sha": "old"}, {"git_sha": "abc123", "device": "cpu (test)"}]})
    for row in rows:
        append_jsonl(run_dir / "metrics.jsonl", row)
    return run_dir


def finish(sweep_dir: Path, plan, cell, *, loss: float = LOSS, **changes) -> Path:
    run_dir = started(sweep_dir, plan, cell, final_rows(cell, loss))
    facts = {"step": cell.steps, "tokens": cell.tokens, "loss": loss, "data_hash": plan.data_hash, "attempts": 2}
    error = {**facts, **changes}.get("loss_se", 0.01)
    write_validation(run_dir, [loss - 0.5, loss + 0.5], [2 * error**2] * 2)
    write_result(run_dir, result(cell.cell_id, **{**facts, **changes}))
    write_status(run_dir, status(State.DONE, step=cell.steps, steps=cell.steps, exit_code=0))
    return run_dir


def config_of(cell, **overrides) -> dict:
    """Return what the run of a cell tells W&B of itself."""
    config = {**cell_config(cell.groups, {**cell.overrides, **overrides}), "sweep": "s", "cell_id": cell.cell_id}
    return described(config, derive(config))


def summary_of(cell, plan, **changes) -> dict:
    """Return the W&B summary of a cell that is done."""
    values = result(cell.cell_id, **{"step": cell.steps, "loss": LOSS, "data_hash": plan.data_hash, **changes})
    return {RESULT_PREFIX + key: value for key, value in dataclasses.asdict(values).items()}


def reasons(collected) -> dict[str, str]:
    return dict(zip(collected.excluded.run_id, collected.excluded.reason, strict=True))
