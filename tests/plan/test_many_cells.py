"""A definition of more cells than anybody can train is refused before its cells are made."""

import time

import pytest
import yaml
from support.limited import run_limited

from dlm.core.errors import UserError
from dlm.plan.definition import SEED_STEP, load_sweep, parse_sweep
from dlm.plan.grid import make_plan
from dlm.plan.store import read_plan, write_plan

TINY = {
    "name": "tiny",
    "budgets": [1e10, 3e10],
    "convention": "full_masked_head",
    "models": ["4k", "8k"],
    "hardware": {"device": "cpu", "gpus_per_node": 0},
}


def planned(**changes):
    return make_plan(parse_sweep({**TINY, **changes}, "tiny.yaml"), read=lambda node: None)


def test_millions_of_combinations_are_counted_and_not_made(tmp_path):
    keys = ("optimizer.eps", "optimizer.lr", "optimizer.weight_decay")
    vary = {key: [1e-4 + 1e-9 * k for k in range(399)] for key in keys}
    path = tmp_path / "many.yaml"
    path.write_text(yaml.safe_dump({**TINY, "vary": vary}))
    ended = run_limited("dlm.cli", "plan", path, "--dry-run")
    assert "has 254,084,796 combinations of values, and max_cells is 10,000: shorten " in ended.complaint
    assert ended.complaint.endswith(f"{', '.join(keys)}, budgets, or raise max_cells")


@pytest.mark.parametrize(
    ("changes", "number", "longest"),
    [
        ({"seeds": list(range(200_000))}, "800,000", "seeds, budgets, models"),
        ({"budgets": [1e10 + k for k in range(3000)], "models": ["4k"] * 5}, "15,000", "budgets, models"),
        ({"seeds": list(range(60)), "replicates": {"below": 2, "runs": 50}}, "12,000", "seeds, budgets, models"),
    ],
    ids=["seeds", "budgets", "replicates"],
)  # fmt: skip
def test_every_list_counts(changes, number, longest):
    began = time.process_time()
    with pytest.raises(UserError, match=f"has {number} combinations of values.*: shorten {longest}"):
        planned(**changes)
    assert time.process_time() - began < 2


def test_the_number_that_is_compared_is_the_number_of_cells_and_of_those_dropped():
    rule = {"below": 0.5, "runs": 3}
    changes = {
        "seeds": [0, 1],
        "replicates": rule,
        "vary": {"optimizer.lr": [1e-3, 2e-3, 3e-3]},
        "budgets": [1e10, 9e10],
    }
    plan = planned(**changes)
    assert plan.spec.num_combinations() == len(plan.cells) + len(plan.dropped) == 2 * 3 * (2 + 6)
    assert {cell.seed // SEED_STEP for cell in plan.cells} == {0, 1, 2}


def test_max_cells_is_raised_by_its_key_and_changes_no_stored_plan(tmp_path):
    definition = tmp_path / "tiny.yaml"
    definition.write_text(yaml.safe_dump(TINY))
    with pytest.raises(UserError, match="has 4 combinations of values, and max_cells is 3"):
        make_plan(load_sweep(definition, ["max_cells=3"]), read=lambda node: None)
    usual, raised = planned(), planned(max_cells=20_000)
    assert "max_cells" not in usual.spec.plain() and raised.spec.plain()["max_cells"] == 20_000
    assert usual.spec.identity() == raised.spec.identity()
    assert [cell.cell_id for cell in usual.cells] == [cell.cell_id for cell in raised.cells]
    write_plan(tmp_path / "tiny", usual)
    write_plan(tmp_path / "tiny", raised)
    assert read_plan(tmp_path / "tiny").spec.max_cells == 20_000
