"""`tune` and `recipe` of a definition: the cells that tune a recipe, and the cells that follow one."""

import json
import math
from collections import Counter
from pathlib import Path

import hydra
import pytest
import yaml
from support.recipes import LAWS, write_recipe

from dlm import launch as launching
from dlm.cli.tuned import recipe_notes
from dlm.core.errors import UserError
from dlm.core.paths import configs_dir, sweeps_dir
from dlm.fit.result import FitResult
from dlm.plan.definition import load_sweep, parse_sweep, with_settings
from dlm.plan.grid import cell_config, make_plan
from dlm.plan.needs import tokens_needed
from dlm.plan.proof import build_proof, expected_proof
from dlm.plan.recipes import recipe_lines
from dlm.plan.sharing import sharing
from dlm.plan.store import read_plan, write_plan
from dlm.plan.tuning import one_sided, tuning_lines, tuning_sets

TINY = {
    "name": "tiny",
    "budgets": [1e10, 2e10, 4e10],
    "convention": "full_masked_head",
    "models": ["4k", "8k", "19k", "33k", "49k"],
    "groups": {"data": "stdlib", "trainer": "cpu"},
    "set": {"optimizer.lr": 4e-3},
    "hardware": {"device": "cpu", "gpus_per_node": 0},
}
BY_RECIPE = {"set": {}}  # neither the rate nor the batch


@pytest.fixture(autouse=True)
def folders(stdlib_data, workdir):
    """Data that are prepared, and an empty work directory."""


def spec(**changes):
    return parse_sweep({**TINY, **changes}, "tiny.yaml")


def plan(**changes):
    return make_plan(spec(**changes))


def refused(**changes) -> str:
    with pytest.raises(UserError) as error:
        plan(**changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def tuning(found):
    return [cell for cell in found.cells if cell.role == "tune"]


def ids(cells):
    return [cell.cell_id for cell in cells]


# tune


def test_tune_varies_rate_and_batch_at_one_size_of_the_lowest_and_the_highest_budget():
    without, found = plan(), plan(tune=True)
    assert ids(found.cells)[: len(without.cells)] == ids(without.cells)  # the grid stays as it is
    own = [cell for cell in tuning(found) if cell.seed == 0]
    assert {(cell.budget_flops, cell.model) for cell in own} == {
        (1e10, "19k"),
        (4e10, "19k"),
    }  # the middle size in log N
    for budget in (1e10, 4e10):
        varied = {(cell.learning_rate, cell.global_batch_size) for cell in own if cell.budget_flops == budget}
        assert varied == {(r, b) for r in (2e-3, 4e-3, 8e-3) for b in (4, 8, 16)} - {(4e-3, 8)}
    assert all(-100 <= cell.budget_error_pct * cell.steps <= 0 for cell in own)  # the tokens stay, but for one step


def test_three_cells_have_a_second_seed_and_those_of_the_recipe_itself_come_first():
    found = plan(tune=True)
    second = [cell for cell in found.cells if cell.seed == 1000]
    assert [(cell.budget_flops, cell.learning_rate, cell.global_batch_size) for cell in second] == [
        (1e10, 4e-3, 8),
        (4e10, 4e-3, 8),
        (1e10, 2e-3, 4),
    ]
    assert len(plan(tune={"replicates": 0}).cells) == len(found.cells) - 3
    ruled = plan(tune=True, replicates={"below": 2, "runs": 2})  # seed 1000 is taken, so the third seed is added
    assert Counter(cell.seed for cell in ruled.cells)[2000] == 3


def test_what_tune_asks_for_is_what_is_planned():
    own = tuning(plan(tune={"lr": ["1/4", 1], "batch": [1], "at": ["highest"], "models": ["8k"], "replicates": 0}))
    assert [(cell.model, cell.budget_flops, cell.learning_rate, cell.global_batch_size) for cell in own] == [
        ("8k", 4e10, 1e-3, 8)
    ]
    both = plan(objectives=["masked_diffusion", "autoregressive"], tune=True)
    assert Counter(cell.objective for cell in tuning(both)) == {"masked_diffusion": 19, "autoregressive": 19}
    one_budget = plan(budgets=[2e10], tune=True)
    assert Counter(cell.budget_flops for cell in tuning(one_budget)) == {2e10: 11}
    varied = plan(vary={"optimizer.weight_decay": [0.1, 0.2]}, tune=True)
    assert {cell.overrides["optimizer.weight_decay"] for cell in tuning(varied)} == {0.1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune": {"lr": [0.5, 2]}}, ["tune.lr is [0.5, 2.0]", "must hold 1"]),
        ({"tune": {"at": ["middle"]}}, ["tune.at is 'middle'", "lowest or highest"]),
        ({"tune": {"lr": [0, 1]}}, ["tune.lr is 0"]),
        ({"tune": 3}, ["tune is 3", "lr, batch, at, models, replicates"]),
        ({"tune": {"rates": [1]}}, ["unknown key of tune 'rates'"]),
        ({"tune": {"models": ["8k"]}}, ["tune.models names 1 sizes, and tune.at 2 budgets"]),
        ({"tune": {"models": ["8k", "9k"]}}, ["unknown size in tune.models at 4e10 '9k'"]),
        ({"tune": True, "set": {}, "vary": {"optimizer.lr": [1e-3, 2e-3]}}, ["tune.lr and vary.optimizer.lr"]),
        ({"tune": True, "set": {"data.batch_size": 1}}, ["tune.batch: 0.5 and 1 times the 1 sequences", "both give 1"]),
        ({"tune": {"lr": [1, *range(2, 2000)]}}, ["tune.lr is", "at most 1000"]),
        ({"tune": {"lr": [*range(1, 1000)]}, "max_cells": 1000}, ["combinations of values", "shorten", "tune"]),
        ({"tune": {"batch": [1, 100]}}, ["the tuning cell 19k at 1e10 cannot be trained", "fewer than 20"]),
    ],
)
def test_a_tune_that_cannot_be_is_refused_in_one_line(changes, words):
    said = refused(**changes)
    assert all(word in said for word in words), said


