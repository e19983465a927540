"""Sweeps with shared trunks: which cell branches off which, what is refused, and what it saves."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from dlm.core.errors import UserError
from dlm.core.paths import PACKAGE
from dlm.core.recipe import derive
from dlm.plan.cost import with_estimates
from dlm.plan.definition import parse_sweep
from dlm.plan.grid import cell_config, make_plan
from dlm.plan.sharing import SHARED_NOISE, sharing
from dlm.plan.store import read_plan, write_plan

DEFINITION = {
    "name": "tiny",
    "budgets": [3e10, 9e10, 2.7e11],
    "convention": "full_masked_head",
    "models": ["4k", "8k", "19k"],
    "groups": {"data": "stdlib", "trainer": "cpu", "scheduler": "wsd"},
    "set": {"optimizer.lr": 3e-3, "scheduler.warmup_tokens_per_param": 0.5, "validation.times": 2},
    "hardware": {"device": "cpu", "gpus_per_node": 0},
    "branches": True,
}


def spec(**changes):
    return parse_sweep({**DEFINITION, **changes}, "tiny.yaml")


def refused(**changes) -> str:
    with pytest.raises(UserError) as error:
        make_plan(spec(**changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def rates(cell):
    return derive(cell_config(cell.groups, cell.overrides)).rates


def test_a_branch_starts_at_the_last_step_at_which_its_learning_rate_is_that_of_the_trunk(stdlib_data):
    plan = make_plan(spec())
    by_id = {cell.cell_id: cell for cell in plan.cells}
    trunks = {cell.model: cell for cell in plan.cells if cell.budget_flops == 2.7e11}
    assert len(trunks) == 3 and all(cell.parent is None is cell.branch_step for cell in trunks.values())
    branches = [cell for cell in plan.cells if cell.parent is not None]
    assert len(branches) == 6
    for cell in branches:
        trunk = by_id[cell.parent]
        assert trunk is trunks[cell.model] and trunk.warmup_steps == cell.warmup_steps
        own, its, last = rates(cell), rates(trunk), cell.branch_step
        assert all(own.multiplier(step) == its.multiplier(step) for step in range(last + 1))
        assert own.multiplier(last + 1) < its.multiplier(last + 1)
        assert last == pytest.approx(0.9 * cell.steps, abs=0.02 * cell.steps)


def test_sharing_changes_no_id(stdlib_data):
    shared, apart = make_plan(spec()), make_plan(spec(branches=False))
    assert [replace(cell, parent=None, branch_step=None) for cell in shared.cells] == list(apart.cells)
    assert "branches" not in apart.to_json(estimates=False)["spec"]
    assert apart.to_json(estimates=True)["cells"][0].keys() & {"parent", "branch_step"} == set()
    assert shared.to_json(estimates=True)["cells"][0]["parent"] == shared.cells[6].cell_id


def test_only_cells_that_differ_in_their_budget_alone_share_a_trunk(stdlib_data):
    varied = {"seeds": [0, 1], "vary": {"optimizer.lr": [1e-3, 3e-3], "data.batch_size": [4, 8]},
              "set": {"scheduler.warmup_tokens_per_param": 0.5}}  # fmt: skip
    plan = make_plan(spec(objectives=["masked_diffusion", "autoregressive"], models=["8k"], **varied))
    by_id = {cell.cell_id: cell for cell in plan.cells}
    assert sum(cell.parent is None for cell in plan.cells) == 16 and len(plan.cells) == 48
    for cell in plan.cells:
        trunk = by_id[cell.parent or cell.cell_id]
        for name in ("model", "objective", "seed", "learning_rate", "global_batch_size", "warmup_steps"):
            assert getattr(cell, name) == getattr(trunk, name)
    without_fixed_rate = {"scheduler.warmup_tokens_per_param": 0.5}
    by_recipe = make_plan(spec(set={**without_fixed_rate, "recipe": "power_law"}, models=["8k"]))
    assert len({cell.learning_rate for cell in by_recipe.cells}) == 3
    assert all(cell.parent is None for cell in by_recipe.cells)


def test_the_files_of_cells_say_where_to_start_and_what_to_keep(stdlib_data, tmp_path):
    plan = write_plan(tmp_path, make_plan(spec(models=["8k"])))
    first, second, trunk = (yaml.safe_load((tmp_path / "cell" / f"{c.cell_id}.yaml").read_text()) for c in plan.cells)
    assert first["parent"] == second["parent"] == trunk["planned_cell_id"]
    assert trunk["keep_steps"] == [first["branch_step"], second["branch_step"]] == sorted(trunk["keep_steps"])
    assert "parent" not in trunk and "keep_steps" not in first
    assert read_plan(tmp_path) == plan


def test_a_sweep_that_grows_gets_longer_trunks(stdlib_data, tmp_path):
    write_plan(tmp_path / "at once", make_plan(spec()))
    for order in itertools.permutations(DEFINITION["budgets"]):
        grown = tmp_path / str(order)
        for budget in order:
            plan = write_plan(grown, make_plan(spec(budgets=[budget])))
            for cell in plan.cells:
                (grown / "runs" / cell.cell_id).mkdir(parents=True, exist_ok=True)  # as a run leaves it
        assert (grown / "plan.json").read_bytes() == (tmp_path / "at once/plan.json").read_bytes()
        for path in (grown / "cell").iterdir():
            assert path.read_bytes() == (tmp_path / "at once/cell" / path.name).read_bytes()


def test_a_sweep_may_turn_its_branches_on_and_off_because_no_id_depends_on_them(stdlib_data, tmp_path):
    on = write_plan(tmp_path, make_plan(spec()))
    off = write_plan(tmp_path, make_plan(spec(branches=False)))
    assert [cell.cell_id for cell in on.cells] == [cell.cell_id for cell in off.cells]
    assert any(cell.parent for cell in on.cells) and not any(cell.parent for cell in off.cells)
    assert write_plan(tmp_path, make_plan(spec())) == on


def test_a_definition_that_cannot_share_trunks_is_refused(stdlib_data):
    words = refused(groups={"data": "stdlib", "trainer": "cpu"})
    assert "needs the schedule wsd" in words and "has cosine" in words and "groups.scheduler" in words
    words = refused(set={"optimizer.lr": 3e-3})
    assert "warm-up" in words and "set scheduler.warmup_tokens_per_param" in words


def test_a_warm_up_beyond_a_tenth_of_a_cell_is_refused_with_one_that_is_allowed(stdlib_data):
    def settings(value):
        return {**DEFINITION["set"], "scheduler.warmup_tokens_per_param": value}

    words = refused(set=settings(50))
    longest = next(cell for cell in make_plan(spec(branches=False, set=settings(50))).cells if cell.cell_id in words)
    assert f"takes {longest.warmup_steps} of its {longest.steps} steps, more than 10%" in words
    allowed = float(words.partition("warmup_tokens_per_param to ")[2].split(",")[0])
    plan = make_plan(spec(set=settings(allowed)))
    assert 0.09 < max(cell.warmup_steps / cell.steps for cell in plan.cells) <= 0.1
    refused(set=settings(1.05 * allowed))


def test_the_estimate_of_a_branch_counts_its_own_steps(stdlib_data):
    (branch, _, trunk), (alone, *_) = (
        with_estimates(make_plan(spec(models=["8k"], **changes)), rates={"8k": 1e9}).cells
        for changes in ({}, {"branches": False})
    )
    own = 1 - branch.branch_step / branch.steps
    assert branch.own_share == own and trunk.own_share == 1
    half = (alone.estimate.hours * 3600e9 - alone.flops["full_masked_head"]) / 2  # one of its two validations
    assert branch.estimate.hours * 3600e9 == pytest.approx(own * branch.flops["full_masked_head"] + half)


def test_the_plan_says_what_sharing_saves_and_costs(stdlib_data, command, workdir, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(DEFINITION))
    ended = command("dlm.cli", "plan", str(path), "--dry-run")
    found = sharing(make_plan(spec()).cells)
    assert ended.code == 0 and "6 of 9 cells branch off 3 others" in ended.out
    assert found.flops == pytest.approx((9 + 0.1 * (3 + 1)) / 13, abs=0.01)
    assert f"train {found.flops:.0%} of the FLOPs without sharing" in " ".join(ended.out.split())
    assert f"of equal width takes {found.flops_at_equal_width:.0%}" in " ".join(ended.out.split())
    ended = command("dlm.cli", "plan", str(path), "--dry-run", "--budget", "3e10")
    assert ended.code == 0 and "shared trunks: none" in ended.out


def test_shared_noise_widens_the_interval_and_a_trunk_of_its_own_does_not(stdlib_data):
    cells = make_plan(spec()).cells
    alone = sharing([replace(cell, parent=None, branch_step=None) for cell in cells])
    assert (alone.branches, alone.trunks, alone.flops, alone.width) == (0, 0, 1.0, 1.0)
    assert 1 < sharing(cells).width < (1 + 2 * SHARED_NOISE) ** 0.5  # at most as if all points of a trunk were one
    assert sharing(cells[:4]).width is None  # four cells cannot determine five parameters


def test_a_plan_without_shared_trunks_imports_no_numpy(stdlib_data, workdir):
    code = "import sys; from dlm.cli import main; sys.argv = ['dlm', 'plan', 'smoke', '--dry-run']; import atexit; "
    code += "atexit.register(lambda: print('numpy' in sys.modules, file=sys.stderr)); main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.stderr.split()[-1] == "False", done.stderr
