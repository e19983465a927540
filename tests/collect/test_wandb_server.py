"""The real W&B against the stand-in server: online, resumed, under faults; dlm's collect and sync through it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support import ROOT
from support.by_hand import LOSS, final_rows, finish, planned, reasons, started
from support.stub_cell import status as status_of
from support.wandb_server import ENTITY, serving
from test_wandb_file import write_runs

from dlm.collect.mapping import load_mapping
from dlm.collect.tables import collect
from dlm.collect.wandb_file import wandb_files
from dlm.core.errors import UserError
from dlm.core.lease import Lease
from dlm.fit.rows import read_runs
from dlm.record.outcomes import State
from dlm.record.run import write_status

PROJECT = f"{ENTITY}/dlm"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return planned(tmp_path, monkeypatch)


@pytest.fixture
def server():
    with serving() as running:
        yield running
        assert not running.unknown


def dlm(server, *arguments: str | Path, settings: str = "pass", **environ: str):
    """The command in a process of its own, its W&B sent to the server: (exit code, stdout, stderr)."""
    pages = f"import dlm.collect.wandb_server as api; api.RUNS_A_PAGE, api.STEPS_A_PAGE = 3, 2000; {settings};"
    code = f"import sys; {pages} from dlm.cli import main; main()"
    env = {**os.environ, **server.env, "PYTHONPATH": str(ROOT), **environ}
    server.asked.clear()
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def complaint(answer) -> str:
    code, _, said = answer
    assert code == 2 and len(said.strip().splitlines()) == 1 and said.startswith("dlm: "), said
    return said.strip()


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


# --- dlm collect through the API -------------------------------------------------------------------------------------


def remote_runs(server, count: int) -> None:
    """Runs of others: a GPT's names, 4,500 logged rows each, the loss every 1,500 steps."""
    for number in range(count):
        history = [{"step": step, "loss": 4 - step / 1e4} for step in range(1, 4501)]
        for step in (1500, 3000, 4500):
            history[step - 1]["eval/nll"] = 3 - step / 1e4 - number / 10
        config = {"model": {"n": 10**6 * (number + 1)}, "train": {"steps": 4500, "batch": 8, "length": 128}}
        server.add(f"run{number}", rows=history, config=config, state="finished", group="others",
                   summary={"eval/nll": 0.0})  # fmt: skip


MAPPING = {
    "columns": {
        "params": "model.n",
        "tokens": {"product": ["train.steps", "train.batch", "train.length"]},
        "steps": "train.steps",
        "objective": {"value": "autoregressive"},
    },
    "history": {"step": "step", "val/loss": "eval/nll", "train/loss": {"metric": "loss", "scale": 2}},
}


def mapping_file(folder: Path, **changes) -> Path:
    path = folder / "mapping.yaml"
    path.write_text(yaml.safe_dump({**MAPPING, **changes}))
    return path