def test_a_batch_smaller_than_the_micro_batch_is_one_micro_batch():
    found = plan(set={"optimizer.lr": 4e-3, "data.batch_size": 8, "data.micro_batch_size": 8}, tune=True)
    micro = {cell.global_batch_size: cell.overrides["data.micro_batch_size"] for cell in tuning(found)}
    assert micro == {4: 4, 8: 8, 16: 8}


def test_tuning_cells_are_counted_and_shown_and_a_plan_without_them_is_called_untuned():
    (line,) = tuning_lines(plan(tune=True))
    assert line.startswith("tuning: 19 cells vary learning rate and batch (19k at 1e10 and 19k at 4e10), ")
    assert "% of the FLOPs" in line
    assert tuning_lines(plan())[0].startswith("untuned: these exponents describe this recipe")
    assert tuning_lines(plan(set={}, vary={"optimizer.lr": [1e-3, 2e-3]})) == []
    one_side = tuning_lines(plan(tune={"lr": [1, 2, 4]}))
    assert one_side[1] == "tune.lr has no factor below 1: if the best value lies there, the cells do not enclose it"


def test_the_file_of_a_tuning_cell_composes_to_a_run_with_its_role_and_id(tmp_path):
    found = write_plan(tmp_path / "tiny", plan(tune=True))
    cell = tuning(found)[0]
    assert json.loads((tmp_path / "tiny" / "plan.json").read_text())["cells"][-1]["role"] == "tune"
    assert "role" not in json.loads((tmp_path / "tiny" / "plan.json").read_text())["cells"][0]
    assert tuning(read_plan(tmp_path / "tiny")) == tuning(found)
    assert yaml.safe_load((tmp_path / "tiny" / "cell" / f"{cell.cell_id}.yaml").read_text())["role"] == "tune"
    launching.register()
    with hydra.initialize_config_dir(str(configs_dir()), version_base=None):
        chosen = [f"+cell={cell.cell_id}", f"hydra.searchpath=[file://{tmp_path / 'tiny'}]"]
        config = hydra.compose("config", chosen)
    assert config.role == "tune" and config.cell_id == config.planned_cell_id == cell.cell_id


