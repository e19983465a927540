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

from dlm.cli.table import plain_lines
from dlm.core.lease import Lease
from dlm.plan.cells import Estimate
from dlm.record.outcomes import State
from dlm.record.run import write_result, write_status
from dlm.submit.follower import is_under_way
from dlm.submit.progress import REFILL_SEC, progress_of
from dlm.submit.table import CellStatus, status_rows, status_values, sweep_now, sweep_status

STEPS = 10


def make_plan(gpu_hours: float | None = None, **flops: float) -> SimpleNamespace:
    cells = [
        SimpleNamespace(
            cell_id=name,
            steps=STEPS,
            tokens=10240,
            flops={"6n": value, "full_masked_head": 2 * value},
            convention="6n",
            objective="masked_diffusion",
            num_params=1000,
            branch_step=None,
            own_share=1.0,
            parent=None,
            is_proof=False,
            estimate=Estimate(gpu_hours=gpu_hours, hours=gpu_hours, gpus_per_node=1),
        )
        for name, value in flops.items()
    ]
    return SimpleNamespace(cells=tuple(cells), spec=SimpleNamespace(proof=None))


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
    progress = progress_of(cells, plan)
    assert (progress.flops, progress.flops_done) == (4e12, 1e12 + 1.5e12)
    assert progress.lines("s")[:2] == ["s: 2 cells: 1 done, 1 preempted", "FLOPs: 62.5 % of 4e12 done (6n)"]


@given(st.lists(st.tuples(st.floats(1, 1e20), st.integers(0, STEPS)), min_size=1, max_size=8))
def test_progress_stays_within_zero_and_one_and_is_one_when_all_is_done(cells):
    plan = make_plan(**{f"c{index}": flops for index, (flops, _) in enumerate(cells)})

    def progress(steps):
        found = [
            CellStatus(cell_id=cell.cell_id, state=State.RUNNING, step=step, steps=STEPS)
            for cell, step in zip(plan.cells, steps, strict=True)
        ]
        return progress_of(found, plan).values()["flops_share"]

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


def train(name, step=0, *, sec_per_cell=50.0, **values):
    """A cell that runs, or has run, at a speed of one whole cell in ``sec_per_cell``."""
    wall_sec = sec_per_cell * step / STEPS or None
    eta_sec = sec_per_cell - wall_sec if wall_sec else None
    known = {"state": State.RUNNING, "wall_sec": wall_sec, "eta_sec": eta_sec, "steps": STEPS, "step": step}
    return CellStatus(cell_id=name, **{**known, **values})


def waiting(name, **values):
    return CellStatus(cell_id=name, **{"state": State.SUBMITTED, "steps": STEPS, "is_expected": True, **values})


def done(name, **values):
    return train(name, STEPS, **{"state": State.DONE, "eta_sec": None, **values})


def test_waiting_cells_start_when_a_running_one_ends_at_the_speed_per_flop_of_cells_of_their_size():
    plan = make_plan(a=100.0, b=300.0, c=100.0, d=200.0)
    cells = [train("a", 5), waiting("b"), done("c"), train("d", 5, sec_per_cell=100.0)]
    progress = progress_of(cells, plan)  # a ends in 25 s, d in 50 s; b takes 3 x 50 s after a
    assert progress.eta_sec == pytest.approx(25 + 150)
    assert progress.lines("s")[-1] == "ends in: about 2.9 min, if 2 cells at a time run on as now"
    alone = [train("a", 5), waiting("b"), done("c"), waiting("d")]
    assert progress_of(alone, plan).eta_sec == pytest.approx(25 + 150 + 100)


def test_the_speed_of_a_waiting_cell_is_that_of_the_nearest_size():
    plan = make_plan(small=100.0, large=100.0, waits=100.0)
    for cell, size in zip(plan.cells, (1_000, 90_000, 80_000), strict=True):
        cell.num_params = size
    cells = [done("small", sec_per_cell=10.0), train("large", 5, sec_per_cell=40.0), waiting("waits")]
    assert progress_of(cells, plan).eta_sec == pytest.approx(20 + 40)
    plan.cells[0].objective, plan.cells[0].num_params = "autoregressive", 80_000  # the size counts before the objective
    assert progress_of(cells, plan).eta_sec == pytest.approx(20 + 10)


def test_the_longest_waiting_cell_starts_first():
    plan = make_plan(a=100.0, b=100.0, short=100.0, long=400.0)
    cells = [train("a", 5), train("b", 5), waiting("short"), waiting("long")]
    assert progress_of(cells, plan).eta_sec == pytest.approx(25 + 200)


def test_the_share_of_the_flops_is_100_only_if_nothing_is_missing():
    plan = make_plan(a=1e6, b=1.0)
    lines = progress_of([done("a"), CellStatus(cell_id="b", state=State.PLANNED, steps=STEPS)], plan).lines("s")
    assert "FLOPs: 99.9 % of 1e6 done (6n)" in lines


def test_the_time_until_the_end_counts_only_cells_that_something_will_start():
    plan = make_plan(a=100.0, b=300.0)
    for state in (State.PLANNED, State.PREEMPTED, State.CANCELLED, State.FAILED):
        stays = CellStatus(cell_id="b", state=state, steps=STEPS)
        assert progress_of([train("a", 5), stays], plan).eta_sec == pytest.approx(25), state
    queued_here = CellStatus(cell_id="b", state=State.PLANNED, steps=STEPS, is_expected=True)
    assert progress_of([train("a", 5), queued_here], plan).eta_sec == pytest.approx(25 + 150)


