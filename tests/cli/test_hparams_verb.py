"""`dlm hparams` on a table of runs, as a user types it."""

import json

import numpy as np
import pandas as pd
import pytest
from support.demo_runs import demo_runs
from typer.testing import CliRunner

from dlm.cli import verbs
from dlm.cli.fits import fits_of
from dlm.core.errors import UserError


@pytest.fixture
def runs(tmp_path):
    rows = [
        {"params": n, "tokens": d, "learning_rate": rate, "optimizer": "adamw", "objective": "masked_diffusion"}
        | {"loss": 3 * np.exp(0.01 * np.log(rate / (10 * n**-0.5 * d**-0.1)) ** 2)}
        for n, d in ((1e6, 1e8), (1e7, 1e8), (1e7, 1e9))
        for rate in 10 * n**-0.5 * d**-0.1 * np.array([0.3, 0.6, 1.2, 2.4])
    ]
    path = tmp_path / "runs.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def dlm(*arguments):
    return CliRunner().invoke(verbs.app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def test_the_recipe_is_written_and_is_the_law_of_the_runs(runs, tmp_path):
    said = dlm("hparams", runs, "--out", tmp_path / "recipe.json")
    assert said.exit_code == 0 and f"recipe: {tmp_path / 'recipe.json'}" in said.output
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["lr"] == pytest.approx({"log": np.log(10), "params": -0.5, "tokens": -0.1}, rel=1e-6)
    assert recipe["range"] == {"params": [1e6, 1e7], "tokens": [1e8, 1e9]} and recipe["batch_tokens"] is None
    assert (recipe["format"], recipe["objective"], recipe["optimizer"]) == ("dlm-recipe-1", "masked_diffusion", "adamw")
    assert recipe["runs"] == 12 and str(runs) in recipe["source"]


def test_json_has_the_laws_with_their_intervals_and_the_cells(runs):
    shown = json.loads(dlm("hparams", runs, "--json", "--bootstrap", 100).output)
    assert shown["laws"]["lr"]["ci"]["params"] == pytest.approx([-0.5, -0.5], abs=1e-3) and len(shown["cells"]) == 3


def test_a_mistake_is_one_line_before_anything_is_written(runs, tmp_path):
    with pytest.raises(UserError, match="replicates is 5, seed 0: give 100 or more"):
        raise dlm("hparams", runs, "--bootstrap", 5, "--out", tmp_path / "recipe.json").exception
    assert not (tmp_path / "recipe.json").exists()


def test_the_report_of_a_sweep_fits_its_tuning_runs_too():
    runs = demo_runs(budgets=(3e11,)).assign(learning_rate=1e-2, global_batch_size=8, block_size=128)
    runs = runs[runs["model"].isin(["17k", "33k", "66k", "131k"])]
    best = runs.sort_values("loss").iloc[[0]]
    rates = [
        best.assign(role="tune", run_id=f"tune-{rate}", learning_rate=rate, loss=best["loss"] * (1 + cost))
        for rate, cost in ((5e-3, 0.01), (2e-2, 0.01), (4e-2, 0.04))
    ]
    fitted = fits_of(pd.concat([runs, *rates]))["masked_diffusion/isoflop"]
    assert fitted.n == 4 and fitted.tuning["num_tuning"] == 3
