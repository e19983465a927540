"""The summary that a plan begins with: a row for each budget, and a picture of the sizes in characters."""

import dataclasses
import re
import sys
from types import SimpleNamespace

import pytest

from dlm.cli import screen
from dlm.cli.options import PlanOptions
from dlm.cli.plan_summary import MOST_SIZES, legend, picture, summary_rows
from dlm.cli.start import _show_change
from dlm.cli.targets import planned
from dlm.core import text
from dlm.core.errors import UserError
from dlm.core.paths import sweeps_dir
from dlm.plan.cost import estimated, with_estimates
from dlm.plan.definition import load_sweep
from dlm.plan.grid import make_plan
from dlm.plan.proof import expected_proof
from dlm.plan.store import write_plan
from dlm.record.outcomes import State
from dlm.submit.cell_now import CellNow

GPUS = ["hardware={device: H100, gpus_per_node: 8, price_per_gpu_hour: 2.5}"]


def plan_of(name, *settings):
    plan = with_estimates(make_plan(load_sweep(sweeps_dir() / f"{name}.yaml", settings)))
    return plan, estimated(expected_proof(plan), plan.spec.hardware)


def test_a_row_sums_up_the_cells_of_a_budget_and_the_last_one_all_of_them(workdir):
    plan, proof = plan_of("isoflop", *GPUS, "tune=true")
    rows = {row["budget"]: row for row in summary_rows(plan, proof)}
    for name, wanted in (("1e19", plan.grid), ("sum", plan.grid), ("tune 1e19", plan.grid)):
        budget, role = (1e19 if "1e19" in name else None), ("tune" if "tune" in name else None)
        cells = [c for c in wanted if name == "sum" or (c.budget_flops == budget and c.role == role)]
        hours = sum(cell.estimate.gpu_hours for cell in cells)
        row = rows[name]
        assert row["cells"] == str(len(cells))
        assert float(row["GPU-hours"]) == pytest.approx(hours, rel=1e-3)
        assert float(row["price"]) == pytest.approx(2.5 * hours, rel=2e-2)
        for head, key in (("N", "num_params"), ("tokens", "tokens")):
            ends = [text.count(pick(getattr(cell, key) for cell in cells)) for pick in (min, max)]
            assert row[head] == " to ".join(dict.fromkeys(ends))
    assert sum(int(row["cells"]) for name, row in rows.items() if name not in ("sum", "proof")) == len(plan.grid)
    assert all("price" not in row for row in summary_rows(*plan_of("isoflop")))
    named = " ".join(rows)
    assert named.rindex(" 1e19") > named.index("tune") and named.index("1e19") < named.index("tune")


@pytest.mark.parametrize("value", ["-1", ".nan", ".inf", "true", "abc"])
def test_a_price_that_is_no_amount_is_refused(workdir, value):
    with pytest.raises(UserError, match=r"hardware\.price_per_gpu_hour"):
        plan_of("isoflop", f"hardware.price_per_gpu_hour={value}")


def test_a_price_is_for_gpus_and_changes_no_cell(workdir):
    with pytest.raises(UserError, match=r"hardware.price_per_gpu_hour is for GPUs, and hardware.device is cpu"):
        plan_of("demo", "hardware.price_per_gpu_hour=1")
    (with_price, _), (without, _) = plan_of("isoflop", "hardware.price_per_gpu_hour=1"), plan_of("isoflop")
    assert with_price.cells == without.cells and "price_per_gpu_hour" not in without.spec.plain()["hardware"]


def test_without_gpus_a_row_says_how_long_one_process_takes(workdir):
    plan = with_estimates(make_plan(load_sweep(sweeps_dir() / "demo.yaml", [])), rates={"8k": 1e9})
    *_, whole = summary_rows(plan, [])
    assert whole["budget"] == "sum"
    assert whole["one process"] == text.duration(3600 * sum(cell.estimate.hours for cell in plan.grid))