def test_tune_may_be_added_to_a_sweep_and_moves_with_its_budgets(tmp_path):
    folder = tmp_path / "tiny"
    first = write_plan(folder, plan())
    grown = write_plan(folder, plan(tune=True))
    assert ids(grown.cells)[: len(first.cells)] == ids(first.cells) and len(tuning(grown)) == 19
    for cell in grown.cells:
        (folder / "runs" / cell.cell_id).mkdir(parents=True)
    wider = write_plan(folder, plan(tune=True, budgets=[*TINY["budgets"], 8e10]))
    assert {*ids(grown.cells)} < {*ids(wider.cells)}  # those at 4e10 have started, so they stay
    assert {cell.budget_flops for cell in tuning(wider)} == {1e10, 4e10, 8e10}
    limited = write_plan(folder, plan(tune=True, budgets=[*TINY["budgets"], 8e10], max_epochs=5))
    assert limited.spec.max_epochs == 5  # the tuning cells at 4e10 do not bring the earlier limits back
    assert {*ids(tuning(grown))} < {*ids(write_plan(folder, plan(budgets=[*TINY["budgets"], 8e10])).cells)}


def test_a_proof_run_is_expected_at_the_size_that_the_grid_gives():
    with_proof = {"proof": {"factor": 2}}
    (one,), (other,) = (expected_proof(plan(**with_proof, **more)) for more in ({}, {"tune": {"models": ["4k", "4k"]}}))
    assert one == other


def test_shared_trunks_cost_the_law_the_same_with_tuning_cells():
    keys = {"scheduler.warmup_tokens_per_param": 0.1, "scheduler.decay_fraction": 0.2, "optimizer.lr": 4e-3}
    shared = {
        "groups": {**TINY["groups"], "scheduler": "wsd"},
        "branches": True,
        "set": keys,
        "models": ["4k", "8k", "19k"],
    }
    without, found = (sharing(plan(**shared, **more).cells) for more in ({}, {"tune": {"replicates": 0, "batch": [1]}}))
    assert without.branches > 0 and found.width == pytest.approx(without.width)


def test_cells_whose_batches_differ_need_the_data_once():
    isoflop = load_sweep(sweeps_dir() / "isoflop.yaml")
    (need,) = tokens_needed(isoflop)
    assert need.tokens > max(cell.tokens for cell in make_plan(isoflop, read=lambda node: None).cells)


def test_a_definition_without_the_new_keys_is_stored_as_before():
    stored = plan().to_json(estimates=False)
    assert not {"tune", "recipe"} & {*stored["spec"]} and "recipe" not in stored
    assert not {"role", "batch_target_tokens"} & {*stored["cells"][0]}


def test_settings_of_tune_change_one_key_of_it():
    base = load_sweep(sweeps_dir() / "smoke.yaml", ["tune=true", "tune.lr=[0.25,1,4]"])
    assert base.tune.lr == (0.25, 1, 4) and base.tune.batch == (0.5, 1, 2)
    assert with_settings(base, ["tune.batch=[1]"]).tune.lr == (0.25, 1, 4)
    assert with_settings(base, ["tune=false"]).tune is None


# Tuning cells on one side of the best


def follow_ups(found, loss):
    losses = {
        cell.cell_id: loss(math.log2(cell.learning_rate / 4e-3), math.log2(cell.global_batch_size / 8))
        for cell in found.cells
    }
    return [one for cells in tuning_sets(found) for one in one_sided(found.spec, cells, losses)]


def test_a_best_cell_at_an_end_asks_for_cells_beyond_it():
    found = plan(tune={"at": ["lowest"], "replicates": 0})
    assert follow_ups(found, lambda rate, batch: rate**2 + batch**2) == []
    ((sentence, setting),) = follow_ups(found, lambda rate, batch: (rate - 2) ** 2 + batch**2)
    assert (
        sentence
        == "19k at 1e10: the lowest loss is at the highest learning rate (0.008), so the best one may lie above it"
    )
    assert setting == "tune.lr=[0.5,1,2,4]"
    added = {*ids(make_plan(with_settings(found.spec, [setting])).cells)} - {*ids(found.cells)}
    assert len(added) == 3
    both = follow_ups(found, lambda rate, batch: rate + batch)
    assert [setting for _, setting in both] == ["tune.lr=[0.25,0.5,1,2]", "tune.batch=[0.25,0.5,1,2]"]


