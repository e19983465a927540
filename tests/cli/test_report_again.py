"""A second `dlm sweep` makes the report again only if something has changed that decides its content."""

import json
import shutil

import pytest
from support import by_hand
from support.demo_runs import demo_runs

from dlm.cli import gather, memory
from dlm.cli.targets import Sweep
from dlm.core.errors import UserError
from dlm.core.files import write_json
from dlm.fit import table


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A sweep whose cells are done, and a list that grows with every report that is made; fits are left out."""
    folder, plan = by_hand.planned(tmp_path, monkeypatch)
    for number, cell in enumerate(plan.cells):
        by_hand.finish(folder, plan, cell, loss=2.5 + number / 100)
    made = []

    def fit_and_write(sweep, collected, folder, paper, standing, reload_sec):
        made.append(len(collected.runs))
        (folder / "report").mkdir(exist_ok=True)
        (folder / memory.PAGE).write_text("page")
        write_json(folder / "fits.json", [])
        return [f"verdict number {len(made)}", "  warning: few runs"]

    monkeypatch.setattr(gather, "_fit_and_write", fit_and_write)
    return Sweep(folder, plan), made


def report(sweep, capsys, **options) -> list[str]:
    gather.report(sweep, **options)
    return capsys.readouterr().out.splitlines()


def test_a_second_sweep_says_the_same_and_fits_nothing(made, capsys):
    sweep, reports = made
    cell = sweep.plan.cells[0]
    shutil.rmtree(sweep.folder / "runs" / cell.cell_id)
    first, second = (report(sweep, capsys, anew=False) for _ in range(2))
    assert first[0] == second[0] and first[0].startswith(f"left out {cell.cell_id}: ")
    assert [line for line in first if line != "fitting ..."] == second
    assert second[-3:] == [
        "verdict number 1",
        "  warning: few runs",
        f"report: {sweep.folder / 'report' / 'report.html'}",
    ]
    assert reports == [5]


def test_dlm_report_always_makes_the_report(made, capsys):
    sweep, reports = made
    for _ in range(2):
        assert "fitting ..." in report(sweep, capsys)
    assert len(reports) == 2


def test_a_report_elsewhere_replaces_only_tables_of_its_own_runs(made, capsys, tmp_path):
    sweep, reports = made
    out = tmp_path / "out"
    for _ in range(2):
        report(sweep, capsys, out=out)
    others = ["run_id,loss\nanother,2.5\n", "params,tokens,loss\n1,2,3\n", "x" * 200_000 + "\n1\n"]
    for text in others:
        (out / "runs.csv").write_text(text)
        with pytest.raises(UserError, match=r"holds other runs than those of .*: give another --out"):
            report(sweep, capsys, out=out)
        assert (out / "runs.csv").read_text() == text and len(reports) == 2


def test_a_report_of_tables_counts_the_rows_that_it_uses(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(table.fit_sweep.__kwdefaults__, "bootstrap", 0)  # for speed
    runs = demo_runs()
    runs.loc[:2, "loss"] = float("nan")
    runs.to_csv(tmp_path / "runs.csv", index=False)
    gather.report_tables(tmp_path, tmp_path)
    rows = "3 other rows cannot be used (not done, without a finite loss, or the same as another)"
    used = f"{tmp_path / 'runs.csv'} has {len(runs) - 3} usable runs; {rows}; `dlm collect` brings"
    assert capsys.readouterr().out.startswith(used)


def another_loss(sweep, monkeypatch):
    result = sweep.folder / "runs" / sweep.plan.cells[0].cell_id / "result.json"
    values = json.loads(result.read_text())
    result.write_text(json.dumps({**values, "loss": values["loss"] + 0.01}))
    metrics = result.with_name("metrics.jsonl")
    metrics.write_text(metrics.read_text().replace(f"{values['loss']}", f"{values['loss'] + 0.01}"))


def a_run_less(sweep, monkeypatch):
    shutil.rmtree(sweep.folder / "runs" / sweep.plan.cells[0].cell_id)


def another_title(sweep, monkeypatch):
    path = sweep.folder / "plan.json"
    path.write_text(path.read_text().replace('"description": ""', '"description": "another"'))


def another_code(sweep, monkeypatch):
    monkeypatch.setattr(memory, "content_hash_of", lambda folder: "another")


def another_library(sweep, monkeypatch):
    monkeypatch.setattr(memory, "version", lambda name: "99")


def no_page(sweep, monkeypatch):
    (sweep.folder / memory.PAGE).unlink()


def no_fits(sweep, monkeypatch):
    (sweep.folder / "fits.json").unlink()


CHANGES = (another_loss, a_run_less, another_title, another_code, another_library, no_page, no_fits)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_the_report_again(made, capsys, monkeypatch, change):
    sweep, reports = made
    report(sweep, capsys, anew=False)
    change(sweep, monkeypatch)
    assert "fitting ..." in report(sweep, capsys, anew=False) and len(reports) == 2
    assert "fitting ..." not in report(sweep, capsys, anew=False)


def test_what_does_not_decide_the_report_does_not_make_it_again(made, capsys):
    """The estimates of another machine, and a log."""
    sweep, reports = made
    report(sweep, capsys, anew=False)
    (sweep.folder / "estimate.json").write_text("{}")
    (sweep.folder / "runs" / sweep.plan.cells[0].cell_id / "log.txt").write_text("more")
    report(sweep, capsys, anew=False)
    assert len(reports) == 1