def test_a_run_is_drawn_at_its_size_and_its_budget_with_the_largest_size_at_the_top(workdir):
    plan, _ = plan_of("demo")
    heads, *lines = (line.split() for line in picture(plan, [], width=200))
    sizes = sorted({cell.num_params for cell in plan.grid}, reverse=True)
    assert [line[0] for line in lines] == [text.count(size) for size in sizes]
    for size, line in zip(sizes, lines, strict=True):
        for budget, drawn in zip(heads[1:], line[1:], strict=True):
            own = [c for c in plan.grid if c.num_params == size and text.flops(c.budget_flops) == budget]
            assert drawn == ("o" * len(own) or ".")


def test_columns_stay_aligned_where_a_column_stands_for_several_budgets():
    cells = [
        SimpleNamespace(num_params=size, budget_flops=1e18 * 2**budget, role=role, is_proof=False)
        for size in (1000, 1700)
        for budget in range(4)
        for role in [None] * 2 + ["tune"] * (size == 1700)
    ]
    plan = SimpleNamespace(grid=cells, cells=cells)
    for width in range(16, 40):
        lines = picture(plan, [], width=width)
        assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= width
        assert drawn_runs(lines) == len(cells)


def drawn_runs(lines):
    places = " ".join(line.split(maxsplit=1)[1] for line in lines[1:]).split()
    if any(place.isdigit() for place in places):
        return sum(int(number) for place in places for number in re.findall(r"\d+", place)) + places.count("P")
    return sum(len(place) for place in places if place != ".")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("demo", []),
        ("isoflop", ["tune=true"]),
        ("mdm_vs_ar", []),
        ("data_constrained", []),
        ("smoke", ["budgets=[1e10]"]),
        ("isoflop", [f"budgets=[{', '.join(f'{1 + number / 10:.1f}e19' for number in range(40))}]", "max_cells=99999"]),
    ],
)
def test_the_picture_fits_any_terminal_and_holds_every_run(workdir, name, settings):
    plan, proof = plan_of(name, *settings)
    for width in (30, 40, 80, 200):
        lines = picture(plan, proof, width=width)
        assert max(map(len, lines)) <= width and len(lines) <= MOST_SIZES + 1
        assert drawn_runs(lines) == len(plan.grid) + len(proof)
        assert "\n".join(lines).isascii()
    assert ("P: proof run" in legend(plan, proof)) == bool(proof)


def test_a_plan_begins_with_its_summary_and_is_plain_in_a_pipe(workdir, stdlib_data, capsys, monkeypatch):
    plan = planned(PlanOptions(target="demo")).plan
    screen.show_plan(with_estimates(plan, rates={"8k": 1e9}), proof=expected_proof(plan))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[1].split() == ["budget", "cells", "N", "tokens", "one", "process"] and out.isascii()
    assert [line.split()[0] for line in lines[2:7]] == ["3e10", "1e11", "3e11", "sum", "proof"]
    assert out.index(" sum ") < out.index(legend(plan, expected_proof(plan))) < out.index(plan.cells[0].cell_id)


@pytest.mark.parametrize("width", [40, 80])
def test_the_summary_fits_a_narrow_terminal(workdir, capsys, monkeypatch, width):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    plan, proof = plan_of("isoflop", *GPUS, "tune=true")
    screen.show_plan(plan, proof=proof)
    summary = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).partition(legend(plan, proof))[0]
    assert "\N{BLACK CIRCLE}" in summary or "+9t" in summary
    assert "\N{MIDDLE DOT}" in summary
    assert max(map(len, summary.splitlines()[1:])) <= width
    assert ("too narrow for" in summary) == (width == 40) and " 199.5" in summary


def test_the_follower_prints_the_states_and_the_new_cells_in_place_of_the_plan(workdir, stdlib_data, capsys):
    sweep = planned(PlanOptions(target="smoke"))
    first, *others = sweep.plan.cells
    write_plan(sweep.folder, dataclasses.replace(with_estimates(sweep.plan), cells=tuple(others)))
    now = {cell.cell_id: CellNow(state=State.PLANNED) for cell in sweep.plan.cells}
    now[first.cell_id] = CellNow(state=State.RUNNING)
    _show_change(sweep, now)
    count = len(now)
    wanted = [f"smoke: {count} cells: 1 running, {count - 1} planned", f"new: {first.cell_id}"]
    assert capsys.readouterr().out.splitlines() == wanted
