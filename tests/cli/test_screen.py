"""What a terminal shows of plans, states and a run on this machine."""

import dataclasses
import re
import sys
from types import SimpleNamespace

import pytest
from support.stub_cell import result, status

from dlm.cli import screen, table
from dlm.cli.options import PlanOptions
from dlm.cli.progress import LocalProgress
from dlm.cli.targets import Sweep, planned
from dlm.core.paths import sweeps_dir
from dlm.plan.cost import with_estimates
from dlm.plan.definition import Hardware, load_sweep
from dlm.plan.grid import make_plan
from dlm.record.outcomes import State
from dlm.record.run import run_directory, write_result, write_status
from dlm.submit.cell_now import CellNow
from dlm.submit.table import CellStatus, status_rows


def row(cell, state=State.RUNNING, **values):
    return {"cell": cell, "state": state, "loss": None, "reason": None, **values}


def test_a_status_shows_what_is_not_known_as_a_dash_and_keeps_brackets(capsys):
    screen.show_status([row("a", loss="2.5"), row("b", State.FAILED, reason="no [bold] key")], ["1 running; 50 %"])
    summary, head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["cell", "state", "loss", "reason"]
    assert first.split() == ["a", "running", "2.5", "-"]
    assert second.split() == ["b", "failed", "-", "no", "[bold]", "key"]
    assert summary == "1 running; 50 %"


