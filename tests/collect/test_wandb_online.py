"""Runs that log to a W&B server while they train: resumed, under faults, without a server, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.wandb_cli import dlm_process
from support.wandb_runs import write_runs

from dlm.core.files import read_jsonl


def rows(first: int, end: int) -> list[dict]:
    return [{"step": step, "time": 1e9 + step, "train/loss": 3 / (step + 1)} for step in range(first, end)]


# --- the client itself ----------------------------------------------------------------------------------------------


def test_an_online_run_and_its_resumption_are_one_run(server, tmp_path):
    spec = {"dir": "run", "id": "s-a", "group": "s", "mode": "online", "config": {"lr": 0.5}, "tags": ["t"]}
    write_runs(tmp_path, [{**spec, "rows": rows(0, 20), "exit": 75}], **server.env)
    assert (server.run("s-a").state, len(server.run("s-a").rows)) == ("failed", 20)
    write_runs(tmp_path, [{**spec, "rows": rows(15, 30)}], **server.env)
    run = server.run("s-a")
    assert [row["step"] for row in run.rows] == [*range(20), *range(15, 30)]
    assert [row["_step"] for row in run.rows] == list(range(35))  # an online resume goes on counting
    assert (run.state, run.group, run.tags, run.config["lr"]) == ("finished", "s", ["t"], {"value": 0.5})


def test_what_the_server_refuses_for_a_while_arrives_later(server, tmp_path):
    for operation, fault in (("UpsertBucket", {"status": 429}), ("file_stream", {"status": 500}),
                             ("file_stream", {"drop": True}), ("CreateRunFiles", {"slow_sec": 1.0})):  # fmt: skip
        server.fail(operation, **fault)
    write_runs(
        tmp_path, [{"dir": "run", "id": "s-a", "group": "s", "mode": "online", "rows": rows(0, 5)}], **server.env
    )
    assert [row["step"] for row in server.run("s-a").rows] == list(range(5))
    assert not any(fault.times for fault in server.faults)


def train(server, workdir: Path, *overrides: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A run of twenty steps that was to log online, its patience with W&B cut to two seconds."""
    code = (
        "import sys, dlm.train.wandb_logger as l; l.PATIENCE_SEC = 2.0; from dlm.launch import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "experiment=debug", "training.steps=20", "logger.offline=false", *overrides]
    env = {**os.environ, **server.env, "PYTHONPATH": str(ROOT), "DLM_WORKDIR": str(workdir), **environ}
    del env["WANDB_SILENT"]  # that is train's to say
    return subprocess.run(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=600, check=False)  # fmt: skip


@pytest.mark.long  # a server that is away at the start, and one that refuses for a while, are tested always
@pytest.mark.parametrize(
    ("status", "words"),
    [(500, "W&B has not taken everything within 2 s: `dlm sync`"), (403, "Fatal error while uploading data")],
)
def test_a_server_that_fails_stops_no_run_and_sync_mends_it(server, tmp_path, stdlib_data, status, words):
    server.fail("file_stream", times=10**6, status=status)
    done = train(server, tmp_path)
    assert done.returncode == 0 and words in done.stdout + done.stderr, done.stderr
    (run,) = server.runs.values()
    (run_dir,) = (tmp_path / "adhoc/runs").iterdir()
    assert run.tags == ["masked_diffusion", "8k", "stdlib"] and run.group == "adhoc"
    assert not run.rows and (run_dir / "result.json").is_file()
    server.faults.clear()
    code, said, warned = dlm_process(server, "sync", tmp_path / "adhoc")  # a folder without a plan
    assert code == 0 and "1 of 1 runs are whole" in said, warned
    there = {(row["step"], row["time"]) for row in run.rows if "time" in row}
    assert there == {(row["step"], row["time"]) for row in read_jsonl(run_dir / "metrics.jsonl")}
    assert run.summary["result/loss"] == json.loads((run_dir / "result.json").read_text())["loss"]


@pytest.mark.slow
def test_without_a_server_at_the_start_the_run_logs_into_a_file(server, tmp_path, stdlib_data):
    done = train(server, tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="3")
    assert done.returncode == 0 and "W&B does not answer" in done.stdout and "logs offline" in done.stdout, done.stderr
    assert list(tmp_path.glob("adhoc/runs/*/wandb/offline-run-*/run-*.wandb"))


REFUSALS = """
import os, sys, wandb
from dlm.train.wandb_logger import WandbLogger
for key in ("", os.environ["WANDB_API_KEY"]):
    os.environ["WANDB_API_KEY"] = key
    try:
        WandbLogger(project="dlm", entity="nobody", id="a", offline=False).experiment
    except ValueError as error:
        print("refused", error, flush=True)
    wandb.teardown()
"""


def test_a_login_or_entity_that_the_server_refuses_is_the_users_mistake(server, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", REFUSALS], env=env, cwd=tmp_path, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    without_key, without_entity = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert "No API key" in without_key and "entity nobody not found" in without_entity
    assert "logger.offline=true" in without_key and "logger.offline=true" in without_entity
    assert not server.runs