def test_a_project_of_others_becomes_a_table_in_few_requests(server, tmp_path):
    remote_runs(server, 7)
    server.add("elsewhere", group="another", state="finished")
    command = ("collect", "--wandb", PROJECT, "--mapping", mapping_file(tmp_path), "--filter", "group=others")
    command = (*command, "--out", tmp_path / "out")
    server.fail("Runs", times=1, status=500)
    server.fail("HistoryPage", times=1, status=429)
    server.fail("HistoryPage", times=1, drop=True)
    server.fail("RunParquetHistory", times=1, slow_sec=1.0)
    code, said, warned = dlm(server, *command)
    assert (code, warned) == (0, "") and "7 runs" in said
    # three pages of runs and one failed; per run two requests and a page for each 2,000 of 4,500 steps, and two failed
    expected = {"Viewer": 1, "Runs": 3 + 1, "RunHistoryKeys": 7, "RunParquetHistory": 7, "HistoryPage": 7 * 3 + 2}
    assert dict(server.asked) == expected
    runs = pd.read_csv(tmp_path / "out/runs.csv").set_index("run_id")
    assert runs.loss.to_dict() == {f"run{n}": pytest.approx(3 - 0.45 - n / 10) for n in range(7)}
    assert (runs.tokens == 4500 * 8 * 128).all() and (runs.params == [10**6 * (n + 1) for n in range(7)]).all()
    assert (runs.flops == 6.0 * runs.params * runs.tokens).all() and set(runs.source) == {"wandb_api"}
    assert runs.loss_se.isna().all() and runs.seed.isna().all() and len(read_runs(tmp_path / "out/runs.csv")) == 7
    history = pd.read_parquet(tmp_path / "out/history.parquet")
    one = history[history.run_id == "run3"]
    assert list(one.step) == list(range(1, 4501)) and one["val/loss"].notna().sum() == 3
    assert one["train/loss"].iloc[0] == 2 * (4 - 1e-4)
    # Again: what has not changed is not asked for again; what has, is.
    before = (tmp_path / "out/runs.csv").read_bytes(), (tmp_path / "out/history.parquet").stat().st_mtime_ns
    dlm(server, *command)
    assert dict(server.asked) == {"Viewer": 1, "Runs": 3}
    assert ((tmp_path / "out/runs.csv").read_bytes(), (tmp_path / "out/history.parquet").stat().st_mtime_ns) == before
    server.run("run2").heartbeat = "2027-01-01T00:00:00Z"
    server.run("run2").history[4499]["eval/nll"] = 1.25
    dlm(server, *command)
    assert server.asked["RunParquetHistory"] == 1
    assert pd.read_csv(tmp_path / "out/runs.csv").set_index("run_id").loss["run2"] == 1.25


def test_every_run_of_another_shape_is_left_out_with_its_reason(server, tmp_path):
    config = {"model": {"n": 1000}, "train": {"steps": 10, "batch": 8, "length": 128}, "data": "web", "seed": 0}
    whole = [{"step": step, "loss": 3.0} for step in range(1, 10)] + [{"step": 10, "loss": 3.0, "eval/nll": 2.5}]

    def add(name, **facts):
        server.add(name, **{"rows": whole, "config": config, "state": "finished", **facts})

    add("older", heartbeat="2026-01-01T00:00:00Z")
    add("fine", heartbeat="2026-02-01T00:00:00Z")
    add("live", state="running")
    add("cut", rows=whole[:6], state="crashed")
    add("blown", rows=[*whole[:9], {"step": 10, "eval/nll": "NaN"}], state="failed")
    add("books", config={**config, "data": "books"})
    add("unscored", rows=[*whole[:9], {"step": 10, "loss": 3.0}])
    add("images", config={"resolution": 64}, rows=[{"fid": 3.0}])
    add("empty", rows=[])
    add("words", config={**config, "model": {"n": "small"}})
    add("total", config={**config, "seed": 1, "flops": 7.0 * 1000 * 10240}, summary={})
    add("huge", config={**config, "model": {"n": 10**400}})
    add("large", config={**config, "model": {"n": 2**63}})
    add("endless", config={**config, "train": {"steps": 10, "batch": "inf", "length": 128}})
    add("peak", rows=[*whole[:9], {"step": 10, "eval/nll": "Infinity"}])
    add("rebound", rows=[*whole[:9], {"step": 10, "eval/nll": "-Infinity"}, {"step": 11, "eval/nll": 2.0}])
    add("unseeded", config={key: value for key, value in config.items() if key != "seed"})
    add("tuned", config={**config, "seed": 2, "pretrained": "x"})
    require = {"data": ["web"], "pretrained": None, "frozen": [None, False]}  # null: for runs without the key
    mapping = mapping_file(tmp_path, require=require, cell=["model.n", "seed"])
    content = yaml.safe_load(mapping.read_text())
    command = ("collect", "--wandb", PROJECT, "--mapping", mapping, "--out", tmp_path / "out")
    code, said, _ = dlm(server, *command)
    table = pd.read_csv(tmp_path / "out/excluded.csv").set_index("run_id")
    runs = pd.read_csv(tmp_path / "out/runs.csv").set_index("run_id")
    assert code == 0 and list(runs.index) == ["fine", "total"] and runs.loss["fine"] == 2.5
    expected = {
        "older": "duplicate: the same cell as fine",
        "live": "running: W&B says running",
        "cut": "short: step 6 of 10 (W&B says crashed)",
        "blown": "diverged: its last validation loss is nan",
        "books": "another config: data is 'books', required is 'web'",
        "unscored": "missing validation: no val/loss at step 10",
        "images": "another config: data is None",
        "empty": "missing validation: its history has none of the mapped metrics",
        "words": "another config: model.n",
        "huge": "another config: params is 1000000",
        "large": f"another config: params is {2**63}, no whole number",
        "endless": "another config: train.batch is 'inf', no finite number",
        "peak": "diverged: its last validation loss is inf",
        "rebound": "diverged: its validation loss is -inf",
        "unseeded": "another config: its config has no seed",
        "tuned": "another config: pretrained is 'x', required is None",
    }
    for name, reason in expected.items():
        found = table.reason[name]
        assert found.startswith(reason) or (name == "words" and "'small'" in found), (name, found)
        assert f"left out {name}: {found}" in said and (name == "older") == pd.notna(table.loss[name])
    assert set(table.index) == set(expected)
    # With the FLOPs of each run mapped, those that count otherwise are of another convention.
    content["columns"]["flops"] = "flops"
    mapping.write_text(yaml.safe_dump(content))
    dlm(server, *command)
    table = pd.read_csv(tmp_path / "out/excluded.csv").set_index("run_id")
    assert table.reason["total"].startswith("another convention: its flops are") and "6 N D" in table.reason["total"]
    assert table.reason["fine"] == "another config: its config has no flops"
    # A key that no run has would leave them all out: it is a mistake in the mapping.
    for changes, words in (
        ({"cell": ["model.n", "sed"]}, "the config key 'sed' (cell of the mapping): did you mean seed?"),
        ({"columns": {**content["columns"], "params": "modl.n"}}, "'modl.n' (columns.params of"),
        ({"columns": {**content["columns"], "budget": {"summary": "flps"}}}, "the summary key 'flps' (columns.budget"),
    ):
        mapping.write_text(yaml.safe_dump({**content, **changes}))
        server.asked.clear()
        assert words in complaint(dlm(server, *command)) and "HistoryPage" not in server.asked
    mapping.write_text(yaml.safe_dump({**MAPPING, "history": {"step": "step", "val/loss": "eval/nl"}}))
    assert "the metric 'eval/nl' (history.val/loss of the mapping): did you mean eval/nll" in complaint(
        dlm(server, *command)
    )