def test_a_reason_with_an_escape_sequence_and_a_line_break_is_one_line_of_text(capsys):
    reason = "exit code 1: \x1b[2Jno\nb  done [link=x]y[/link]"
    screen.show_status([row("a", State.FAILED, reason=reason)], ["1 failed \x1b[1m"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "\\x1b[2Jno\\nb  done [link=x]y[/link]" in lines[2]
    assert lines[0] == "1 failed \\x1b[1m"


def test_the_reason_of_a_failure_can_be_read_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    numbers = {"step": "123", "steps": "4567", "tokens/s": "12345", "left": "3.4 h", "attempts": "2", "GPU-h": "1.25"}
    failed = row("mdm-170M-1e19-aaaa1111", State.FAILED, **numbers) | {"reason": "exit code 1: RuntimeError: disk full"}
    screen.show_status([failed], ["1 failed"])
    words = set(capsys.readouterr().out.split())
    assert {"RuntimeError:", "disk", "full"} <= words


def test_a_long_table_shows_the_same_cells_as_plain_lines(capsys):
    rows = [row(f"cell-{number}", loss=f"{number / 10:.1f}") for number in range(table.MANY_ROWS + 1)]
    screen.show_status(rows, ["all of them"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 2 and lines[0] == "all of them"
    assert lines[13].split() == ["cell-11", "running", "1.1"]  # no cell has a reason
    assert len({line.index("running") for line in lines[2:]}) == 1


def test_a_plan_shows_its_cells_its_price_and_the_first_dropped_cells(workdir, stdlib_data, capsys):
    plan = planned(PlanOptions(target="smoke", settings=["tokens_per_param=[20, 100]"])).plan
    screen.show_plan(with_estimates(plan, rates={"4k": 1e9}))
    out = capsys.readouterr().out
    assert all(cell.cell_id in out for cell in plan.cells)
    assert out.count("\ndropped ") == screen.SHOWN_DROPPED
    assert f"... and {len(plan.dropped) - screen.SHOWN_DROPPED} more dropped" in out
    assert "of one process (measured here, 1e+09 full_masked_head FLOP/s a cell)" in out


def test_a_reason_for_dropping_a_cell_is_text(workdir, stdlib_data, capsys):
    plan = planned(PlanOptions(target="smoke")).plan
    row = {"model": "4k", "budget_flops": 1e9, "reason": "no [bold]data[/] at [/x]\n\x1b[2J"}
    screen.show_plan(dataclasses.replace(with_estimates(plan, rates={"4k": 1e9}), dropped=(row,)))
    assert "\ndropped 4k at 1e9: no [bold]data[/] at [/x]\\n\\x1b[2J\n" in capsys.readouterr().out


def test_a_plan_says_which_speeds_it_assumes_for_its_smallest_and_its_largest_cell(workdir, capsys):
    spec = load_sweep(sweeps_dir() / "isoflop.yaml").model_copy(update={"hardware": Hardware(gpus_per_node=1)})
    screen.show_plan(with_estimates(make_plan(spec)))
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"\(smallest cell: 1 x H100 at an assumed \d+% of the peak, compiled; "
        r"largest: 1 x H100 at an assumed 40% of the peak, compiled\)",
        shown,
    ), shown


def test_a_plan_on_80_columns_shows_whole_values_and_says_which_columns_are_missing(
    workdir, stdlib_data, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    plan = planned(PlanOptions(target="demo")).plan
    screen.show_plan(with_estimates(plan, rates={"8k": 1e9}))
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    first = {(cell.model, cell.budget_flops): cell for cell in reversed(plan.cells)}.values()
    assert all(f"{cell.cell_id} " in out and f" {cell.steps:,} " in out for cell in first)
    assert "too narrow for error %, epochs" in out


def test_cells_that_differ_in_their_seed_alone_share_a_row_of_a_plan(workdir, stdlib_data, capsys):
    settings = ["seeds=[0,1]", "models=[4k]", "objectives=[masked_diffusion]", "replicates={below: 0.9, runs: 2}"]
    plan = planned(PlanOptions(target="smoke", settings=[*settings, "budgets=[1e10,2e10]"])).plan
    screen.show_plan(with_estimates(plan, rates={"4k": 1e9}))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in lines if line and (line[0] == "cell" or line[0].startswith("mdm-4k-"))] == [
        "runs", "4", "2",
    ]  # fmt: skip
    once = planned(PlanOptions(target="smoke", settings=["seeds=[0]"])).plan
    screen.show_plan(with_estimates(once, rates={"4k": 1e9}))
    assert "runs" not in capsys.readouterr().out.splitlines()[1]


@pytest.fixture
def run(tmp_path):
    """A sweep of two cells, and the event that one of them ended."""
    cells = tuple(
        SimpleNamespace(
            cell_id=name, steps=10, tokens=10240, flops={"full_masked_head": 1e9}, own_share=1.0, branch_step=None
        )
        for name in "ab"
    )

    def ended(name, exit_code=0):
        job = SimpleNamespace(name=name, run_dir=run_directory(tmp_path, name))
        return SimpleNamespace(kind="ended", job=job, exit_code=exit_code, wall_sec=3.2)

    return Sweep(tmp_path, SimpleNamespace(cells=cells)), ended


def test_a_run_on_this_machine_shows_a_line_for_each_cell_that_ends(run, capsys):
    sweep, ended = run
    write_result(run_directory(sweep.folder, "b"), result("b"))
    now = {"a": CellNow(state=State.PLANNED), "b": CellNow(state=State.PLANNED)}
    with LocalProgress(sweep, now) as progress:
        progress.on_event(SimpleNamespace(kind="started", job=SimpleNamespace(name="a")))
        progress.on_event(SimpleNamespace(kind="deferred", job=SimpleNamespace(name="b")))
        progress.on_event(ended("a", exit_code=1))
        write_status(run_directory(sweep.folder, "a"), status(State.PREEMPTED, reason="stopped at step 4 of 10"))
        progress.on_event(ended("a", exit_code=75))
        progress.on_event(ended("b"))
        progress.on_tick()
    assert capsys.readouterr().out.splitlines() == [
        "starting 2 of 2 cells ...",
        "b is run by another process: waiting for it",
        f"[0/2] a: exit code 1, see {sweep.folder / 'runs/a/log.txt'}, 3 s",
        "[0/2] a: stopped at step 4 of 10, 3 s",
        "[1/2] b: 2.5000 nats/token, 3 s",
        f"run directories: {sweep.folder / 'runs'}",
    ]


def test_cells_that_were_done_before_are_counted(run, capsys):
    sweep, ended = run
    now = {"a": CellNow(state=State.DONE, result=result("a")), "b": CellNow(state=State.PLANNED)}
    write_result(run_directory(sweep.folder, "b"), result("b"))
    with LocalProgress(sweep, now) as progress:
        progress.on_event(ended("b"))
    assert capsys.readouterr().out == "starting 1 of 2 cells ...\n[2/2] b: 2.5000 nats/token, 3 s\n"


def test_a_terminal_of_80_columns_shows_step_and_loss_of_each_running_cell(run, capsys, monkeypatch):
    sweep, _ = run
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    with LocalProgress(sweep, {}) as progress:
        for name in "ab":
            progress.on_event(SimpleNamespace(kind="started", job=SimpleNamespace(name=name)))
        write_status(run_directory(sweep.folder, "a"), status(State.RUNNING, step=3, loss=2.5))
        progress._looked = 0.0  # look again at once
        progress.on_tick()
    lines = capsys.readouterr().out.splitlines()
    whole = max(place for place, line in enumerate(lines) if "all cells" in line)
    assert "15 % of the FLOPs" in lines[whole]
    assert lines[whole + 1].startswith("a ") and "step 3/10  loss 2.500" in lines[whole + 1]
    assert lines[whole + 2].startswith("b ") and "starting torch" in lines[whole + 2]


def test_the_status_keeps_cell_ids_whole_at_80_columns(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    names = ["mdm-110k-1.25e16-0a1b2c3d", "mdm-4k-2e10-00000000"]
    why = "job 1001_0: SLURM says PENDING (ReqNodeNotAvail, UnavailableNodes:n1)"
    cells = [
        CellStatus(cell_id=names[0], state=State.SUBMITTED, job="1001_0", steps=20000, reason=why),
        CellStatus(
            cell_id=names[1], state=State.RUNNING, job="1001_1", step=10, steps=20000, loss=2.5, tokens_per_sec=12345.0,
            eta_sec=99.0, attempts=2,
        ),
    ]  # fmt: skip
    screen.show_status(status_rows(cells), ["2 cells"])
    lines = plain(capsys.readouterr().out)
    assert lines[0] == "2 cells"
    assert [line.split()[0] for line in lines[2:4]] == names and "1001_1" in lines[3]
    assert "redone" not in lines[1] and "reason" not in lines[1]
    said = " ".join(" ".join(lines[4:]).split())
    assert "the terminal is too narrow for attempts; `dlm status --json` has all columns" in said
    assert said.endswith(f"{names[0]}: {why}") and max(map(len, lines)) <= 80
    monkeypatch.setenv("COLUMNS", "200")
    screen.show_status(status_rows(cells), ["2 cells"])
    lines = plain(capsys.readouterr().out)
    assert lines[2].endswith(why) and len(lines) == 4


def plain(shown):
    """The lines of what was shown, without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
