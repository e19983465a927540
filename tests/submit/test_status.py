"""What is shown of each cell, from files as a run leaves them; and the arithmetic of progress."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stub_cell import result, status
from support.submissions import write_submitted

from dlm.cli.screen import plain_lines
from dlm.core.lease import Lease
from dlm.plan.cells import Estimate
from dlm.record.outcomes import State
from dlm.record.run import write_result, write_status
from dlm.submit.table import (
    CellStatus,
    fraction_done,
    status_rows,
    status_values,
    summary_line,
    sweep_now,
    sweep_status,
    time_left_sec,
)

STEPS = 10


def make_plan(gpu_hours: float | None = None, **flops: float) -> SimpleNamespace:
    cells = [
        SimpleNamespace(
            cell_id=name,
            steps=STEPS,
            tokens=10240,
            flops={"6n": value, "full": 1.0},
            convention="6n",
            estimate=Estimate(gpu_hours=gpu_hours),
        )
        for name, value in flops.items()
    ]
    return SimpleNamespace(cells=tuple(cells))


def run_dir(sweep_dir: Path, name: str) -> Path:
    folder = sweep_dir / "runs" / name
    folder.mkdir(parents=True)
    return folder


def test_each_state_comes_from_its_files(tmp_path):
    plan = make_plan(done=1.0, running=2.0, dead=4.0, failed=8.0, torn=16.0, untouched=32.0)
    write_result(run_dir(tmp_path, "done"), result("done"))
    running = run_dir(tmp_path, "running")
    write_status(running, status(State.RUNNING, step=4, loss=2.75, tokens_per_sec=2048.0, attempts=2))
    write_status(run_dir(tmp_path, "dead"), status(State.RUNNING, step=5, tokens_per_sec=2048.0))
    write_status(run_dir(tmp_path, "failed"), status(State.FAILED, step=2, exit_code=1, reason="RuntimeError: x"))
    (run_dir(tmp_path, "torn") / "status.json").write_text('{"state": "runn')
    with Lease(running):
        cells = {cell.cell_id: cell for cell in sweep_status(tmp_path, plan)}
    assert [cells[name].state for name in cells] == [
        State.DONE, State.RUNNING, State.LOST, State.FAILED, State.PLANNED, State.PLANNED,
    ]  # fmt: skip
    assert (cells["done"].step, cells["done"].loss, cells["done"].eta_sec) == (STEPS, 2.5, None)
    assert (cells["running"].step, cells["running"].loss, cells["running"].attempts) == (4, 2.75, 2)
    assert cells["running"].eta_sec == pytest.approx(6 * 1024 / 2048)  # six steps of 1024 tokens
    assert "no process holds it" in cells["dead"].reason and cells["dead"].eta_sec is None
    assert cells["failed"].reason == "RuntimeError: x"
    after = {cell.cell_id: cell.state for cell in sweep_status(tmp_path, plan)}
    assert after["running"] is State.LOST  # the lease is gone, the status still says running


def test_progress_is_the_share_of_flops_in_the_plans_convention(tmp_path):
    plan = make_plan(a=1e12, b=3e12)
    write_result(run_dir(tmp_path, "a"), result("a"))
    write_status(run_dir(tmp_path, "b"), status(State.PREEMPTED, step=5, exit_code=75))
    cells, warnings = sweep_now(tmp_path, plan)
    assert warnings == []
    assert fraction_done(cells, plan) == (1e12 + 1.5e12) / 4e12
    assert summary_line(cells, plan) == "1 preempted, 1 done; 62.5 % of 4e12 FLOPs"


@given(st.lists(st.tuples(st.floats(1, 1e20), st.integers(0, STEPS)), min_size=1, max_size=8))
def test_progress_stays_within_zero_and_one_and_is_one_when_all_is_done(cells):
    plan = make_plan(**{f"c{index}": flops for index, (flops, _) in enumerate(cells)})

    def progress(steps):
        found = [
            CellStatus(cell_id=cell.cell_id, state=State.RUNNING, step=step, steps=STEPS)
            for cell, step in zip(plan.cells, steps, strict=True)
        ]
        return fraction_done(found, plan)

    steps = [step for _, step in cells]
    assert 0 <= progress(steps) <= 1 + 1e-12
    assert progress([STEPS] * len(cells)) == pytest.approx(1)
    assert progress([0] * len(cells)) == 0
    assert progress([min(step + 1, STEPS) for step in steps]) >= progress(steps)


def test_rows_for_people_and_values_for_programs():
    running = CellStatus(
        cell_id="a", state=State.RUNNING, job="12_0", step=1234, steps=20000, loss=2.71828, tokens_per_sec=98765.4,
        eta_sec=12345.0, attempts=2, steps_redone=7, reason="process 1 on host",
    )  # fmt: skip
    planned = CellStatus(cell_id="b", state=State.PLANNED, step=0, steps=10)
    assert status_rows([running, planned]) == [
        {"cell": "a", "state": State.RUNNING, "job": "12_0", "step": "1,234/20,000", "loss": "2.7183",
         "tokens/s": "98,765", "ETA": "3.4 h", "attempts": 2, "redone": 7, "reason": "process 1 on host"},
        {"cell": "b", "state": State.PLANNED, "job": None, "step": "0/10", "loss": None, "tokens/s": None, "ETA": None,
         "attempts": 0, "redone": None, "reason": None},
    ]  # fmt: skip
    values = json.loads(json.dumps(status_values([running]), allow_nan=False))
    assert values[0]["eta_sec"] == 12345.0 and values[0]["state"] == "running"


def test_the_time_left_of_a_sweep_follows_from_the_cells_that_train():
    plan = make_plan(a=100.0, b=300.0, c=100.0)  # FLOPs in the convention of the plan; 10240 tokens each
    rate = 10240 / 50  # a whole cell in 50 s
    a = CellStatus(cell_id="a", state=State.RUNNING, step=5, steps=10, tokens_per_sec=rate, eta_sec=25.0)
    b = CellStatus(cell_id="b", state=State.SUBMITTED, steps=10)
    c = CellStatus(cell_id="c", state=State.DONE, step=10, steps=10)
    assert time_left_sec([a, b, c], plan) == pytest.approx((50 + 300) / (100 / 50))
    assert time_left_sec([replace(a, eta_sec=999.0), b, c], plan) == 999.0
    assert time_left_sec([b, c], plan) is None
    assert time_left_sec([a, replace(b, state=State.CANCELLED), c], plan) == pytest.approx(25)
    assert "at this rate, the sweep ends in 2.9 min" in summary_line([a, b, c], plan)


def test_a_silent_slurm_is_a_warning_and_no_cell_is_called_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    plan = make_plan(a=1.0)
    write_submitted(tmp_path, "a", "s", "1001_0")
    cells, warnings = sweep_now(tmp_path, plan)
    assert cells[0].state is State.SUBMITTED and "1001_0" in cells[0].reason
    assert "squeue is not on PATH" in warnings and "sacct is not on PATH" in warnings


def test_a_thousand_cells_in_under_a_second(tmp_path):
    plan = make_plan(**{f"c{index}": 1.0 for index in range(1000)})
    for cell in plan.cells:
        folder = run_dir(tmp_path, cell.cell_id)
        text = (
            '{"state": "preempted", "step": 3, "steps": 10, "attempts": 1, "exit_code": 75, "started": 1, "updated": 2}'
        )
        (folder / "status.json").write_text(text)
    before = time.process_time()
    cells = sweep_status(tmp_path, plan)
    assert time.process_time() - before < 1
    assert {cell.state for cell in cells} == {State.PREEMPTED}


def test_many_rows_are_plain_aligned_lines():
    lines = plain_lines([{"cell": "a", "N": "12"}, {"cell": "long", "N": "3"}])
    assert lines == ["cell   N", "a     12", "long   3"]