def test_the_last_validation_of_finished_cells_counts_for_those_that_are_left():
    plan = make_plan(a=100.0, b=100.0)
    assert progress_of([train("a", 5), done("b", after_sec=7.0)], plan).eta_sec == pytest.approx(25 + 7)


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        ((waiting("a"), waiting("b")), "no cell runs now"),
        ((CellStatus(cell_id="a", state=State.PLANNED, steps=STEPS), done("b")), "no cell runs now"),
        ((train("a"), waiting("b")), "no cell has measured its speed yet"),
        ((train("a", 5, is_suspended=True, eta_sec=None), waiting("b")), "a is suspended"),
        ((train("a", 5), waiting("b", steps=0)), "the steps of some cells are not known yet"),
    ],
)
def test_the_time_until_the_end_is_unknown_where_nothing_tells(cells, why):
    plan = make_plan(a=100.0, b=300.0)
    for cell, now in zip(plan.cells, cells, strict=True):
        cell.steps = now.steps
    progress = progress_of(cells, plan)
    assert (progress.eta_sec, progress.eta_unknown) == (None, why)
    assert progress.lines("s")[-1] == f"ends in: unknown, because {why}"


def test_a_finished_sweep_says_nothing_of_its_end():
    progress = progress_of([done("a"), done("b")], make_plan(a=100.0, b=300.0))
    assert (progress.eta_sec, progress.eta_unknown, progress.hours_left) == (None, None, 0)
    assert progress.lines("s") == [
        "s: 2 cells: 2 done", "FLOPs: 100.0 % of 4e2 done (6n)", "process-hours: 0.0278 used",
    ]  # fmt: skip


def test_the_seconds_between_two_cells_do_not_change_how_many_run_at_once():
    plan = make_plan(a=100.0, b=100.0, c=100.0, d=100.0)
    ended = done("a", started=950.0, ended=1000.0)
    cells = [ended, train("b", 5, started=975.0), waiting("c"), waiting("d")]
    soon, late = (progress_of(cells, plan, clock=1000 + wait) for wait in (1.0, REFILL_SEC + 1))
    assert (soon.at_once, soon.eta_sec) == (2, pytest.approx(25 + 50))
    assert (late.at_once, late.eta_sec) == (1, pytest.approx(25 + 50 + 50))
    lost = CellStatus(cell_id="b", state=State.LOST, steps=STEPS, started=900.0)  # it did not say when it ended
    assert progress_of([ended, lost, *cells[2:]], plan, clock=1001.0).at_once == 1


def test_a_watch_goes_on_between_two_cells_on_this_machine_but_not_after_their_process_has_died(tmp_path):
    now = time.time()
    ended, rest = done("a", started=now - 50, ended=now - 5), waiting("b", state=State.PLANNED)
    assert is_under_way([ended, rest], tmp_path)
    assert not is_under_way([replace(ended, ended=now - REFILL_SEC - 5), rest], tmp_path)
    assert not is_under_way([ended, replace(rest, is_expected=False)], tmp_path)
    assert is_under_way([waiting("b")], tmp_path)  # a queue holds it


def test_a_cell_that_was_stopped_and_goes_on_counts_once_with_all_its_attempts(tmp_path):
    plan = make_plan(a=1e12)
    again = status(State.PREEMPTED, step=5, tokens_per_sec=512.0, attempts=3, steps_redone=2, exit_code=75)
    write_status(run_dir(tmp_path, "a"), again)
    cells, _ = sweep_now(tmp_path, plan)
    progress = progress_of(cells, plan)
    assert (progress.flops_done, progress.waiting, progress.steps_redone) == (5e11, 1, 2)
    assert progress.hours_used == pytest.approx(7 * 1024 / 512 / 3600)  # five steps, and two that were lost
    assert progress.hours_left == pytest.approx(5 * 1024 / 512 / 3600)


def test_gpu_hours_left_are_measured_where_cells_have_run_and_planned_elsewhere():
    plan = make_plan(gpu_hours=2.0, a=100.0, b=100.0)
    planned = CellStatus(cell_id="b", state=State.PLANNED, steps=STEPS)
    before = progress_of([replace(planned, cell_id="a"), planned], plan)
    assert (before.unit, before.hours_planned, before.hours_left) == ("GPU-hours", 4.0, 4.0)
    running = train("a", 5, sec_per_cell=3600.0, gpu_hours=4.0, gpus=8)
    during = progress_of([running, planned], plan)
    assert (during.hours_used, during.hours_left) == (4.0, pytest.approx(4.0 + 1.0))  # b has one GPU as planned
    assert "GPU-hours: 4 used of 4 planned, about 5 left" in during.lines("s")


def test_a_branch_counts_without_the_steps_of_its_trunk():
    plan = make_plan(trunk=100.0, branch=100.0)
    branch = plan.cells[1]
    branch.parent, branch.branch_step, branch.own_share = "trunk", 8, 0.2
    at_start, half = (CellStatus(cell_id="branch", state=State.PREEMPTED, step=step, steps=STEPS) for step in (8, 9))
    assert progress_of([done("trunk"), at_start], plan).flops_done == 100
    assert progress_of([done("trunk"), half], plan).flops_done == pytest.approx(110)
    assert progress_of([done("trunk"), half], plan).flops == pytest.approx(120)
    trained = replace(half, wall_sec=45.0)  # in nine steps, of which the trunk did eight
    assert progress_of([done("trunk"), trained], plan).hours_used == pytest.approx((50 + 5) / 3600)
    assert progress_of([done("trunk"), at_start], plan).hours_left == pytest.approx(2 * 5 / 3600)


def test_a_proof_run_that_is_still_to_come_is_named_and_not_counted():
    plan = make_plan(a=1e12)
    plan.spec.proof = object()
    assert progress_of([done("a")], plan).lines("s")[-1].startswith("the proof run is not counted yet")
    plan.cells[0].is_proof = True
    assert not progress_of([done("a")], plan).proof_to_come


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