def test_a_history_that_cannot_be_read_costs_its_own_run_only(server, tmp_path):
    remote_runs(server, 3)
    command = ("collect", "--wandb", PROJECT, "--mapping", mapping_file(tmp_path), "--out", tmp_path / "out")
    server.fail("RunParquetHistory", times=1, refuse="internal")
    code, said, _ = dlm(server, *command)
    assert code == 0 and "2 runs" in said and "missing validation: its history could not be read (" in said
    code, said, _ = dlm(server, *command)
    assert code == 0 and "3 runs" in said and server.asked["RunParquetHistory"] == 1
    server.fail("RunParquetHistory", times=3, refuse="internal")
    for run in server.runs.values():
        run.heartbeat = "2027-01-01T00:00:00Z"
    before = (tmp_path / "out/runs.csv").read_bytes()
    code, _, warned = dlm(server, *command)
    assert code == 75 and "nothing was written" in warned and (tmp_path / "out/runs.csv").read_bytes() == before


def test_a_server_that_gives_less_than_it_has_is_named(server, tmp_path):
    remote_runs(server, 1)
    server.page_limit = 900
    command = ("collect", "--wandb", PROJECT, "--mapping", mapping_file(tmp_path), "--out", tmp_path / "out")
    _, said, warned = dlm(server, *command)
    assert "the W&B server gave 4100 of the 4500 rows that it says it has" in warned and "1 runs" in said


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (("--wandb", PROJECT), {"WANDB_API_KEY": ""}, "no login at W&B"),
        (("--wandb", PROJECT), {"WANDB_API_KEY": "x" * 40}, "no login at W&B"),
        (("--wandb", f"{ENTITY}/nothing"), {}, f"has no project {ENTITY}/nothing"),
        (("--wandb", "nobody/dlm"), {}, "has no project nobody/dlm"),
        (("--wandb", "dlm"), {}, "give it as ENTITY/PROJECT"),
        (("--wandb", PROJECT, "--filter", "group"), {}, "give KEY=VALUE"),
        (("--wandb", PROJECT, "--filter", "group=none"), {}, "nothing was written"),
        (("--wandb", PROJECT), {}, "none of the 1 runs in that project was launched by dlm: give --mapping"),
        ((), {}, "give a sweep, or --wandb"),
    ],
)
def test_a_mistake_is_one_line(server, tmp_path, arguments, environ, words):
    server.add("image", config={"resolution": 64}, state="finished")
    out = ("--out", tmp_path / "out") if arguments else ()
    assert words in complaint(dlm(server, "collect", *arguments, *out, **environ))
    assert not (tmp_path / "out").exists()


