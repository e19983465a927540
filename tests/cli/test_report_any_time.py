"""`dlm report` of sweeps that still grow, of tables from elsewhere, and of several of them; and `--watch`."""

import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from support import ROOT, by_hand
from support.demo_runs import BUDGETS, demo_runs
from support.stub_cell import status
from typer.testing import CliRunner

from dlm.cli import targets, versus
from dlm.cli.standing import standing_of
from dlm.cli.targets import Sweep
from dlm.cli.verbs import app
from dlm.core import text
from dlm.core.errors import UserError
from dlm.core.lease import Lease
from dlm.fit import table
from dlm.record.outcomes import State
from dlm.record.run import write_status

PAGE = "report/report.html"


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch):
    monkeypatch.setitem(table.fit_sweep.__kwdefaults__, "bootstrap", 0)


def run(*words):
    result = CliRunner().invoke(app, ["report", *map(str, words)])
    if isinstance(result.exception, UserError):
        return 2, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def growing(tmp_path, monkeypatch):
    """A sweep of six cells, of which none has started."""
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path / "work"))
    folder, plan = by_hand.planned(tmp_path, monkeypatch)
    return Sweep(folder, plan)


def test_a_sweep_of_which_nothing_has_started_has_a_report(growing):
    code, said = run(growing.folder)
    assert code == 0
    assert "0 of 6 cells can be used; 6 planned." in said and "No cell can be used at 1e10 and 2e10 FLOPs." in said
    assert "0 of 6 cells can be used" in (growing.folder / PAGE).read_text()


def test_the_report_says_what_is_missing_and_what_runs(growing):
    first, second, *_ = growing.plan.cells
    by_hand.finish(growing.folder, growing.plan, first)
    by_hand.started(growing.folder, growing.plan, second, by_hand.final_rows(second)[:1])
    running = status(State.RUNNING, step=5, steps=second.steps, tokens_per_sec=10.0)
    write_status(growing.folder / "runs" / second.cell_id, running)
    code, _ = run(growing.folder)
    page = (growing.folder / PAGE).read_text()
    assert code == 0 and "1 of 6 cells can be used" in page and "1 of 3 at 1e10 FLOPs" in page
    assert "No cell can be used at 2e10 FLOPs." in page
    assert 'http-equiv="refresh"' not in page


def test_a_cell_that_has_ended_since_the_tables_were_read_is_not_said_to_run(growing):
    cell = growing.plan.cells[0]
    by_hand.finish(growing.folder, growing.plan, cell)
    rows = pd.DataFrame([{"run_id": cell.cell_id, "status": str(State.RUNNING)}])
    found = standing_of(growing, SimpleNamespace(runs=pd.DataFrame({"run_id": []}), excluded=rows))
    assert not any("None" in line or "Running now" in line for line in found.lines)


def test_a_budget_whose_cells_are_all_done_is_not_named(growing):
    low = min(cell.budget_flops for cell in growing.plan.cells)
    whole = [cell.cell_id for cell in growing.plan.cells if cell.budget_flops == low]
    others = [cell.cell_id for cell in growing.plan.cells if cell.budget_flops != low]
    runs = pd.DataFrame({"run_id": [*whole, others[0]]})
    rows = pd.DataFrame({"run_id": others[1:], "status": [str(State.DONE), *[str(State.FAILED)] * (len(others) - 2)]})
    found = standing_of(growing, SimpleNamespace(runs=runs, excluded=rows))
    assert found.to_come == 0
    assert found.lines == (
        f"{len(whole) + 1} of 6 cells can be used; 1 left out and {len(others) - 2} failed.",
        f"Of some budgets, a part of the cells can be used: 1 of {len(others)} at 2e10 FLOPs.",
    )


def test_the_report_says_how_long_a_running_cell_and_the_sweep_still_take(growing):
    cell = growing.plan.cells[0]
    run_dir = by_hand.started(growing.folder, growing.plan, cell, by_hand.final_rows(cell)[:1])
    left = cell.tokens * (1 - 5 / cell.steps) / 10
    with Lease(run_dir, doing="trained"):
        write_status(run_dir, status(State.RUNNING, step=5, steps=cell.steps, tokens_per_sec=10.0))
        said = run(growing.folder)[1]
    assert f"{cell.cell_id} (step 5 of {cell.steps:,}, about {text.duration(left)} left)" in said
    assert f"Until every cell has ended: about {text.duration(left)}." in said


def test_a_sweep_that_failed_as_a_whole_has_no_report(growing):
    for cell in growing.plan.cells:
        run_dir = by_hand.started(growing.folder, growing.plan, cell, by_hand.final_rows(cell)[:1])
        write_status(run_dir, status(State.DIVERGED, step=5, steps=cell.steps, exit_code=3))
    code, said = run(growing.folder)
    assert code == 2 and "can be used" in said


def test_runs_without_a_plan_have_a_report(growing):
    for cell in growing.plan.cells:
        by_hand.finish(growing.folder, growing.plan, cell)
    (growing.folder / "plan.json").unlink()
    code, _ = run(growing.folder)
    assert code == 0 and (growing.folder / PAGE).is_file()


def test_a_table_from_elsewhere_has_a_report_beside_it(tmp_path):
    path = tmp_path / "löss.csv"
    demo_runs()[["params", "tokens", "loss"]].to_csv(path, index=False)
    code, said = run(path)
    assert code == 0 and f"report: {tmp_path / 'löss_report' / PAGE}" in said
    assert json.loads((tmp_path / "löss_report/fits.json").read_text())["combined"]["n"] == len(demo_runs())


def test_a_table_without_losses_is_refused(tmp_path):
    demo_runs()[["params", "tokens"]].to_csv(tmp_path / "a.csv", index=False)
    code, said = run(tmp_path / "a.csv")
    assert code == 2 and "no column 'loss'" in said