def test_cells_with_another_value_of_a_varied_key_are_not_compared():
    found = plan(tune={"at": ["lowest"], "replicates": 0}, vary={"optimizer.weight_decay": [0.1, 0.2]})
    (cells,) = tuning_sets(found)
    assert len(cells) == 9 and {cell.overrides["optimizer.weight_decay"] for cell in cells} == {0.1}


def test_nothing_is_asked_for_before_all_tuning_cells_are_done():
    found = plan(tune=True)
    (cells, _) = tuning_sets(found)
    losses = {cell.cell_id: cell.learning_rate for cell in cells[1:]}
    assert one_sided(found.spec, cells, losses) == []


# recipe


def by_file(path: Path, **changes):
    return {"recipe": str(path), **BY_RECIPE, **changes}


def test_cells_follow_the_laws_of_a_recipe_file(tmp_path):
    found = plan(**by_file(write_recipe(tmp_path / "recipe.json")))
    for cell in found.cells:
        assert cell.learning_rate == pytest.approx(0.2 * cell.num_params**-0.5 * cell.tokens**0.05, rel=2e-3)
        target = 2 * cell.tokens**0.5
        assert cell.batch_target_tokens == pytest.approx(target, rel=0.02)
        assert cell.global_batch_size * 128 == pytest.approx(target, rel=0.13 + 64 / target)
        assert cell.batch_error_pct == pytest.approx(
            100 * (cell.global_batch_size * 128 / cell.batch_target_tokens - 1)
        )
        config = cell_config(cell.groups, cell.overrides)  # the values stand in the cell, which needs no recipe file
        assert config["optimizer"]["lr"] == cell.overrides["optimizer.lr"] == cell.learning_rate
        assert config["data"]["batch_size"] == cell.overrides["data.batch_size"] == cell.global_batch_size
    assert len({cell.learning_rate for cell in found.cells}) == len(found.cells)
    said = recipe_lines(found.spec, found.recipe, found.cells)
    assert "fitted to 19 runs: 19 tuning runs" in said[0] and "batches are rounded to whole sequences" in said[1]
    assert tuning_lines(found) == []  # its exponents are those of a tuned recipe


def test_a_law_that_is_null_leaves_its_value_as_configured(tmp_path):
    rate_only = plan(**by_file(write_recipe(tmp_path / "rate.json", batch_tokens=None)))
    assert {cell.global_batch_size for cell in rate_only.cells} == {8}
    assert {cell.batch_target_tokens for cell in rate_only.cells} == {None}
    batch_only = plan(recipe=str(write_recipe(tmp_path / "batch.json", lr=None)))
    assert {cell.learning_rate for cell in batch_only.cells} == {4e-3}


@pytest.mark.parametrize(("gpus", "micro"), [(3, None), (2, 4), (8, None)])
def test_a_batch_divides_over_the_devices_and_their_micro_batches(gpus, micro, tmp_path):
    law = {"log": math.log(128 * 21), "params": 0.0, "tokens": 0.0}  # 21 sequences
    path = write_recipe(tmp_path / "recipe.json", batch_tokens=law)
    hardware = {"device": "H100", "gpus_per_node": gpus}
    keys = {} if micro is None else {"data.micro_batch_size": micro}
    (batch,) = {cell.global_batch_size for cell in plan(**by_file(path, hardware=hardware, set=keys)).cells}
    assert batch == {3: 21, 2: 24, 8: 24}[gpus]


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"objective": "autoregressive"}, {}, ["a recipe of autoregressive", "trains masked_diffusion"]),
        ({"optimizer": "muon"}, {}, ["for the optimiser muon", "uses adamw"]),
        (
            {},
            {"set": {"optimizer.lr": 1e-3}},
            ["set gives optimizer.lr, and so does the recipe", "--set optimizer.lr=null"],
        ),
        ({}, {"vary": {"data.batch_size": [4, 8]}}, ["vary gives data.batch_size", "remove data.batch_size from vary"]),
        ({"lr": LAWS["lr"] | {"log": 30}}, {}, ["a learning rate of", "from 1e-12 to 10"]),
        (
            {"range": {"params": [1e6, 1e7], "tokens": [1e4, 1e8]}},
            {},
            ["4k at 1e10", "outside the runs of", "beyond 10"],
        ),
        ({"range": {"params": [1e3, 1e5], "tokens": [1e10, 1e11]}}, {}, ["outside the runs of", "beyond 10"]),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_in_one_line(changes, more, words, tmp_path):
    said = refused(**by_file(write_recipe(tmp_path / "recipe.json", **changes), **more))
    assert all(word in said for word in words), said