def test_tables_that_could_not_be_written_are_not_asked_for(server, tmp_path):
    server.add("a", state="finished")
    (tmp_path / "file").write_text("")
    command = ("collect", "--wandb", PROJECT, "--out", tmp_path / "file/out")
    assert "file is no folder: give a folder to write to" in complaint(dlm(server, *command)) and not server.asked
    command = (*command[:-1], tmp_path / "out", "--mapping", mapping_file(tmp_path), "--verify")
    assert "--verify is for runs that dlm launched" in complaint(dlm(server, *command)) and not server.asked


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": {"params": "n"}}, "maps no column tokens"),
        ({"columns": {**MAPPING["columns"], "loss": "x"}}, "unknown column"),
        ({"columns": {**MAPPING["columns"], "parms": "x"}}, "did you mean params"),
        ({"columns": {"params": {"config": "n", "value": 3}}}, "give exactly one of"),
        ({"history": {"step": "step"}}, "maps no validation loss"),
        ({"history": {"val/nll": "x"}}, "unknown history"),
        ({"convention": "7n"}, "unknown convention"),
        ({"convention": "full"}, "needs columns.flops"),
        ({"colums": {}}, "colums"),
        ({"columns": {**MAPPING["columns"], "budget": {"config": "b", "scale": float("inf")}}}, "is no factor"),
        ({"history": {"step": "step", "val/loss": {"metric": "x", "scale": 0}}}, "is no factor"),
    ],
)
def test_a_mistake_in_a_mapping_is_named(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        load_mapping(mapping_file(tmp_path, **changes))


# --- dlm sync -------------------------------------------------------------------------------------------------------


def logged(sweep_dir: Path, entries) -> None:
    """W&B files of run directories, with the very rows of their metrics.jsonl or with some of them."""
    specs = [{"dir": f"runs/{cell.cell_id}", "id": f"s-{cell.cell_id}", "group": "s", "rows": some, "exit": code}
             for cell, some, code in entries]  # fmt: skip
    write_runs(sweep_dir, specs)


def on_disk(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_sync_brings_everything_once_and_says_what_it_could_not(sweep, server):
    sweep_dir, plan = sweep
    whole, torn, lost, resumed, live = plan.cells[:5]
    folders = {cell.cell_id: finish(sweep_dir, plan, cell) for cell in (whole, torn, lost, resumed)}
    folders[live.cell_id] = started(sweep_dir, plan, live, final_rows(live)[:1])
    write_status(folders[live.cell_id], status_of(State.RUNNING, step=1, steps=live.steps))
    params = {cell.cell_id: cell.num_params for cell in plan.cells}
    rows_of = {name: on_disk(folder) for name, folder in folders.items()}
    first = [
        {**rows_of[resumed.cell_id][0], "time": 1.0},
        {**rows_of[resumed.cell_id][1], "time": 2.0, "train/loss": 9.0},
    ]
    logged(sweep_dir, [(whole, rows_of[whole.cell_id], 0), (torn, rows_of[torn.cell_id], 0), (resumed, first, 75)])
    logged(sweep_dir, [(resumed, rows_of[resumed.cell_id], 0)])
    (path,) = wandb_files(folders[torn.cell_id])
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"val/loss")])  # killed: the last row is half
    for _ in range(8):  # `wandb sync` of one run gets nothing through, and ends with 0 all the same
        server.fail("file_stream", times=1, status=400)
    with Lease(folders[live.cell_id]):
        code, said, warned = dlm(server, "sync", sweep_dir)
    assert code == 75 and f"not looked at: s-{live.cell_id}: it runs" in said and "did not arrive" in warned
    server.faults.clear()
    code, said, warned = dlm(server, "sync", sweep_dir)
    assert code == 0 and warned == "" and "5 of 5 runs are whole on W&B" in said, (said, warned)
    for name, wanted in rows_of.items():
        run = server.run(f"s-{name}")
        there = [(row["step"], row["time"]) for row in run.rows if "time" in row]
        wanted = [(row["step"], row["time"]) for row in [*(first if name == resumed.cell_id else []), *wanted]]
        assert there == wanted  # every row, once, in its order
        if name != live.cell_id:
            assert run.summary["result/loss"] == LOSS and run.summary["val/loss"] == LOSS
            assert run.config["record"]["value"]["params"] == params[name]
    code, said, _ = dlm(server, "sync", sweep_dir)
    assert code == 0 and "0 rows new" in said
    assert set(server.asked) == {"Viewer", "GetDefaultEntity", "Runs"}
    # What was synced is what is collected: from the server alone, the last attempt wins.
    alone = sweep_dir.parent / "alone"
    code, _, warned = dlm(server, "collect", "--wandb", PROJECT, "--out", alone)
    assert code == 0 and warned == ""
    ours, theirs = (collect(sweep_dir).runs, pd.read_csv(alone / "runs.csv"))
    assert dict(zip(theirs.run_id, theirs.loss, strict=True)) == dict(zip(ours.run_id, ours.loss, strict=True))
    history = pd.read_parquet(alone / "history.parquet")
    curve = history[history.run_id == resumed.cell_id]["train/loss"]
    assert list(curve) == [row["train/loss"] for row in rows_of[resumed.cell_id][:3]]


