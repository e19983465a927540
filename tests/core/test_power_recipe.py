"""A recipe.json is read with its checks, and gives the values of its laws."""

import json
import math

import pytest
from support.recipes import LAWS, recipe, write_recipe

from dlm.core.errors import UserError
from dlm.core.power_recipe import POWER_LAW, PowerLaw, read_recipe


def test_the_laws_of_a_file_give_rate_and_batch(tmp_path):
    found = read_recipe(write_recipe(tmp_path / "recipe.json", extra={"interval": [1, 2]}))
    assert found.learning_rate(1e4, 1e6) == pytest.approx(0.2 * 1e4**-0.5 * 1e6**0.05, rel=1e-5)
    assert found.batch_tokens.at(1e4, 1e6) == pytest.approx(2000)
    assert (found.runs, found.objective, found.optimizer, found.range_params) == (
        19,
        "masked_diffusion",
        "adamw",
        (3e3, 1e5),
    )
    only_rate = read_recipe(write_recipe(tmp_path / "rate.json", batch_tokens=None))
    assert only_rate.batch_tokens is None and only_rate.lr is not None


def test_a_rate_has_few_digits_so_that_machines_agree(tmp_path):
    found = read_recipe(write_recipe(tmp_path / "recipe.json"))
    assert all(len(f"{found.learning_rate(n, 3e6):.17g}".strip("0.")) < 12 for n in (4321, 56789))


def test_how_far_outside_its_range_a_run_lies():
    inside = POWER_LAW.factor_outside(1e8, 1e10)
    assert inside == 1
    assert POWER_LAW.factor_outside(6e6, 1e10) == pytest.approx(10)  # N too small
    assert POWER_LAW.factor_outside(1e8, 3e11) == pytest.approx(3)  # D too large
    assert POWER_LAW.factor_outside(3e7, 2e8) == pytest.approx(10)  # the larger of two


def test_a_value_that_no_float_holds_is_infinite():
    assert PowerLaw(factor=1.0, params=10.0, tokens=10.0).at(1e40, 1e40) == math.inf


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "dlm-recipe-2"}, ["format is 'dlm-recipe-2'", "reads dlm-recipe-1"]),
        ({"lr": None, "batch_tokens": None}, ["neither lr nor batch_tokens"]),
        ({"lr": {"log": 1.0, "params": 0.0}}, ["is no recipe", "tokens"]),
        ({"lr": LAWS["lr"] | {"log": 1e5}}, ["lr.log is 100000", "-700 to 700"]),
        ({"batch_tokens": LAWS["batch_tokens"] | {"tokens": 11}}, ["batch_tokens.tokens is 11", "-10 to 10"]),
        ({"range": {"params": [2e5, 1e5], "tokens": [1, 2]}}, ["range.params is [200000, 100000]", "lowest, highest"]),
        ({"range": {"params": [1, 2], "tokens": [0, 2]}}, ["range.tokens is [0, 2]"]),
        ({"runs": "many"}, ["is no recipe", "runs"]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(changes, words, tmp_path):
    path = write_recipe(tmp_path / "recipe.json", **changes)
    with pytest.raises(UserError) as error:
        read_recipe(path)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in [str(path), "dlm hparams", *words]), error.value


def test_a_missing_file_a_missing_key_and_text_that_is_no_json_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json does not exist: `dlm hparams RUNS\.csv --out "):
        read_recipe(tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text('{"format": ')
    with pytest.raises(UserError, match="not valid JSON"):
        read_recipe(tmp_path / "torn.json")
    for key in ("format", "objective", "lr", "batch_tokens", "range", "runs", "source"):
        lacking = recipe()
        del lacking[key]
        (tmp_path / "lacking.json").write_text(json.dumps(lacking))
        with pytest.raises(UserError, match=key):
            read_recipe(tmp_path / "lacking.json")
