"""A sweep as a user runs it, in processes of its own: `dlm sweep`, the same again, and after kill -9 in the middle."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from support import ROOT
from support.wandb_server import ENTITY, serving

from dlm.collect.tables import collect
from dlm.collect.wandb_file import read_wandb_run
from dlm.core.files import read_jsonl
from dlm.plan.store import read_plan
from dlm.record.columns import RUN_COLUMNS
from dlm.record.run import merge_metrics, read_result, read_status

DLM = [sys.executable, "-m", "dlm.cli"]
LOCAL = ("--launcher", "submitit_local")
# Four of smoke's cells, one of which does not learn; those with the higher budget alone are enough to be killed.
KILLED = ("--set", "models=[4k,19k]", "--budget", "2e10")
GRID = (*KILLED, "--budget", "1e10")


def environment(workdir: Path, data: Path) -> dict[str, str]:
    return {**os.environ, "DLM_WORKDIR": str(workdir), "DLM_DATA": str(data), "PYTHONPATH": str(ROOT)}


def dlm(*arguments: str | Path, workdir: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, in a work directory with its own data, or anywhere."""
    own = {} if workdir is None else environment(workdir, workdir / "data")
    return subprocess.run(
        [*DLM, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **own, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a sweep that nothing happened to, and what it printed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = dlm("sweep", "smoke", *LOCAL, *GRID, workdir=workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir / "smoke", done.stdout


@pytest.mark.slow
def test_a_sweep_leaves_every_file_that_it_promises(undisturbed: tuple[Path, str]) -> None:
    folder, said = undisturbed
    plan = read_plan(folder)
    runs = pd.read_csv(folder / "runs.csv")
    assert list(runs.columns) == list(RUN_COLUMNS)
    assert len(runs) + len(pd.read_csv(folder / "excluded.csv")) == len(plan.cells) == 4
    assert f"report: {folder / 'report' / 'report.html'}" in said
    for name in ("report/report.html", "fits.json", "history.parquet", "estimate.json"):
        assert (folder / name).stat().st_size > 0
    for kind in ("png", "svg", "pdf"):
        assert list((folder / "report" / "figures").glob(f"*.{kind}"))
    entropy = {read_result(folder / "runs" / cell.cell_id).unigram_entropy for cell in plan.cells}  # type: ignore[union-attr]
    assert len(entropy) == 1 and (runs.loss < entropy.pop()).all()


@pytest.mark.slow
def test_collect_agrees_with_run_directories_and_wandb(undisturbed: tuple[Path, str]) -> None:
    folder, _ = undisturbed
    collected = collect(folder, write=False, verify=True)
    assert collected.warnings == []
    for row in collected.runs.itertuples():
        run_dir = folder / "runs" / row.run_id
        last = merge_metrics(read_jsonl(run_dir / "metrics.jsonl"))[-1]
        wandb = read_wandb_run(run_dir, f"smoke-{row.run_id}")
        assert wandb is not None
        assert row.loss == last["val/loss"] == [line for line in wandb.history if "val/loss" in line][-1]["val/loss"]
        assert row.tokens == last["tokens"] and row.steps == last["step"]


@pytest.mark.slow
def test_run_directories_offline_files_and_the_server_tell_the_same(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = undisturbed
    plan = (folder / "plan.json").read_bytes()

    def told(by: str, *arguments: str | Path, **environ: str) -> dict[str, str]:
        done = dlm("collect", *arguments, **environ)
        warnings = [line for line in done.stderr.splitlines() if "waiting for" not in line]  # on a busy machine
        assert done.returncode == 0 and not warnings, done.stderr
        tables = {name: (tmp_path / by / "smoke" / f"{name}.csv").read_text() for name in ("runs", "excluded")}
        sources = {table.count(f",{by},") for table in tables.values()}
        assert sources == {len(table.splitlines()) - 1 for table in tables.values()}
        return {name: table.replace(f",{by},", ",run_dir,") for name, table in tables.items()}

    shutil.copytree(folder, tmp_path / "run_dir/smoke", symlinks=True)
    for path in (tmp_path / "run_dir/smoke").glob("runs/*/wandb"):
        shutil.rmtree(path)
    for by in ("wandb", "wandb_api"):
        (tmp_path / by / "smoke").mkdir(parents=True)
        (tmp_path / by / "smoke/plan.json").write_bytes(plan)
    for path in folder.glob("runs/*/wandb"):
        shutil.copytree(path, tmp_path / "wandb/smoke/runs" / path.parent.name / "wandb", symlinks=True)
    with serving() as server:
        done = dlm("sync", folder, **server.env)
        assert done.returncode == 0 and "4 of 4 runs are whole on W&B" in done.stdout, done.stderr
        by_run_dir = told("run_dir", tmp_path / "run_dir/smoke")
        assert told("wandb", tmp_path / "wandb/smoke") == by_run_dir
        where = ("--wandb", f"{ENTITY}/dlm")
        assert told("wandb_api", tmp_path / "wandb_api/smoke", *where, **server.env) == by_run_dir
        # And without the plan, into an empty folder: the same rows by name.
        (tmp_path / "alone/smoke").mkdir(parents=True)
        done = dlm("collect", *where, "--out", tmp_path / "alone/smoke", **server.env)
        assert done.returncode == 0, done.stderr
        alone = (tmp_path / "alone/smoke/runs.csv").read_text().replace(",wandb_api,", ",run_dir,")
        assert sorted(alone.splitlines()) == sorted(by_run_dir["runs"].splitlines())
        assert not server.unknown
    histories = [pd.read_parquet(tmp_path / by / "smoke/history.parquet") for by in ("run_dir", "wandb", "wandb_api")]
    for other in histories[1:]:
        pd.testing.assert_frame_equal(histories[0], other)


@pytest.mark.slow
def test_a_second_start_trains_nothing(undisturbed: tuple[Path, str]) -> None:
    folder, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*") if path.name != "log.txt"}
    plan_bytes = (folder / "plan.json").read_bytes()
    done = dlm("submit", "smoke", *LOCAL, *GRID, workdir=folder.parent)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "plan.json").read_bytes() == plan_bytes
    assert "nothing to train" in done.stdout


def first_running(folder: Path) -> Path | None:
    """A run strictly between its first checkpoint and its end, a few steps before the last one at least."""
    for latest in folder.glob("runs/*/LATEST"):
        status = read_status(latest.parent)
        if status and 0 < status.step < 0.7 * status.steps and read_result(latest.parent) is None:
            return latest.parent
    return None


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_ends_with_the_same_losses(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = undisturbed
    data = folder.parent / "data"
    process = subprocess.Popen(
        [*DLM, "submit", "smoke", *LOCAL, *KILLED],
        env=environment(tmp_path, data),
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    killed, deadline = None, time.monotonic() + 300
    while killed is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
        killed = first_running(tmp_path / "smoke")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert killed is not None
    status = read_status(killed)
    assert status is not None and read_result(killed) is None
    checkpoints = sorted(killed.glob("checkpoints/step_*"))
    assert checkpoints and 0 < status.step < status.steps

    done = dlm("submit", "smoke", *LOCAL, *KILLED, workdir=tmp_path, DLM_DATA=str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = re.search(r"going on from step_(\d+)", (killed / "log.txt").read_text())
    assert resumed is not None and 0 < int(resumed[1]) < status.steps
    result = read_result(killed)
    assert result is not None and result.attempts == 2
    for cell in read_plan(tmp_path / "smoke").cells:
        ours, theirs = (read_result(base / "runs" / cell.cell_id) for base in (tmp_path / "smoke", folder))
        assert ours is not None and theirs is not None
        assert (ours.loss, ours.loss_se) == (theirs.loss, theirs.loss_se)
    curves = [
        [
            (row["step"], row.get("train/loss"), row.get("val/loss"), row.get("grad_norm"))
            for row in merge_metrics(read_jsonl(base / "runs" / killed.name / "metrics.jsonl"))
        ]
        for base in (tmp_path / "smoke", folder)
    ]
    assert curves[0] == curves[1]


def test_plan_prints_every_cell_with_its_estimate_as_json(tmp_path: Path) -> None:
    definition = ROOT / "sweeps/isoflop.yaml"
    done = dlm("plan", definition, "--budget", "6e18", "--budget", "1e19", "--json", workdir=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert {"spec", "convention", "cells", "dropped"} <= set(plan)
    assert {cell["budget_flops"] for cell in plan["cells"]} == {6e18, 1e19}
    columns = (
        "cell_id model objective seed num_params budget_flops tokens steps global_batch_size block_size learning_rate "
        "flops budget_error_pct tokens_per_param epochs hours gpu_hours memory_gib nodes gpus_per_node"
    )
    for cell in plan["cells"]:
        assert set(columns.split()) <= set(cell)
        assert set(cell["flops"]) == {"6n", "6n_total", "full", "full_masked_head"}
        assert abs(cell["budget_error_pct"]) < 0.5
    assert all(row["reason"] for row in plan["dropped"])