def test_a_server_that_lost_the_end_of_a_run_gets_that_end(sweep, server):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    logged(sweep_dir, [(cell, on_disk(finish(sweep_dir, plan, cell)), 0)])
    assert dlm(server, "sync", sweep_dir)[0] == 0
    run = server.run(f"s-{cell.cell_id}")
    for line in sorted(run.history)[-2:]:
        del run.history[line]
    run.heartbeat = "2027-01-01T00:00:00Z"
    code, _, warned = dlm(server, "collect", sweep_dir, "--wandb", PROJECT, "--verify")
    assert code == 0 and "the W&B server lacks 1 of the 3 logged steps that metrics.jsonl has" in warned, warned
    code, said, _ = dlm(server, "sync", sweep_dir)
    assert code == 0 and "2 rows new" in said and len(run.rows) == 4


def test_sync_of_a_folder_that_was_copied_uploads_nothing_again(sweep, server):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    logged(sweep_dir, [(cell, on_disk(finish(sweep_dir, plan, cell)), 0)])
    assert dlm(server, "sync", sweep_dir)[0] == 0
    rows = len(server.run(f"s-{cell.cell_id}").rows)
    copy = shutil.copytree(sweep_dir, sweep_dir.parent / "elsewhere")
    code, said, warned = dlm(server, "sync", copy)
    assert (code, warned) == (0, "") and "1 of 1 runs are whole on W&B, 0 rows new" in said
    assert len(server.run(f"s-{cell.cell_id}").rows) == rows
    shutil.rmtree(copy / "runs" / cell.cell_id / "wandb")  # collect asks for the runs by the sweep's name as well
    (copy / "runs" / cell.cell_id / "result.json").unlink()
    (copy / "runs" / cell.cell_id / "metrics.jsonl").unlink()
    assert dlm(server, "collect", copy, "--wandb", PROJECT)[0] == 0
    assert list(pd.read_csv(copy / "runs.csv").source) == ["wandb_api"]
    with Lease(copy / "ledger", doing="synced"):
        assert "is being synced by process" in complaint(dlm(server, "sync", copy))
    (copy / "runs" / cell.cell_id / "config.yaml").write_text("{}")
    assert "is not the config of a run" in complaint(dlm(server, "sync", copy))


