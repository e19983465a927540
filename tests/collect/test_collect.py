"""A small planned sweep whose run directories are written by hand, with real W&B files: each cell's fate."""

import dataclasses
import json
import math
import shutil
import time

import pandas as pd
import pytest
import yaml
from support.by_hand import LOSS, final_rows, finish, planned, reasons, started
from support.stub_cell import result, status
from support.wandb_runs import log_to_wandb

from dlm.collect.agreement import differing_histories, disagree
from dlm.collect.history import from_metrics, from_rows
from dlm.collect.tables import collect
from dlm.collect.wandb_file import wandb_files
from dlm.core.errors import UserError
from dlm.core.files import append_jsonl
from dlm.core.lease import Lease
from dlm.fit.table import fit_runs
from dlm.plan.grid import cell_config, make_plan
from dlm.record.causes import ADVICE
from dlm.record.columns import EXCLUDED_COLUMNS, RUN_COLUMNS
from dlm.record.outcomes import OUTCOMES, State
from dlm.record.run import metrics_row, write_status


def test_a_finished_cell_becomes_a_row_of_what_was_planned_and_measured(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    finish(sweep_dir, plan, cell, steps_redone=7, tokens_per_sec=123.0)
    collected = collect(sweep_dir)
    assert collected.warnings == []
    assert tuple(collected.runs.columns) == RUN_COLUMNS and tuple(collected.excluded.columns) == EXCLUDED_COLUMNS
    row = collected.runs.iloc[0].to_dict()
    expected = {
        "run_id": cell.cell_id,
        "sweep": "s",
        "objective": "masked_diffusion",
        "model": "4k",
        "params": cell.num_params,
        "params_total": cell.num_params_total,
        "tokens": cell.tokens,
        "flops": cell.flops["full_masked_head"],
        "convention": "full_masked_head",
        "flops_6n": 6.0 * cell.num_params * cell.tokens,
        "budget": 1e10,
        "loss": LOSS,
        "loss_se": 0.01,
        "steps": cell.steps,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "dropout": 0.0,
        "schedule": "cosine",
        "seed": 0,
        "data": "stdlib",
        "data_hash": plan.data_hash,
        "tokens_per_sec": 123.0,
        "attempts": 2,
        "steps_redone": 7,
        "git_sha": "abc123",  # of the attempt that finished
        "source": "run_dir",
        "status": "done",
    }
    assert {key: row[key] for key in expected} == expected
    assert row["parent"] is None or pd.isna(row["parent"])
    assert len(collected.excluded) == 5 and set(reasons(collected).values()) == {"planned: submit it"}


def test_a_branch_names_its_trunk_so_that_the_fit_knows_of_their_common_noise(tmp_path, monkeypatch):
    shared = {"scheduler.warmup_tokens_per_param": 0.2, "optimizer.lr": 5e-3}
    sweep_dir, plan = planned(
        tmp_path, monkeypatch, branches=True, groups={"scheduler": "wsd"}, set=shared, budgets=(2e10, 4e10, 8e10)
    )
    for cell in plan.cells:
        finish(sweep_dir, plan, cell, loss=1.5 + 8 / cell.num_params**0.3 + 8 / cell.tokens**0.3)
    runs = collect(sweep_dir).runs
    trunks = [cell.cell_id for cell in plan.cells if cell.budget_flops == 8e10]
    assert list(runs.parent.dropna()) == [*trunks, *trunks] and list(runs.run_id[runs.parent.isna()]) == trunks
    fitted = fit_runs(sweep_dir / "runs.csv", bootstrap=100)
    assert fitted.interval_method == "nested" and any("9 points of 3 runs" in line for line in fitted.warnings)
    apart = fit_runs(runs.drop(columns="parent"), bootstrap=100)
    assert apart.interval_method == "residuals"


def test_the_files_hold_what_was_returned_and_a_second_time_changes_nothing(sweep):
    sweep_dir, plan = sweep
    for cell in plan.cells[:2]:
        finish(sweep_dir, plan, cell)
    collected = collect(sweep_dir)
    runs = pd.read_csv(sweep_dir / "runs.csv")
    # An empty cell reads as NaN, None was written.
    same = [name for name in RUN_COLUMNS if name not in ("parent", "role")]
    pd.testing.assert_frame_equal(runs[same], collected.runs[same], check_dtype=False)
    assert runs.parent.isna().all() and runs.role.isna().all()
    assert (runs.loss == LOSS).all() and runs.params.dtype == "int64"
    assert list(pd.read_csv(sweep_dir / "excluded.csv").reason) == list(collected.excluded.reason)
    history = pd.read_parquet(sweep_dir / "history.parquet")
    assert list(history.run_id.unique()) == [cell.cell_id for cell in plan.cells[:2]]
    first = history[history.run_id == plan.cells[0].cell_id]
    assert list(first.step) == [1, plan.cells[0].steps // 2, plan.cells[0].steps]
    assert first["val/loss"].iloc[-1] == LOSS and first["train/loss"].iloc[-1] == 3 + 1 / plan.cells[0].steps
    assert math.isnan(first["val/loss"].iloc[0])  # missing stays missing
    before = {path.name: path.read_bytes() for path in sweep_dir.glob("*.csv")}
    collect(sweep_dir)
    assert {path.name: path.read_bytes() for path in sweep_dir.glob("*.csv")} == before


def test_nothing_is_written_when_asked_not_to(sweep):
    sweep_dir, plan = sweep
    finish(sweep_dir, plan, plan.cells[0])
    collect(sweep_dir, write=False)
    assert not list(sweep_dir.glob("*.csv"))


def test_every_other_state_is_excluded_with_its_reason_and_what_to_do(sweep):
    sweep_dir, plan = sweep
    diverged, lost, early, running, foreign, unlearned = plan.cells
    folders = [started(sweep_dir, plan, cell, final_rows(cell)[:1]) for cell in (diverged, lost, running)]
    write_status(folders[0], status(State.DIVERGED, step=4, exit_code=3, reason="loss is nan at step 4"))
    write_status(folders[1], status(State.RUNNING, step=9))
    finish(sweep_dir, plan, early, step=early.steps - 1)
    folder = finish(sweep_dir, plan, foreign)
    other = cell_config(foreign.groups, {**foreign.overrides, "optimizer.lr": 1e-2})
    (folder / "config.yaml").write_text(yaml.safe_dump(other))
    finish(sweep_dir, plan, unlearned, loss=3.4, unigram_entropy=3.3)
    with Lease(folders[2]):
        collected = collect(sweep_dir)
    said = reasons(collected)
    assert collected.runs.empty and len(said) == 6
    assert said[diverged.cell_id] == (
        f"diverged, step 4 of {diverged.steps} (loss is nan at step 4): {OUTCOMES[State.DIVERGED].advice}"
    )
    assert said[lost.cell_id].startswith(f"lost, step 9 of {lost.steps}") and "submit again" in said[lost.cell_id]
    assert f"at step {early.steps - 1}" in said[early.cell_id] and str(early.steps) in said[early.cell_id]
    assert (
        said[running.cell_id].startswith(f"running, step 1 of {running.steps} (process")
        and "wait" in said[running.cell_id]
    )
    assert "another run" in said[foreign.cell_id]
    assert said[unlearned.cell_id].startswith("did not learn: its loss 3.4000") and "3.3000" in said[unlearned.cell_id]
    rows = collected.excluded.set_index("run_id")
    causes = [rows.cause[cell.cell_id] for cell in plan.cells]
    assert causes == ["diverged", "lost", "short", "running", "another config", "did not learn"]
    assert set(causes) <= ADVICE.keys()
    assert rows.loss[unlearned.cell_id] == 3.4 and math.isnan(rows.loss[early.cell_id])
    assert math.isnan(rows.loss[diverged.cell_id]) and rows.params[diverged.cell_id] == diverged.num_params
    assert rows.status[lost.cell_id] == "lost" and rows.git_sha[lost.cell_id] == "abc123"


def test_a_result_past_the_planned_last_step_is_left_out(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    finish(sweep_dir, plan, cell, step=cell.steps + 1)
    reason = reasons(collect(sweep_dir))[cell.cell_id]
    assert reason.startswith(f"long: its result is of {cell.cell_id} at step {cell.steps + 1}, planned was")


def test_torn_files_cost_what_they_held_and_nothing_else(sweep):
    sweep_dir, plan = sweep
    a, b, c = plan.cells[:3]
    folder = finish(sweep_dir, plan, a)
    (folder / "env.json").write_text('{"attempts": [')
    (folder / "config.yaml").write_text("model: {name: [")
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write('{"train/loss": 1.0}\n{"step": 5, "trai')
    folder = finish(sweep_dir, plan, b)
    (folder / "result.json").write_text('{"cell_id": "b"')
    folder = started(sweep_dir, plan, c, [])
    (folder / "status.json").write_text("{")
    collected = collect(sweep_dir)
    warned = "\n".join(collected.warnings)
    assert "env.json cannot be read" in warned and "config.yaml cannot be read" in warned and "1 logged rows" in warned
    assert list(collected.runs.run_id) == [a.cell_id, b.cell_id]  # b by its metrics.jsonl
    assert (
        f"{b.cell_id}: result.json is absent or not whole; the loss 2.5 at step {b.steps} was read from metrics.jsonl"
        in warned
    )
    assert pd.isna(collected.runs.git_sha[0]) and collected.runs.loss[1] == LOSS
    assert c.cell_id in reasons(collected)


def test_a_second_directory_of_a_cell_and_one_of_another_plan_are_left_out(sweep):
    sweep_dir, plan = sweep
    folder = finish(sweep_dir, plan, plan.cells[0])
    shutil.copytree(folder, folder.with_name("copy"))
    other = shutil.copytree(folder, folder.with_name("other"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    del config["cell_id"]
    (other / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 99}))
    collected = collect(sweep_dir)
    said = reasons(collected)
    assert list(collected.runs.run_id) == [plan.cells[0].cell_id]
    assert said["copy"] == f"duplicate: a second run directory of {folder.name}; runs/{folder.name} counts"
    assert said["other"].startswith("another config: mdm-4k-1e10-") and "is no cell of the plan" in said["other"]
    assert set(collected.history.run_id) == {folder.name}
    (sweep_dir / "plan.json").unlink()  # without a plan the copy is of another cell than its name says
    assert reasons(collect(sweep_dir))["copy"].startswith(f"another config: its result is of {folder.name}: give its")


def test_a_run_directory_by_another_name_is_to_be_given_its_own(sweep):
    sweep_dir, plan = sweep
    folder = finish(sweep_dir, plan, plan.cells[0])
    folder.rename(folder.with_name("old"))
    said = reasons(collect(sweep_dir))
    assert (
        said["old"] == f"another config: it is a run of {folder.name}, which has no folder: give this folder that name"
    )
    folder.with_name("old").rename(folder)
    shutil.rmtree(folder)
    shutil.copytree(finish(sweep_dir, plan, plan.cells[1]), folder)
    for name in ("nothing", "result.json"):  # with the result of the other, and without
        (folder / name).unlink(missing_ok=True)
        collected = collect(sweep_dir)
        assert reasons(collected)[folder.name].startswith("another config")
        assert set(collected.history.run_id) == {plan.cells[1].cell_id}  # what lies there is no history of this cell


def test_a_history_cut_anywhere_loses_its_torn_line_only(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    path = finish(sweep_dir, plan, cell) / "metrics.jsonl"
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 1, 3, 0):
        path.write_bytes(whole[:size])
        collected = collect(sweep_dir)
        lines = whole[:size].split(b"\n")
        kept = [json.loads(line) for line in lines if line.endswith(b"}")]
        torn = [line for line in lines if line and not line.endswith(b"}")]
        history = collected.history[collected.history.run_id == cell.cell_id]
        assert list(history.step) == sorted({row["step"] for row in kept})
        assert sum("torn in metrics.jsonl" in line for line in collected.warnings) == len(torn)
        assert list(collected.runs.loss) == [LOSS]  # of its result
        assert set(history["train/loss"].dropna()) == {row["train/loss"] for row in kept if "train/loss" in row}


def test_a_clock_that_jumps_back_does_not_make_the_first_attempt_the_last(sweep):
    sweep_dir, plan = sweep
    cell = plan.cells[0]
    rows = [{**row, "attempt": 2} for row in final_rows(cell)]
    first = [{**row, "train/loss": 9.0, "attempt": 1} for row in rows[:2]]
    for attempt, some in ((1, first), (2, rows)):
        config = {"record": {"attempt": attempt, "git_sha": f"sha{attempt}"}}
        log_to_wandb(sweep_dir, cell, some, config=config)
    folders = sorted((sweep_dir / "runs" / cell.cell_id / "wandb").glob("offline-run-*"))
    folders[1].rename(folders[1].with_name(folders[1].name.replace("offline-run-2", "offline-run-1")))
    collected = collect(sweep_dir)
    assert list(collected.history["train/loss"]) == [row["train/loss"] for row in rows[:3]]
    row = collected.runs.iloc[0]
    assert (row.source, row.git_sha, row.loss) == ("wandb", "sha2", LOSS)


def test_what_has_not_changed_is_not_read_again(sweep, monkeypatch):
    sweep_dir, plan = sweep
    folders = [finish(sweep_dir, plan, cell) for cell in plan.cells[:3]]
    first = collect(sweep_dir)
    read = []
    monkeypatch.setattr(
        "dlm.collect.sources.from_metrics", lambda path, *rest: read.append(path) or from_metrics(path, *rest)
    )
    before = (sweep_dir / "history.parquet").stat().st_mtime_ns
    again = collect(sweep_dir)
    assert read == [] and (sweep_dir / "history.parquet").stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(first.history, again.history)
    append_jsonl(
        folders[1] / "metrics.jsonl", metrics_row(step=plan.cells[1].steps + 1, tokens=1, **{"train/loss": 1.0})
    )
    third = collect(sweep_dir)
    assert read == [folders[1] / "metrics.jsonl"] and len(third.history) == len(first.history) + 1
    assert list(third.history.run_id.unique()) == [folder.name for folder in folders]
    (folders[2] / "config.yaml").write_text("seed: 1\n")  # what was found out of a config counts for that config only
    assert any("config.yaml cannot be read" in line for line in collect(sweep_dir).warnings)


def test_without_a_plan_every_run_directory_is_a_cell(sweep):
    sweep_dir, plan = sweep
    finish(sweep_dir, plan, plan.cells[0])
    (sweep_dir / "plan.json").unlink()
    collected = collect(sweep_dir)
    assert list(collected.runs.run_id) == [plan.cells[0].cell_id] and collected.excluded.empty
    with pytest.raises(UserError, match=r"neither a plan\.json nor a run"):
        collect(sweep_dir / "runs")


# --- against real W&B files -----------------------------------------------------------------------------------------


def test_wandb_is_checked_against_the_run_directory_and_stands_in_for_a_lost_one(sweep):
    sweep_dir, plan = sweep
    agrees, loss_differs, history_differs, gone, unfinished, lacking = plan.cells
    for cell in (agrees, loss_differs, history_differs, lacking):
        finish(sweep_dir, plan, cell)
    rows = final_rows(history_differs)
    rows[1] = {**rows[1], "train/loss": 99.0}
    # W&B has its own step; what counts is the logged one.
    log_to_wandb(sweep_dir, agrees, final_rows(agrees))
    log_to_wandb(sweep_dir, loss_differs, final_rows(loss_differs, loss=2.25))
    log_to_wandb(sweep_dir, history_differs, rows)
    log_to_wandb(sweep_dir, gone, final_rows(gone, loss=2.125))
    log_to_wandb(sweep_dir, unfinished, final_rows(unfinished)[:2])
    log_to_wandb(sweep_dir, lacking, final_rows(lacking)[2:])
    collected = collect(sweep_dir, verify=True)
    said = {cell.cell_id: [w for w in collected.warnings if w.startswith(cell.cell_id)] for cell in plan.cells}
    assert said[agrees.cell_id] == []
    (loss_line, history_line) = said[loss_differs.cell_id]
    assert "is 2.5 in result.json and 2.25 in the W&B file" in loss_line and "1 of 3 logged steps" in history_line
    (line,) = said[history_differs.cell_id]
    assert "1 of 3 logged steps differ" in line and f"train/loss at step {rows[1]['step']}" in line and "99" in line
    assert "the W&B file lacks 2 of the 3 logged steps that metrics.jsonl has" in said[lacking.cell_id][0]
    runs = collected.runs.set_index("run_id")
    assert runs.loss[loss_differs.cell_id] == LOSS  # the run directory's counts
    assert (runs.loss[gone.cell_id], runs.source[gone.cell_id], runs.status[gone.cell_id]) == (2.125, "wandb", "done")
    assert runs.loss_se[gone.cell_id] == 0.01 and runs.source[agrees.cell_id] == "run_dir"
    assert "read from the W&B file" in said[gone.cell_id][0]
    assert unfinished.cell_id in reasons(collected)
    gone_history = collected.history[collected.history.run_id == gone.cell_id]
    assert list(gone_history.step) == [1, gone.steps // 2, gone.steps]

    # A W&B loss that is no better than the unigrams is no result either.
    (path,) = wandb_files(sweep_dir / "runs" / gone.cell_id)
    path.unlink()
    log_to_wandb(sweep_dir, gone, final_rows(gone, loss=5.0))
    assert "did not learn" in reasons(collect(sweep_dir))[gone.cell_id]
    # A torn W&B file is a warning, and its run still counts.
    (path,) = wandb_files(sweep_dir / "runs" / agrees.cell_id)
    path.write_bytes(path.read_bytes()[:-20])
    collected = collect(sweep_dir, verify=True)
    assert agrees.cell_id in set(collected.runs.run_id)
    assert any(w.startswith(agrees.cell_id) and "cut off" in w for w in collected.warnings)


# --- the comparison itself ------------------------------------------------------------------------------------------


def test_numbers_differ_beyond_rounding_only():
    assert not disagree(0.1 + 0.2, 0.3) and disagree(2.5, 2.5000001)
    assert not disagree(math.nan, math.nan) and disagree(math.nan, 1.0)


def test_a_validation_at_another_step_is_not_the_final_one():
    rows = [{"step": 5, "val/loss": 3.0}, {"step": 10, "train/loss": 1.0}, {"step": 10, "val/loss": 2.0}]
    assert from_rows(rows, "a", [], []).at(10) == (2.0, None)
    assert from_rows(rows[:2], "a", [], []).at(10) == (None, None)


def test_equal_histories_say_nothing():
    rows = [{"step": 1, "lr": 0.5, "extra": "x"}, {"step": 2, "lr": None}]
    assert list(differing_histories(rows, [dict(row) for row in rows], "metrics.jsonl", "the W&B file")) == []


def test_a_thousand_cells_are_collected_in_seconds(sweep):
    sweep_dir, plan = sweep
    finish(sweep_dir, plan, plan.cells[0])
    many = plan.spec.model_copy(update={"seeds": tuple(range(170))})
    plan = make_plan(many)
    content = json.dumps(plan.to_json(estimates=False))
    (sweep_dir / "plan.json").write_text(content)
    for cell in plan.cells[1:]:
        run_dir = sweep_dir / "runs" / cell.cell_id
        run_dir.mkdir(exist_ok=True)
        values = result(cell.cell_id, step=cell.steps, data_hash=plan.data_hash)
        (run_dir / "result.json").write_text(json.dumps(dataclasses.asdict(values)))
    before = time.monotonic()
    collected = collect(sweep_dir)
    assert len(collected.runs) == len(plan.cells) > 1000 and time.monotonic() - before < 10


@pytest.mark.parametrize("text", ["{}", "", "model: 7"])
def test_without_a_plan_one_config_that_cannot_be_read_keeps_no_other_from_its_row(sweep, text):
    sweep_dir, plan = sweep
    for cell in plan.cells[:2]:
        finish(sweep_dir, plan, cell)
    (sweep_dir / "plan.json").unlink()
    (sweep_dir / "runs" / plan.cells[0].cell_id / "config.yaml").write_text(text)
    collected = collect(sweep_dir)
    assert collected.runs["run_id"].tolist() == [plan.cells[1].cell_id]
    assert "its config cannot be read" in collected.excluded["reason"].iloc[0]


# pyarrow's parser ends the whole process if `null` is the first line.
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("line", ["null", "{} null", f'{{"step": 2, "a": {"[" * 200_000}', '{"a":' * 200_000])
def test_a_line_of_the_metrics_that_would_crash_the_parser_is_a_torn_one(tmp_path, line, is_first):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, metrics_row(step=1, tokens=8, **{"train/loss": 2.0}))
    path.write_text(f"{line}\n{path.read_text()}" if is_first else f"{path.read_text()}{line}\n")
    history = from_metrics(path, "a", [])
    assert history.last_step == 1 and "1 line is torn" in history.warnings[0]