def test_a_recipe_outside_its_range_is_followed_up_to_a_factor_of_ten_and_the_plan_says_so(tmp_path):
    limits = {"params": [4.2e4, 1e5], "tokens": [1e3, 1e8]}
    smallest = min(cell.num_params for cell in plan().cells)
    near = plan(**by_file(write_recipe(tmp_path / "near.json", range=limits | {"params": [9.9 * smallest, 1e5]})))
    said = recipe_lines(near.spec, near.recipe, near.cells)[1]
    assert said.startswith("outside that range: ") and "by a factor of up to 9.9 (mdm-4k-" in said
    path = write_recipe(tmp_path / "far.json", range=limits | {"params": [10.1 * smallest, 1e5]})
    assert "is a factor of 10.1 outside the runs of" in refused(**by_file(path))
    dropped = plan(**by_file(path, models=["8k", "19k", "33k", "49k"]))  # only cells that are trained count
    assert dropped.cells


def test_a_changed_recipe_never_changes_cells_silently(tmp_path):
    path, folder = tmp_path / "recipe.json", tmp_path / "tiny"
    first = write_plan(folder, plan(**by_file(write_recipe(path))))
    assert ids(write_plan(folder, plan(**by_file(path))).cells) == ids(first.cells)
    write_recipe(path, lr=LAWS["lr"] | {"params": -0.6})
    with pytest.raises(
        UserError, match=r"another definition \(the recipe .* was lr 0\.2 N\^-0\.5 .*, is lr 0\.2 N\^-0\.6 "
    ):
        write_plan(folder, plan(**by_file(path)))
    path.unlink()
    assert ids(read_plan(folder).cells) == ids(first.cells)  # the cells hold their values
    assert "does not exist" in refused(**by_file(path))