def test_sync_says_what_there_is_nothing_to_upload_of_and_looks_at_the_rest(sweep, server):
    sweep_dir, plan = sweep
    silent, empty, unnamed, alone, torn = plan.cells[:5]
    started(sweep_dir, plan, silent, [])
    rows_of = {cell.cell_id: on_disk(finish(sweep_dir, plan, cell)) for cell in (empty, alone, torn)}
    config = yaml.safe_load((sweep_dir / "runs" / alone.cell_id / "config.yaml").read_text())
    for cell in (empty, unnamed, alone, torn):
        name = cell.cell_id
        spec = {"dir": f"runs/{name}", "id": f"s-{name}", "group": "s", "rows": rows_of.get(name, [{"step": 1}])}
        told = {**config, "cell_id": name, "record": {"git_sha": "abc"}} if cell is alone else {}
        write_runs(sweep_dir, [{**spec, "config": told}])
        for path in (sweep_dir / "runs" / name).iterdir():
            if path.name not in ("wandb", *(["config.yaml"] if cell in (empty, torn) else [])):
                path.unlink()
    files = {cell.cell_id: wandb_files(sweep_dir / "runs" / cell.cell_id)[0] for cell in (empty, torn, alone)}
    folder = files[alone.cell_id].parent  # as if an earlier sync had been cut off: its rows go one by one
    (folder.parent / "tried.json").write_text(json.dumps([[PROJECT, folder.name]]))
    files[empty.cell_id].write_bytes(files[empty.cell_id].read_bytes()[:7])
    content = files[torn.cell_id].read_bytes()
    files[torn.cell_id].write_bytes(content[: content.index(b"val/loss")])
    code, said, warned = dlm(server, "sync", sweep_dir)
    assert f"nothing to upload: s-{silent.cell_id}: it logged nothing" in said
    assert (
        f"s-{empty.cell_id}: what can be read of it has arrived, not all of it: run-s-{empty.cell_id}.wandb" in warned
    )
    assert f"not looked at: {unnamed.cell_id}" in said and "has no config.yaml" in said
    assert f"s-{torn.cell_id}: what can be read of it has arrived, not all of it: run-s-{torn.cell_id}.wandb" in warned
    assert code == 75 and "1 of 4 runs are whole on W&B, 7 rows new" in said, (said, warned)
    assert {name for *_, name in server.runs} == {f"s-{alone.cell_id}", f"s-{torn.cell_id}"}
    assert server.run(f"s-{alone.cell_id}").config["record"]["value"] == {"git_sha": "abc"}
    shutil.rmtree(sweep_dir / "runs" / unnamed.cell_id)
    assert dlm(server, "sync", sweep_dir)[0] == 75
    shutil.rmtree(sweep_dir / "runs" / empty.cell_id)
    shutil.rmtree(sweep_dir / "runs" / torn.cell_id)
    assert dlm(server, "sync", sweep_dir)[0] == 0


def test_rows_of_a_failed_run_do_not_make_it_a_finished_one(sweep, server):
    sweep_dir, plan = sweep
    failed, killed, done = plan.cells[:3]
    for cell in (failed, killed):
        started(sweep_dir, plan, cell, final_rows(cell)[:2])
    write_status(sweep_dir / "runs" / failed.cell_id, status_of(State.DIVERGED, step=3, exit_code=3))
    run_dir = finish(sweep_dir, plan, done)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**config, "logger": {"tags": ["a"], "entity": ENTITY}}))
    code, said, warned = dlm(server, "sync", sweep_dir)
    assert code == 0 and "3 of 3 runs are whole" in said, warned
    states = {cell.cell_id: server.run(f"s-{cell.cell_id}").state for cell in (failed, killed, done)}
    assert list(states.values()) == ["failed", "failed", "finished"]
    assert server.run(f"s-{done.cell_id}").tags == ["a"]


