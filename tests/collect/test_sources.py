"""What the sources of one cell know, put together: a cut history, a lost result, a foreign run, W&B's word."""

import json
import math
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support.by_hand import LOSS, config_of, final_rows, finish, reasons, started, summary_of
from support.stub_cell import status
from support.wandb_runs import log_to_wandb

import dlm.collect.sources
from dlm.collect.sources import WANDB_STATES
from dlm.collect.tables import collect
from dlm.collect.wandb_file import WandbRun, wandb_files
from dlm.core.files import read_jsonl
from dlm.record.outcomes import State
from dlm.record.run import write_status
from dlm.record.wandb import RESULT_PREFIX


def on_disk(run_dir: Path) -> list[dict]:
    return read_jsonl(run_dir / "metrics.jsonl")


class Online:
    """What a server is to collect."""

    def __init__(self, *runs: WandbRun) -> None:
        self.runs = {str(run.run_id): run for run in runs}
        self.all = {name: run.history for name, run in self.runs.items()}
        for run in runs:
            run.history = []
        self.asked: list[str] = []

    def read_histories(self, run_ids) -> None:
        for name in run_ids:
            self.asked.append(name)
            self.runs[name].history = self.all[name]


def online(cell, rows, *, state="finished", version="v1", **facts) -> WandbRun:
    last = {key: value for row in rows for key, value in row.items()}
    summary = {**last, **facts.pop("summary", {})}
    facts = {"config": config_of(cell), "group": "s", "run_id": f"s-{cell.cell_id}", **facts}
    return WandbRun(history=list(rows), summary=summary, state=state, version=version, **facts)


def steps_of(collected, cell) -> list[int]:
    return list(collected.history[collected.history.run_id == cell.cell_id].step)


# --- the history ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_history_cut_at_the_end_of_a_line_is_filled_from_the_wandb_file(sweep, kept):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    rows = on_disk(finish(sweep_dir, plan, cell))
    log_to_wandb(sweep_dir, cell, rows)
    path = sweep_dir / "runs" / cell.cell_id / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:kept]))
    collected = collect(sweep_dir)
    history = collected.history
    assert list(history.step) == sorted({row["step"] for row in rows})
    assert (
        list(history["train/loss"]) == [row["train/loss"] for row in rows[:3]] and history["val/loss"].iloc[-1] == LOSS
    )
    lacking = 3 - kept if kept < 3 else 1  # of the last step the validation
    said = [f"metrics.jsonl lacks {lacking} of the 3 logged steps that the W&B file has" in line
            for line in collected.warnings]  # fmt: skip
    assert said == ([True] if kept else [])
    before = (sweep_dir / "history.parquet").stat().st_mtime_ns
    pd.testing.assert_frame_equal(collect(sweep_dir).history, history)
    assert (sweep_dir / "history.parquet").stat().st_mtime_ns == before
    path.write_text("".join(json.dumps({**row, "lr": 7.0}) + "\n" for row in rows))
    assert set(collect(sweep_dir).history["lr"]) == {7.0}  # whole again, it is what counts