def test_a_plan_whose_recipe_nobody_could_have_written_is_refused(tmp_path):
    folder = tmp_path / "tiny"
    write_plan(folder, plan(**by_file(write_recipe(tmp_path / "recipe.json"))))
    stored = json.loads((folder / "plan.json").read_text())
    stored["recipe"]["range_tokens"] = [0, 0]
    (folder / "plan.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"plan\.json: range\.tokens is \[0, 0\].*plan again"):
        read_plan(folder)


def test_the_proof_run_follows_the_recipe_that_the_plan_was_made_with(tmp_path):
    path = write_recipe(tmp_path / "recipe.json")
    write_plan(tmp_path / "tiny", plan(**by_file(path, proof={"factor": 2})))
    path.unlink()
    (cell,), _ = build_proof(read_plan(tmp_path / "tiny"), objective="masked_diffusion", best=25e3, varied={})
    assert cell.learning_rate == pytest.approx(0.2 * cell.num_params**-0.5 * cell.tokens**0.05, rel=2e-3)
    assert cell.batch_target_tokens == pytest.approx(2 * cell.tokens**0.5, rel=0.02)


def test_a_fitted_recipe_comes_from_the_tuning_cells_of_the_same_sweep(workdir):
    fitted = {"recipe": "fitted", "tune": True, "proof": {"factor": 2}}
    assert "add tune: true" in refused(recipe="fitted", set={})
    waiting = write_plan(workdir / "tiny", plan(**fitted))
    assert waiting.waits_for_recipe and {cell.role for cell in waiting.cells} == {"tune"} and len(waiting.cells) == 21
    assert tuning_lines(waiting)[-1] == "the other cells follow when the recipe is fitted to these"
    assert expected_proof(waiting) == []
    write_recipe(workdir / "tiny" / "recipe.json")
    whole = write_plan(workdir / "tiny", plan(**fitted))
    assert not whole.waits_for_recipe and {*ids(waiting.cells)} == {*ids(tuning(whole))}
    assert {cell.learning_rate for cell in tuning(whole)} == {2e-3, 4e-3, 8e-3}  # around the rate under set
    assert len({cell.learning_rate for cell in whole.cells if cell.role is None}) == 15
    assert "set gives optimizer.lr" in refused(recipe="fitted")  # without tuning cells, nothing would use it
    write_recipe(workdir / "tiny" / "recipe.json", lr=LAWS["lr"] | {"log": -1})
    with pytest.raises(UserError, match="another definition"):
        write_plan(workdir / "tiny", plan(**fitted))


# Recipes by name


def test_a_recipe_is_named_at_the_top_as_well_as_under_set(tmp_path):
    named, under_set = plan(recipe="smdm", set={}), plan(set={"recipe": "smdm"})
    assert ids(named.cells) == ids(under_set.cells) and named.recipe is None
    write_plan(tmp_path / "tiny", under_set)
    write_plan(tmp_path / "tiny", named)  # the same definition
    assert "stands at the top and under set" in refused(recipe="smdm", set={"recipe": "smdm"})
    said = refused(recipe="fited")
    assert "recipe is 'fited': allowed are smdm, power_law, fitted, and the path of a recipe.json" in said


def test_a_setting_of_the_recipe_replaces_the_one_under_set():
    base = parse_sweep({**TINY, "set": {"recipe": "power_law"}}, "tiny.yaml")
    assert with_settings(base, ["recipe=smdm"]).recipe == "smdm" and with_settings(base, ["recipe=smdm"]).set == {}


def test_the_published_recipe_of_isoflop_follows_size_and_tokens_and_divides_over_its_devices():
    found = make_plan(load_sweep(sweeps_dir() / "isoflop.yaml"))
    assert all(cell.global_batch_size % 8 == 0 for cell in found.cells)
    by_place = {(cell.model, cell.budget_flops): cell for cell in found.cells}
    short, long = by_place["142M", 3.3333e17], by_place["66M", 1e19]
    assert short.steps > 9000 and long.steps < 25_000  # under SMDM's recipe 748 and 48,496
    assert long.learning_rate == pytest.approx(1.79 * long.num_params**-0.713 * long.tokens**0.307, rel=1e-3)
    assert long.global_batch_size * 2048 == pytest.approx(3.614e-3 * long.tokens**0.8179, rel=0.05)
    smdm = make_plan(load_sweep(sweeps_dir() / "isoflop.yaml", ["recipe=smdm"]))
    assert {(cell.global_batch_size, cell.learning_rate) for cell in smdm.cells} == {(256, 2e-4)}
    lower = make_plan(load_sweep(sweeps_dir() / "isoflop.yaml").with_budgets([3e16, 1e18]))  # batches below 8 sequences
    assert min(cell.global_batch_size for cell in lower.cells) == 8
    assert "outside that range" in recipe_lines(lower.spec, lower.recipe, lower.cells)[1]


def test_a_forecast_of_tuned_runs_says_that_the_proof_run_follows_another_recipe(tmp_path):
    tuned = FitResult(law="isoflop", n=9, status="ok", warnings=(), tuning={"tuned": True})
    untuned = FitResult(law="isoflop", n=9, status="ok", warnings=(), tuning={"tuned": False})
    (said,) = recipe_notes(plan(tune=True), [untuned, tuned])
    assert "counts as an error of the forecast" in said
    assert recipe_notes(plan(tune=True), [untuned]) == []
    fitted = plan(**BY_RECIPE, recipe=str(write_recipe(tmp_path / "recipe.json")))
    assert recipe_notes(fitted, [tuned]) == []