def test_sync_goes_on_past_a_run_that_fails_and_keeps_runs_apart(sweep, server):
    sweep_dir, plan = sweep
    first, second, odd, lost = plan.cells[:4]
    for cell in (first, second, odd, lost):
        finish(sweep_dir, plan, cell)
    config = yaml.safe_load((sweep_dir / "runs" / second.cell_id / "config.yaml").read_text())
    (sweep_dir / "runs" / second.cell_id / "config.yaml").write_text(yaml.safe_dump({**config, "sweep": "t"}))
    del config["objective"]["name"]
    (sweep_dir / "runs" / odd.cell_id / "config.yaml").write_text(yaml.safe_dump({**config, "cell_id": odd.cell_id}))
    (sweep_dir / "runs" / lost.cell_id / "metrics.jsonl").unlink()  # its result is there to upload
    break_one = (
        "import wandb.sdk.wandb_run as r, wandb; real = r.Run.log; "
        f"fail = lambda self, *a, **k: (_ for _ in ()).throw(wandb.errors.CommError('gone')) "
        f"if self.id == 's-{first.cell_id}' else real(self, *a, **k); r.Run.log = fail"
    )
    code, said, warned = dlm(server, "sync", sweep_dir, settings=break_one)
    assert code == 75 and "1 of 4 runs are whole" in said, (said, warned)
    assert f"s-{lost.cell_id}: what can be read of it has arrived, not all of it: its rows end at step 0" in warned
    assert f"s-{first.cell_id}: 4 of 4 rows did not arrive; gone" in warned
    assert f"s-{odd.cell_id}: 4 of 4 rows did not arrive; its config.yaml or env.json cannot be read" in warned
    there = {name: [row["step"] for row in run.rows if "time" in row] for (*_, name), run in server.runs.items()}
    assert there == {f"s-{first.cell_id}": [], f"s-{lost.cell_id}": [],
                     f"t-{second.cell_id}": [row["step"] for row in final_rows(second)]}  # fmt: skip
    assert server.run(f"s-{lost.cell_id}").summary["result/loss"] == LOSS
    code, said, warned = dlm(server, "sync", sweep_dir)
    assert code == 75 and "2 of 4 runs are whole on W&B, 4 rows new" in said, (said, warned)


def test_sync_takes_no_run_for_another_and_none_for_whole_that_lost_something(sweep, server):
    sweep_dir, plan = sweep
    swapped, other, cut, kept = plan.cells[:4]
    for cell in (swapped, other, cut, kept):
        logged(sweep_dir, [(cell, on_disk(finish(sweep_dir, plan, cell)), 0)])
    runs = sweep_dir / "runs"
    assert dlm(server, "sync", sweep_dir)[0] == 0
    before = {name: (run.rows, run.config, run.summary) for (*_, name), run in server.runs.items()}
    shutil.rmtree(runs / swapped.cell_id)
    shutil.copytree(runs / other.cell_id, runs / swapped.cell_id)  # a folder by another name
    shutil.copytree(runs / other.cell_id, runs / "copy")
    (runs / kept.cell_id / "wandb/tried.json").write_text("[[")
    (runs / kept.cell_id / "wandb/synced.json").write_text("[")
    code, said, warned = dlm(server, "sync", sweep_dir)
    for name in (swapped.cell_id, "copy"):
        assert f"not looked at: {name}: its config is of {other.cell_id}: give the folder that name" in said
    assert code == 75 and "3 of 5 runs are whole on W&B, 0 rows new" in said and not warned, (said, warned)
    assert {name: (run.rows, run.config, run.summary) for (*_, name), run in server.runs.items()} == before
    # What is gone here and there is not whole, whatever the server has.
    for name in (swapped.cell_id, "copy"):
        shutil.rmtree(runs / name)
    server.runs.clear()
    lines = (runs / cut.cell_id / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs / cut.cell_id / "metrics.jsonl").write_text("".join(lines[:2]))
    (runs / cut.cell_id / "result.json").unlink()
    (path,) = wandb_files(runs / cut.cell_id)
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"val/loss")])
    code, said, warned = dlm(server, "sync", sweep_dir)
    assert code == 75 and "2 of 3 runs are whole" in said, (said, warned)
    assert "status.json says that it is done, and its result is gone" in warned and "is cut off" in warned


