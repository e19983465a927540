"""A sweep with tuning cells: their role in runs.csv, what is said of them, and the cells that follow their recipe."""

import csv

import pytest
from support.recipes import write_recipe
from support.settled_sweep import SETTINGS, finish, settled_sweep, true_loss

from dlm.cli import gather
from dlm.cli import proof as proof_module
from dlm.cli import start as start_module
from dlm.cli.options import PlanOptions
from dlm.cli.targets import existing, planned
from dlm.cli.tuned import open_ends, warn_open_ends
from dlm.collect.tables import collect
from dlm.plan.store import write_plan

TUNE = ("tune=true", "proof=null")
AWAITING = ("recipe=fitted", "tune=true")


@pytest.fixture(autouse=True)
def folders(stdlib_data, workdir):
    """Data that are prepared, and an empty work directory."""


def test_rows_of_tuning_cells_have_their_role():
    sweep = settled_sweep(*TUNE)
    runs = collect(sweep.folder).runs.set_index("run_id")
    roles = {cell.cell_id: cell.role for cell in sweep.plan.cells}
    assert {name: role if isinstance(role, str) else None for name, role in runs["role"].items()} == roles
    assert sum(role == "tune" for role in roles.values()) == 19


def test_tuning_cells_on_one_side_of_the_best_are_told_with_the_command_that_adds_cells(capsys):
    sweep = settled_sweep(*TUNE)
    for cell in sweep.plan.cells:  # the higher the rate, the lower the loss
        best_batch = 0.01 * (cell.global_batch_size != 8)
        finish(sweep.folder, cell, true_loss(cell.num_params, cell.tokens) + best_batch - cell.learning_rate)
    told = open_ends(sweep)["masked_diffusion"]
    assert [command for _, command in told] == [f"dlm sweep {sweep.folder} --set tune.lr=[0.5,1,2,4]"] * 2
    warn_open_ends(sweep)
    assert capsys.readouterr().err.count("the lowest loss is at the highest learning rate (0.01)") == 2
    grown = planned(PlanOptions(target=str(sweep.folder), settings=["tune.lr=[0.5,1,2,4]"]))
    assert open_ends(grown) == {}  # the new cells are not done
    assert len(grown.plan.cells) == len(sweep.plan.cells) + 6


def test_the_proof_run_takes_the_varied_values_of_the_best_run_of_the_grid():
    sweep = settled_sweep("tune={replicates: 0}", "vary.optimizer.weight_decay=[0.1,0.2]")
    for cell in sweep.plan.cells:
        decays = cell.overrides["optimizer.weight_decay"] == 0.2
        gain = 0.02 if cell.role == "tune" else 0.01 * decays  # the tuning cells have 0.1, the first value
        finish(sweep.folder, cell, true_loss(cell.num_params, cell.tokens) - gain)
    runs = collect(sweep.folder).runs
    assert proof_module._best_varied(sweep, runs, "masked_diffusion") == {"optimizer.weight_decay": 0.2}


def test_a_sweep_whose_recipe_comes_from_its_tuning_cells_goes_on_when_the_recipe_is_there(capsys):
    sweep = settled_sweep(*AWAITING)
    assert proof_module.missing_forecasts(sweep) == []
    gather.report(existing(str(sweep.folder)))
    said = capsys.readouterr().out
    runs, recipe = sweep.folder / "runs.csv", sweep.folder / "recipe.json"
    assert f"`dlm hparams {runs} --out {recipe}`, then repeat the same command" in said
    with runs.open() as stream:
        assert {row["role"] for row in csv.DictReader(stream)} == {"tune"}
    write_recipe(recipe)
    whole = planned(PlanOptions(target=str(sweep.folder)))  # by the name of the folder, without any setting
    new = {cell.cell_id for cell in whole.plan.cells} - {cell.cell_id for cell in sweep.plan.cells}
    assert len(new) == len(whole.plan.cells) - len(sweep.plan.cells) > 10
    assert write_plan(whole.folder, whole.plan).cells == whole.plan.cells
    assert proof_module.missing_forecasts(whole) == ["masked_diffusion"]
    assert start_module.look(whole).keys() == {cell.cell_id for cell in whole.plan.cells}


def test_the_plan_shows_the_recipe_the_batches_and_the_tuning_cells(command, workdir):
    write_recipe(workdir / "recipe.json")
    settings = [word for one in SETTINGS for word in ("--set", one)]
    shown = command(
        "dlm.cli", "plan", "smoke", *settings, "--set", f"recipe={workdir / 'recipe.json'}", "--set",
        "optimizer.lr=null", "--set", "tune=true", "--dry-run",
    ).out  # fmt: skip
    text = " ".join(shown.split())
    assert "fitted to 19 runs: 19 tuning runs" in text and "batches are rounded to whole sequences" in text
    assert "tuning: 19 cells vary learning rate and batch" in text
    assert "untuned" not in text
    assert "untuned: these exponents describe this recipe" in command("dlm.cli", "plan", "smoke", "--dry-run").out
