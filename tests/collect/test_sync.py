"""`dlm sync`: what arrives on the server, what does not, and what is said of it."""

import json
import shutil
from pathlib import Path

import pandas as pd
import yaml
from support.by_hand import LOSS, final_rows, finish, reasons, started
from support.stub_cell import status as status_of
from support.wandb_cli import dlm, dlm_process
from support.wandb_runs import log_to_wandb
from support.wandb_server import ENTITY

from dlm.collect.tables import collect
from dlm.collect.wandb_file import wandb_files
from dlm.core.files import read_jsonl
from dlm.core.lease import Lease
from dlm.record.outcomes import State
from dlm.record.run import write_status

PROJECT = f"{ENTITY}/dlm"


def on_disk(run_dir: Path) -> list[dict]:
    return read_jsonl(run_dir / "metrics.jsonl")


def test_sync_uploads_every_row_once_and_says_what_did_not_arrive(sweep, server):
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
    for cell in (whole, torn):
        log_to_wandb(sweep_dir, cell, rows_of[cell.cell_id])
    log_to_wandb(sweep_dir, resumed, first, exit=75)
    log_to_wandb(sweep_dir, resumed, rows_of[resumed.cell_id])
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
    log_to_wandb(sweep_dir, cell, on_disk(finish(sweep_dir, plan, cell)))
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
    log_to_wandb(sweep_dir, cell, on_disk(finish(sweep_dir, plan, cell)))
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
        assert "is being synced by process" in dlm(server, "sync", copy).complaint
    (copy / "runs" / cell.cell_id / "config.yaml").write_text("{}")
    assert "is not the config of a run" in dlm(server, "sync", copy).complaint


def test_sync_names_the_runs_that_have_nothing_to_upload_and_uploads_the_others(sweep, server):
    sweep_dir, plan = sweep
    silent, empty, unnamed, alone, torn = plan.cells[:5]
    started(sweep_dir, plan, silent, [])
    rows_of = {cell.cell_id: on_disk(finish(sweep_dir, plan, cell)) for cell in (empty, alone, torn)}
    config = yaml.safe_load((sweep_dir / "runs" / alone.cell_id / "config.yaml").read_text())
    for cell in (empty, unnamed, alone, torn):
        name = cell.cell_id
        told = {**config, "cell_id": name, "record": {"git_sha": "abc"}} if cell is alone else {}
        log_to_wandb(sweep_dir, cell, rows_of.get(name, [{"step": 1}]), config=told)
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
        f"s-{empty.cell_id}: what can be read of it has arrived, but a part of it is lost: run-s-{empty.cell_id}.wandb"
        in warned
    )
    assert f"not looked at: {unnamed.cell_id}" in said and "has no config.yaml" in said
    assert (
        f"s-{torn.cell_id}: what can be read of it has arrived, but a part of it is lost: run-s-{torn.cell_id}.wandb"
        in warned
    )
    assert code == 75 and "1 of 4 runs are whole on W&B, 7 rows new" in said, (said, warned)
    assert {name for *_, name in server.runs} == {f"s-{alone.cell_id}", f"s-{torn.cell_id}"}
    assert server.run(f"s-{alone.cell_id}").config["record"]["value"] == {"git_sha": "abc"}
    shutil.rmtree(sweep_dir / "runs" / unnamed.cell_id)
    assert dlm(server, "sync", sweep_dir)[0] == 75
    shutil.rmtree(sweep_dir / "runs" / empty.cell_id)
    shutil.rmtree(sweep_dir / "runs" / torn.cell_id)
    assert dlm(server, "sync", sweep_dir)[0] == 0


def test_uploading_the_rows_of_a_failed_run_leaves_it_failed_on_the_server(sweep, server):
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


def test_sync_continues_after_a_run_that_fails_and_keeps_runs_apart(sweep, server):
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
    code, said, warned = dlm_process(server, "sync", sweep_dir, patches=break_one)
    assert code == 75 and "1 of 4 runs are whole" in said, (said, warned)
    assert (
        f"s-{lost.cell_id}: what can be read of it has arrived, but a part of it is lost: its rows end at step 0"
        in warned
    )
    assert f"s-{first.cell_id}: 4 of 4 rows did not arrive; gone" in warned
    assert f"s-{odd.cell_id}: 4 of 4 rows did not arrive; its config.yaml or env.json cannot be read" in warned
    there = {name: [row["step"] for row in run.rows if "time" in row] for (*_, name), run in server.runs.items()}
    assert there == {f"s-{first.cell_id}": [], f"s-{lost.cell_id}": [],
                     f"t-{second.cell_id}": [row["step"] for row in final_rows(second)]}  # fmt: skip
    assert server.run(f"s-{lost.cell_id}").summary["result/loss"] == LOSS
    code, said, warned = dlm(server, "sync", sweep_dir)
    assert code == 75 and "2 of 4 runs are whole on W&B, 4 rows new" in said, (said, warned)


def test_sync_mixes_up_no_runs_and_calls_no_run_whole_that_lost_something(sweep, server):
    sweep_dir, plan = sweep
    swapped, other, cut, kept = plan.cells[:4]
    for cell in (swapped, other, cut, kept):
        log_to_wandb(sweep_dir, cell, on_disk(finish(sweep_dir, plan, cell)))
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


def test_sync_to_a_server_that_does_not_answer_ends_with_try_again_later(sweep, server):
    sweep_dir, plan = sweep
    finish(sweep_dir, plan, plan.cells[0])
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    code, _, warned = dlm_process(server, "sync", sweep_dir, patches="api.TIMEOUT_SEC = 2", **away)
    assert code == 75 and "does not answer" in warned and "Traceback" not in warned


def test_sync_to_an_entity_that_refuses_is_the_users_mistake(sweep, server):
    sweep_dir, plan = sweep
    finish(sweep_dir, plan, plan.cells[0])
    said = dlm(server, "sync", sweep_dir, "--wandb", "nobody/dlm").complaint
    assert "refuses nobody/dlm: " in said and "entity nobody not found" in said
    assert "UpsertBucket" not in server.asked and not server.runs
    server.add("other", state="finished")  # the project can be read, and not written
    server.fail("UpsertBucket", times=10**6, refuse="permission denied")
    assert f"refuses runs in {PROJECT}: " in dlm(server, "sync", sweep_dir).complaint


def test_sync_of_an_empty_folder_or_without_a_login_is_refused_in_one_line(sweep, server):
    sweep_dir, plan = sweep
    assert "holds no run" in dlm(server, "sync", sweep_dir).complaint
    finish(sweep_dir, plan, plan.cells[0])
    assert "no login" in dlm_process(server, "sync", sweep_dir, WANDB_API_KEY="").complaint
    assert reasons(collect(sweep_dir, write=False))