def test_a_server_that_is_away_is_no_mistake(sweep, server):
    sweep_dir, plan = sweep
    finish(sweep_dir, plan, plan.cells[0])
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    code, _, warned = dlm(server, "sync", sweep_dir, settings="api.TIMEOUT_SEC = 2", **away)
    assert code == 75 and "does not answer" in warned and "Traceback" not in warned


def test_sync_to_an_entity_that_refuses_is_the_users_mistake(sweep, server):
    sweep_dir, plan = sweep
    finish(sweep_dir, plan, plan.cells[0])
    said = complaint(dlm(server, "sync", sweep_dir, "--wandb", "nobody/dlm"))
    assert "refuses nobody/dlm: " in said and "entity nobody not found" in said
    assert "UpsertBucket" not in server.asked and not server.runs
    server.add("other", state="finished")  # the project can be read, and not written
    server.fail("UpsertBucket", times=10**6, refuse="permission denied")
    assert f"refuses runs in {PROJECT}: " in complaint(dlm(server, "sync", sweep_dir))


def test_a_wait_for_the_server_is_said(server, tmp_path):
    remote_runs(server, 1)
    server.fail("Runs", slow_sec=1.5)
    command = ("collect", "--wandb", PROJECT, "--mapping", mapping_file(tmp_path), "--out", tmp_path / "out")
    code, _, warned = dlm(server, *command, settings="api.NOTICE_SEC = 0.5")
    assert code == 0 and warned == f"dlm: waiting for the runs of {PROJECT} from W&B ({server.url})\n"


def test_sync_of_nothing_and_to_nobody_is_one_line(sweep, server):
    sweep_dir, plan = sweep
    assert "holds no run" in complaint(dlm(server, "sync", sweep_dir))
    finish(sweep_dir, plan, plan.cells[0])
    assert "no login" in complaint(dlm(server, "sync", sweep_dir, WANDB_API_KEY=""))
    assert reasons(collect(sweep_dir, write=False))


# --- a run that logs online -------------------------------------------------------------------------------------------


def train(server, workdir: Path, *overrides: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A run of twenty steps that was to log online, its patience with W&B cut to two seconds."""
    code = (
        "import sys, dlm.train.wandb_logger as l; l.PATIENCE_SEC = 2.0; from dlm.launch import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "experiment=debug", "training.steps=20", "logger.offline=false", *overrides]
    env = {**os.environ, **server.env, "PYTHONPATH": str(ROOT), "DLM_WORKDIR": str(workdir), **environ}
    del env["WANDB_SILENT"]  # that is train's to say
    return subprocess.run(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip


@pytest.mark.slow
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
    code, said, warned = dlm(server, "sync", tmp_path / "adhoc")  # a folder without a plan
    assert code == 0 and "1 of 1 runs are whole" in said, warned
    there = {(row["step"], row["time"]) for row in run.rows if "time" in row}
    assert there == {(row["step"], row["time"]) for row in on_disk(run_dir)}
    assert run.summary["result/loss"] == json.loads((run_dir / "result.json").read_text())["loss"]


@pytest.mark.slow
def test_no_server_at_the_start_is_a_file(server, tmp_path, stdlib_data):
    done = train(server, tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="3")
    assert done.returncode == 0 and "W&B does not answer" in done.stdout and "logs offline" in done.stdout, done.stderr
    assert list(tmp_path.glob("adhoc/runs/*/wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize(("environ", "words"), [({"WANDB_API_KEY": ""}, "No API key"), ({}, "entity nobody not found")])
def test_a_refusal_is_the_users_mistake(server, tmp_path, environ, words):
    code = ("from dlm.train.wandb_logger import WandbLogger\n"
            "try: WandbLogger(project='dlm', entity='nobody', id='a', offline=False).experiment\n"
            "except ValueError as error: print('refused', error)")  # fmt: skip
    env = {**os.environ, **server.env, "PYTHONPATH": str(ROOT), **environ}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.stdout.startswith("refused") and words in done.stdout and "logger.offline=true" in done.stdout
    assert not server.runs