def test_what_the_wandb_file_lacks_too_comes_from_the_server_once(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    rows = on_disk(finish(sweep_dir, plan, cell))
    log_to_wandb(sweep_dir, cell, rows[:2])
    path = sweep_dir / "runs" / cell.cell_id / "metrics.jsonl"
    path.write_text(json.dumps({**rows[0], "lr": 7.0}) + "\n")
    first = Online(online(cell, rows))
    collected = collect(sweep_dir, server=first)
    assert first.asked == [f"s-{cell.cell_id}"] and steps_of(collected, cell) == [row["step"] for row in rows[:3]]
    assert list(collected.history["lr"]) == [7.0, *(row["lr"] for row in rows[1:3])]  # the run directory's first
    again = Online(online(cell, rows))
    before = (sweep_dir / "history.parquet").stat().st_mtime_ns
    pd.testing.assert_frame_equal(collect(sweep_dir, server=again).history, collected.history)
    assert again.asked == [] and (sweep_dir / "history.parquet").stat().st_mtime_ns == before
    changed = Online(online(cell, [*rows[:2], {**rows[2], "lr": 8.0}, rows[3]], version="v2"))
    assert list(collect(sweep_dir, server=changed).history["lr"])[-1] == 8.0 and changed.asked
    assert steps_of(collect(sweep_dir), cell) == [row["step"] for row in rows[:2]]  # without it, what is on disk


def test_a_server_is_not_asked_for_what_it_says_it_does_not_have(sweep):
    sweep_dir, plan = sweep
    whole, failed, further = plan.cells[:3]
    rows = {cell.cell_id: on_disk(finish(sweep_dir, plan, cell)) for cell in (whole, failed, further)}
    for cell in (failed, further):
        run_dir = sweep_dir / "runs" / cell.cell_id
        (run_dir / "result.json").unlink()
        write_status(run_dir, status(State.FAILED, step=cell.steps // 2, steps=cell.steps, exit_code=1))
        (run_dir / "metrics.jsonl").write_text(json.dumps(rows[cell.cell_id][0]) + "\n")
    server = Online(
        online(whole, rows[whole.cell_id]),
        online(failed, rows[failed.cell_id][:1]),
        online(further, rows[further.cell_id][:2]),
    )
    collected = collect(sweep_dir, server=server)
    assert server.asked == [f"s-{further.cell_id}"] and steps_of(collected, further) == [1, further.steps // 2]
    server.asked.clear()
    collect(sweep_dir, server=server, verify=True)
    assert len(server.asked) == 3


def test_wandb_files_of_a_run_that_its_directory_tells_whole_are_not_read(sweep, monkeypatch):
    sweep_dir, plan = sweep
    done, failed, running = plan.cells[:3]
    for cell in (done, failed, running):
        log_to_wandb(sweep_dir, cell, on_disk(finish(sweep_dir, plan, cell))[:2])
    for cell, state in ((failed, State.FAILED), (running, State.RUNNING)):
        run_dir = sweep_dir / "runs" / cell.cell_id
        (run_dir / "result.json").unlink()
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in final_rows(cell)[:2]))
        write_status(run_dir, status(state, step=cell.steps // 2, steps=cell.steps))
    read = []

    def read_nothing(run_dir, run_id, **_):
        read.extend(wandb_files(run_dir))
        return WandbRun(run_id=run_id)

    monkeypatch.setattr(dlm.collect.sources, "read_wandb_run", read_nothing)
    collect(sweep_dir)
    assert read == []
    write_status(run_dir, status(State.PREEMPTED, step=running.steps, steps=running.steps))
    collect(sweep_dir)
    assert read == wandb_files(run_dir)  # it came further than its rows do


def test_verify_finds_a_single_number_that_was_lost(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    rows = on_disk(finish(sweep_dir, plan, cell))
    log_to_wandb(sweep_dir, cell, [rows[0], rows[1], {**rows[2], "val/loss": LOSS}])
    warned = collect(sweep_dir, verify=True).warnings
    (line,) = warned
    assert line.endswith(
        f"the W&B file lacks 1 of the 3 logged steps that metrics.jsonl has, first val/loss_se at step {cell.steps}"
    )


def forged(run_dir, cell, loss: float) -> None:
    """Lower the loss of a finished cell in result.json and metrics.jsonl alike, and remove its .wandb files."""
    path = run_dir / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss": loss}))
    rows = [{**row, "val/loss": loss} if "val/loss" in row else row for row in on_disk(run_dir)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(run_dir / "wandb", ignore_errors=True)


def test_verify_finds_a_forged_result_by_the_losses_of_its_validation_sequences(sweep):
    sweep_dir, plan = sweep
    honest, cell = plan.cells[:2]
    finish(sweep_dir, plan, honest)
    forged(finish(sweep_dir, plan, cell), cell, 2.0)
    collected = collect(sweep_dir, verify=True)
    (line,) = collected.warnings
    assert line == f"{cell.cell_id}: loss is 2 in result.json and 2.5 in validation.csv: result.json counts"
    assert collected.unconfirmed == ()


def test_verify_tells_which_runs_have_no_second_source(sweep):
    sweep_dir, plan = sweep
    alone, in_wandb, whole, torn, without_result = plan.cells[:5]
    folders = {cell.cell_id: finish(sweep_dir, plan, cell) for cell in plan.cells[:5]}
    log_to_wandb(sweep_dir, in_wandb, on_disk(folders[in_wandb.cell_id]))
    for cell in (alone, in_wandb):
        (folders[cell.cell_id] / "validation.csv").unlink()
    forged(folders[alone.cell_id], alone, 2.0)
    (folders[torn.cell_id] / "validation.csv").write_bytes(b"sequence,loss\n0,\xff\n")
    (folders[without_result.cell_id] / "result.json").unlink()
    for cell, logger in ((alone, "dlm.train.wandb_logger.WandbLogger"), (whole, "null")):  # null is `logger: none`
        path = folders[cell.cell_id] / "config.yaml"
        path.write_text(path.read_text() + f"logger: {{_target_: {logger}}}\n")
    collected = collect(sweep_dir, verify=True)
    assert collected.unconfirmed == (alone.cell_id, torn.cell_id)
    assert collected.warnings[-1] == (
        f"2 runs have no second source, so nothing confirms the loss: {alone.cell_id}, {torn.cell_id}"
    )
    said = {one.cell_id: [line for line in collected.warnings if line.startswith(one.cell_id)] for one in plan.cells}
    assert "its .wandb files are missing" in said[alone.cell_id][0]
    assert "validation.csv is missing" in said[alone.cell_id][1]
    assert "validation.csv is missing" in said[in_wandb.cell_id][0]
    assert "cannot be read" in said[torn.cell_id][0] and said[whole.cell_id] == []
    assert collect(sweep_dir).unconfirmed == ()


def test_the_source_of_a_row_does_not_confirm_it(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    log_to_wandb(sweep_dir, cell, final_rows(cell)[:2], summary=summary_of(cell, plan), config=config_of(cell))
    collected = collect(sweep_dir, verify=True)
    assert list(collected.runs.source) == ["wandb"] and collected.unconfirmed == (cell.cell_id,)


def test_verify_does_not_trust_what_an_earlier_collection_has_kept(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    path = finish(sweep_dir, plan, cell) / "metrics.jsonl"
    collect(sweep_dir)
    before, text = path.stat(), path.read_text()
    path.write_text(text.replace('"val/loss": 2.5', '"val/loss": 1.5'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert any(
        "is 2.5 in result.json and 1.5 in metrics.jsonl" in line for line in collect(sweep_dir, verify=True).warnings
    )


# --- the result and the config ----------------------------------------------------------------------------------------


def test_verify_compares_the_result_and_the_plan_with_what_wandb_was_told(sweep):
    sweep_dir, plan = sweep
    cell, agrees = plan.cells[:2]
    for one, changes in ((cell, {"loss_se": 0.02, "device": "another", "attempts": 2}), (agrees, {"attempts": 2})):
        rows = on_disk(finish(sweep_dir, plan, one))
        told = config_of(one)
        told["record"] |= {"tokens": one.tokens + 1, "convention": "6n"} if changes.get("device") else {}
        kept = json.loads((sweep_dir / "runs" / one.cell_id / "result.json").read_text())
        facts = {RESULT_PREFIX + key: changes.get(key, value) for key, value in kept.items()}
        log_to_wandb(sweep_dir, one, rows, config=told, summary=facts)
    said = [line.removeprefix(f"{cell.cell_id}: ") for line in collect(sweep_dir, verify=True).warnings]
    assert said == [
        f"tokens is {cell.tokens} in the plan and {cell.tokens + 1} in the W&B file: the plan counts",
        "convention is 'full_masked_head' in the plan and '6n' in the W&B file: the plan counts",
        "loss_se, of the result, is 0.01 in result.json and 0.02 in the W&B file: result.json counts",
        "device, of the result, is 'cpu' in result.json and 'another' in the W&B file: result.json counts",
    ]
    assert collect(sweep_dir).warnings == []


def test_a_result_that_its_own_metrics_do_not_bear_out_is_named(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    finish(sweep_dir, plan, cell, loss_se=0.02)
    (line,) = collect(sweep_dir).warnings
    assert f"val/loss_se at step {cell.steps} is 0.02 in result.json and 0.01 in metrics.jsonl" in line


@pytest.mark.parametrize("where", ["run_dir", "wandb"])
def test_without_a_result_the_loss_of_another_config_is_not_taken(sweep, where):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    other = config_of(cell, **{"optimizer.lr": 1e-2})
    if where == "run_dir":
        run_dir = started(sweep_dir, plan, cell, final_rows(cell))
        (run_dir / "config.yaml").write_text(yaml.safe_dump({**other, "cell_id": cell.cell_id}))
    else:
        log_to_wandb(sweep_dir, cell, final_rows(cell), config=other)
    collected = collect(sweep_dir)
    assert collected.runs.empty and reasons(collected)[cell.cell_id].startswith("another config: its config")
    if where == "wandb":
        log_to_wandb(sweep_dir, cell, final_rows(cell), config=config_of(cell))  # a second attempt has the last word
        assert list(collect(sweep_dir).runs.source) == ["wandb"]


def test_a_logged_result_counts_at_the_planned_last_step_only(sweep):
    sweep_dir, plan = sweep
    early, fine, alien = plan.cells[:3]
    log_to_wandb(sweep_dir, early, final_rows(early)[:2], summary=summary_of(early, plan, step=early.steps - 1))
    log_to_wandb(sweep_dir, fine, final_rows(fine)[:2], summary=summary_of(fine, plan), config=config_of(fine))
    log_to_wandb(sweep_dir, alien, final_rows(alien)[:2], summary=summary_of(early, plan, step=alien.steps))
    collected = collect(sweep_dir)
    assert list(collected.runs.run_id) == [fine.cell_id] and list(collected.runs.source) == ["wandb"]
    said = reasons(collected)
    assert (
        said[early.cell_id].startswith("short: its result is of") and f"step {early.steps - 1}" in said[early.cell_id]
    )
    assert f"its result is of {early.cell_id}" in said[alien.cell_id]


# --- the state ------------------------------------------------------------------------------------------------------


def test_the_state_of_a_run_that_only_wandb_knows(sweep):
    sweep_dir, plan = sweep
    diverged, finished, killed = plan.cells[:3]
    log_to_wandb(sweep_dir, diverged, final_rows(diverged)[:2], exit=3)
    log_to_wandb(sweep_dir, finished, final_rows(finished)[:2])
    log_to_wandb(sweep_dir, killed, final_rows(killed)[:2])
    (path,) = wandb_files(sweep_dir / "runs" / killed.cell_id)
    path.write_bytes(path.read_bytes()[: path.read_bytes().rindex(b"train/loss")])
    rows = collect(sweep_dir).excluded.set_index("run_id")
    assert [rows.status[cell.cell_id] for cell in (diverged, finished, killed)] == ["diverged", "lost", "lost"]
    assert "its .wandb file does not record its end" in rows.reason[killed.cell_id]
    words = [*WANDB_STATES, "crashed"]
    states = {"running": "running", "pending": "submitted", "preempting": "running", "preempted": "preempted",
              "failed": "failed", "crashed": "lost"}  # fmt: skip
    assert set(words) == set(states)
    for cell, word in zip(plan.cells, words, strict=True):
        shutil.rmtree(sweep_dir / "runs", ignore_errors=True)
        said = collect(sweep_dir, write=False, server=Online(online(cell, final_rows(cell)[:2], state=word)))
        row = said.excluded.set_index("run_id").loc[cell.cell_id]
        assert row.status == states[word] and f"W&B says {word}" in row.reason


def test_a_result_that_is_whole_counts_even_where_wandb_says_that_the_run_goes_on(sweep):
    sweep_dir, plan = sweep
    cell, other = plan.cells[:2]
    server = Online(
        online(cell, final_rows(cell), state="running", summary=summary_of(cell, plan)),
        online(other, final_rows(other)[:2], state="running", summary=summary_of(other, plan, step=3)),
    )
    collected = collect(sweep_dir, server=server)
    assert list(collected.runs.run_id) == [cell.cell_id] and list(collected.runs.source) == ["wandb_api"]
    assert reasons(collected)[other.cell_id].startswith(f"running, step {other.steps // 2} of {other.steps} (W&B says")


# --- what is a cell ---------------------------------------------------------------------------------------------------


def test_wandb_files_alone_are_found_in_a_folder_of_another_name(sweep):
    sweep_dir, plan = sweep
    cell, lost = plan.cells[:2]
    for one in (cell, lost):
        log_to_wandb(sweep_dir, one, final_rows(one), config=config_of(one), summary=summary_of(one, plan))
    (sweep_dir / "plan.json").unlink()
    (path,) = wandb_files(sweep_dir / "runs" / lost.cell_id)
    path.write_bytes(path.read_bytes()[:7])
    moved = sweep_dir.rename(sweep_dir.with_name("elsewhere"))
    collected = collect(moved)
    assert collected.runs[["run_id", "sweep", "source", "loss"]].values.tolist() == [[cell.cell_id, "s", "wandb", LOSS]]
    assert "has no config.yaml" in reasons(collected)[lost.cell_id]


def test_a_planned_sweep_in_a_folder_of_another_name_still_has_its_wandb_files(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    log_to_wandb(sweep_dir, cell, final_rows(cell), config=config_of(cell), summary=summary_of(cell, plan))
    assert list(collect(sweep_dir.rename(sweep_dir.with_name("elsewhere"))).runs.sweep) == ["s"]


def test_an_empty_wandb_file_does_not_put_the_attempts_in_the_order_of_the_clock(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    rows = final_rows(cell)
    for attempt, some in ((1, [{**row, "train/loss": 9.0} for row in rows[:2]]), (2, rows)):
        log_to_wandb(sweep_dir, cell, some, config={"record": {"attempt": attempt}})
    folder = sweep_dir / "runs" / cell.cell_id / "wandb"
    first, second = sorted(folder.glob("offline-run-*"))
    second.rename(second.with_name(second.name.replace("offline-run-2", "offline-run-1")))  # its clock was behind
    empty = shutil.copytree(first, first.with_name(first.name.replace("offline-run-2", "offline-run-3")))
    (path,) = empty.glob("*.wandb")
    path.write_bytes(path.read_bytes()[:7])
    collected = collect(sweep_dir)
    assert list(collected.history["train/loss"]) == [row["train/loss"] for row in rows[:3]]
    assert any("holds nothing" in line for line in collected.warnings)


@pytest.mark.parametrize("of", ["abc", 7, None, ["a"], ""])
def test_runs_on_a_server_whose_config_is_of_another_shape_are_named(tmp_path, sweep, of):
    _, plan = sweep
    cell = plan.cells[0]
    fine = online(cell, final_rows(cell), summary=summary_of(cell, plan))
    odd = WandbRun(run_id="odd", config={"cell_id": of}, state="finished", version="1")
    copy = online(cell, final_rows(cell), run_id="t-copy", group="t")
    collected = collect(tmp_path / "out", server=Online(fine, odd, copy))
    assert list(collected.runs.run_id) == [cell.cell_id]
    said = reasons(collected)
    assert said["t-copy"] == f"duplicate: it is a run of {cell.cell_id}, whose run here is s-{cell.cell_id}"
    assert len(said) == 2 and said["abc" if of == "abc" else "odd"].startswith("another config")


@pytest.mark.parametrize(
    ("node", "value"), [("optimizer", {}), ("scheduler", None), ("seed", "x"), ("data", {"name": 7})]
)
def test_a_config_on_a_server_that_lacks_what_a_row_needs_keeps_no_other_from_its_row(tmp_path, sweep, node, value):
    _, plan = sweep
    cell, odd = plan.cells[:2]
    fine = online(cell, final_rows(cell), summary=summary_of(cell, plan))
    torn = online(odd, final_rows(odd), config={**config_of(odd), node: value}, summary={"result/step": math.inf})
    collected = collect(tmp_path / "out", server=Online(fine, torn))
    assert list(collected.runs.run_id) == [cell.cell_id]
    assert reasons(collected)[odd.cell_id].startswith("another config: its config cannot be read")
    whole = online(odd, final_rows(odd)[:2], summary={**summary_of(odd, plan), "result/step": math.inf})
    assert reasons(collect(tmp_path / "out", server=Online(fine, whole)))[odd.cell_id].startswith("lost, step")


def test_an_attempt_of_another_config_does_not_lend_its_loss(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    log_to_wandb(sweep_dir, cell, final_rows(cell), config=config_of(cell, **{"optimizer.lr": 1e-2}))
    log_to_wandb(sweep_dir, cell, final_rows(cell)[:1], config=config_of(cell))
    collected = collect(sweep_dir)
    assert collected.runs.empty and list(collected.history.step) == [1]
    assert any("is of another config: left out" in line for line in collected.warnings)


def test_of_several_runs_of_one_cell_on_a_server_the_one_with_a_result_counts(tmp_path, sweep):
    _, plan = sweep
    cell = plan.cells[0]
    crashed = online(cell, final_rows(cell)[:1], state="crashed", run_id="a-x", version="a-x@2027@1")
    fine = online(cell, final_rows(cell), summary=summary_of(cell, plan), version="s-x@2026@1")
    collected = collect(tmp_path / "out", server=Online(crashed, fine))
    assert list(collected.runs.run_id) == [cell.cell_id]
    assert reasons(collected)["a-x"] == f"duplicate: it is a run of {cell.cell_id}, whose run here is s-{cell.cell_id}"


def test_an_empty_file_does_not_hide_that_the_server_sees_it_run(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    log_to_wandb(sweep_dir, cell, final_rows(cell)[:1])
    (path,) = wandb_files(sweep_dir / "runs" / cell.cell_id)
    path.write_bytes(path.read_bytes()[:7])
    said = reasons(collect(sweep_dir, server=Online(online(cell, final_rows(cell)[:2], state="running"))))
    assert said[cell.cell_id].startswith("running") and "wait, then collect again" in said[cell.cell_id]


def test_a_config_that_is_no_text_keeps_no_other_from_its_row(sweep):
    sweep_dir, plan = sweep
    cell, odd = plan.cells[:2]
    finish(sweep_dir, plan, cell)
    (finish(sweep_dir, plan, odd) / "config.yaml").write_bytes(b"\xff\xfe\x00")
    (sweep_dir / "plan.json").unlink()
    collected = collect(sweep_dir)
    assert list(collected.runs.run_id) == [cell.cell_id] and "not UTF-8 text" in reasons(collected)[odd.cell_id]


def test_a_history_that_no_source_has_in_full_is_named(sweep):
    sweep_dir, plan = sweep
    cell, none = plan.cells[:2]
    path = finish(sweep_dir, plan, cell) / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    (finish(sweep_dir, plan, none) / "metrics.jsonl").unlink()
    said = collect(sweep_dir).warnings
    ends = f"of {cell.steps} steps: no source that was read has the rest"
    assert f"{cell.cell_id}: its history ends at step {cell.steps // 2}, {ends}" in said
    assert any(line.startswith(f"{none.cell_id}: its history is nowhere") for line in said)