def test_the_report_of_a_table_does_not_replace_that_of_a_sweep(growing, tmp_path):
    demo_runs().to_csv(tmp_path / "a.csv", index=False)
    code, said = run(tmp_path / "a.csv", "--out", growing.folder)
    assert code == 2 and "is the folder of a sweep" in said


def test_the_file_runs_csv_of_a_sweep_stands_for_the_sweep(growing):
    by_hand.finish(growing.folder, growing.plan, growing.plan.cells[0])
    run(growing.folder)
    assert targets.table_of(str(growing.folder / "runs.csv")) is None
    assert targets.existing_sweep(str(growing.folder / "runs.csv")).folder == growing.folder


def compared(tmp_path, monkeypatch, second):
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path / "work"))
    demo_runs().to_csv(tmp_path / "one.csv", index=False)
    second.to_csv(tmp_path / "two.csv", index=False)
    code, said = run(tmp_path / "one.csv", tmp_path / "two.csv")
    folder = tmp_path / "work/compare/one_two"
    assert code == 0 and f"report: {folder / PAGE}" in said
    page = (folder / PAGE).read_text()
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL), json.loads(
        (folder / "comparison.json").read_text()
    )


def test_two_tables_are_compared_on_one_page(tmp_path, monkeypatch):
    second = demo_runs(seed=3).assign(learning_rate=0.01)
    second["loss"] *= 1.02
    page, numbers = compared(tmp_path, monkeypatch, second)
    (found,) = numbers["multipliers"].values()
    assert min(found["multiplier"]) > 1 and found["names"] == ["one", "two"]
    assert "Exponents and best sizes" in page and "compute multiplier" in page
    assert re.search(r"learning_rate</td>\s*<td[^>]*>–</td>\s*<td[^>]*>0.01", page)


def test_each_objective_is_compared_with_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path / "work"))
    both = demo_runs(objectives=("masked_diffusion", "autoregressive"))
    both.to_csv(tmp_path / "both.csv", index=False)
    demo_runs(seed=3).to_csv(tmp_path / "one.csv", index=False)
    code, _ = run(tmp_path / "both.csv", tmp_path / "one.csv")
    numbers = json.loads((tmp_path / "work/compare/both_one/comparison.json").read_text())
    assert code == 0 and set(numbers["multipliers"]) == {
        "both, Masked diffusion against both, Autoregressive",
        "one, Masked diffusion against both, Masked diffusion",
    }


def test_tables_that_count_flops_otherwise_are_not_drawn_over_one_axis(tmp_path, monkeypatch):
    second = demo_runs().assign(convention="6n")
    second["flops"] = second["flops_6n"]
    page, numbers = compared(tmp_path, monkeypatch, second)
    assert "refused" in numbers["multipliers"]["two against one"]
    assert "one counts FLOPs as full_masked_head and two counts FLOPs as 6n" in page
    assert "dlm reconcile" in page and "lowest loss L*" not in page


def test_a_set_of_one_budget_is_compared_by_its_minimum(tmp_path, monkeypatch):
    page, numbers = compared(tmp_path, monkeypatch, demo_runs(budgets=BUDGETS[:1], seed=3))
    assert "refused" in numbers["multipliers"]["two against one"]
    assert "How do loss and best size grow with compute?" in page and "lowest loss L*" in page


def test_a_set_is_not_compared_with_itself(tmp_path):
    demo_runs().to_csv(tmp_path / "one.csv", index=False)
    code, said = run(tmp_path / "one.csv", f"{tmp_path}/../{tmp_path.name}/one.csv")
    assert code == 2 and "is given twice" in said


def test_sets_of_one_name_get_different_names(tmp_path):
    assert versus.names_of([tmp_path / "a/x.csv", tmp_path / "b/x.csv"]) == ["a-x", "b-x"]
    assert versus.names_of([tmp_path / "a/runs.csv", tmp_path / "b/runs.csv"]) == ["a", "b"]


@pytest.mark.parametrize("extra", [(), ("two.csv",)])
def test_watch_follows_one_sweep_only(tmp_path, monkeypatch, extra):
    monkeypatch.chdir(tmp_path)
    demo_runs().to_csv("one.csv", index=False)
    code, said = run("one.csv", *extra, "--watch")
    assert code == 2 and "--watch follows" in said


def test_watch_ends_where_nothing_runs(growing):
    code, said = run(growing.folder, "--watch")
    assert code == 0 and "the next in" not in said
    assert 'http-equiv="refresh"' not in (growing.folder / PAGE).read_text()


def test_ctrl_c_ends_a_watch_and_the_page_stops_to_reload(growing, tmp_path):
    """A live process stands for the cell: this test's own."""
    cell = growing.plan.cells[0]
    run_dir = by_hand.started(growing.folder, growing.plan, cell, by_hand.final_rows(cell)[:1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DLM_WORKDIR": str(tmp_path / "work")}
    with Lease(run_dir, doing="trained"):
        write_status(run_dir, status(State.RUNNING, step=5, steps=cell.steps))
        command = [sys.executable, "-m", "dlm.cli", "report", str(growing.folder), "--watch", "--every", "60"]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as one:
            assert one.stdout is not None
            assert wait_for(one, "the next in")
            assert 'http-equiv="refresh" content="60"' in (growing.folder / PAGE).read_text()
            one.send_signal(signal.SIGINT)
            said = one.stdout.read()
            assert one.wait(60) == 130
    assert "the report stays as it was made last" in said
    assert 'http-equiv="refresh"' not in (growing.folder / PAGE).read_text()


def wait_for(process, words):
    for line in iter(process.stdout.readline, ""):
        if words in line:
            return line
    return ""
