"""Steps, warm-up and accumulation from a budget: no FLOP and no sequence is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm.core.checks import whole
from dlm.core.configs import load_base, load_choice, merge, nest
from dlm.core.errors import UserError
from dlm.core.flops import CONVENTIONS
from dlm.core.recipe import accumulation, derive, fill
from dlm.plan.grid import cell_config

GROUPS = {"model": "8k", "data": "stdlib", "objective": "masked_diffusion", "optimizer": "adamw", "scheduler": "cosine"}


def config(**overrides):
    return cell_config(GROUPS, {key.replace("__", "."): value for key, value in overrides.items()})


@given(per_device=st.integers(1, 600), world_size=st.integers(1, 64), limit=st.integers(1, 600))
def test_the_chosen_micro_batch_drops_no_sequence(per_device, world_size, limit):
    batch = per_device * world_size
    micro, times = accumulation(batch_size=batch, micro_batch_size=None, world_size=world_size, limit=limit)
    assert micro * times * world_size == batch
    assert micro <= limit
    larger = range(micro + 1, min(limit, per_device) + 1)
    assert all(per_device % size for size in larger)  # the largest that divides


@given(batch=st.integers(1, 600), micro=st.integers(1, 64), world_size=st.integers(1, 16))
def test_a_micro_batch_of_the_config_is_used_or_refused(batch, micro, world_size):
    arguments = {"batch_size": batch, "micro_batch_size": micro, "world_size": world_size, "limit": 9}
    if batch % (micro * world_size) == 0:
        assert accumulation(**arguments) == (micro, batch // micro // world_size)
        return
    with pytest.raises(UserError) as error:
        accumulation(**arguments)
    assert str(batch) in str(error.value) and "data." in str(error.value)


@given(budget=st.floats(1e9, 1e14), convention=st.sampled_from(CONVENTIONS), batch=st.integers(1, 64))
def test_a_budget_is_kept_within_one_step(budget, convention, batch):
    nodes = config(training__budget=budget, training__convention=convention, data__batch_size=batch)
    recipe = derive(nodes)
    assert recipe.tokens == recipe.steps * batch * 128 == recipe.steps * recipe.tokens_per_step
    if recipe.steps:
        assert recipe.flops[convention] <= budget * (1 + 1e-12)
        assert -100 / recipe.steps <= recipe.budget_error_pct <= 1e-9
        assert recipe.flops["6n"] < recipe.flops["full_masked_head"] < recipe.flops["full"]


def test_steps_take_precedence_over_a_budget():
    nodes = config(training__budget=1e19)
    nodes["training"]["steps"] = 123
    recipe = derive(nodes)
    assert (recipe.steps, recipe.budget_flops, recipe.budget_error_pct) == (123, None, None)
    assert recipe.warmup_steps == 61  # at most half of a run


@pytest.mark.parametrize("value", [0, -3, 2.5, "8", True, None])
def test_a_value_that_is_no_whole_number_is_refused(value):
    with pytest.raises(UserError, match=r"data\.batch_size is .*whole number"):
        whole("data.batch_size", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused(value):
    with pytest.raises(UserError, match=r"data\.batch_size is .*whole number"):
        whole("data.batch_size", value)


def test_a_whole_float_is_a_whole_number():
    assert whole("data.batch_size", 8.0) == 8 and isinstance(whole("data.batch_size", 8.0), int)


def test_a_config_that_makes_no_run_is_refused():
    for changes, words in (
        ({"data__block_size": 512}, "data.block_size 512 is longer than the model's block of 256"),
        ({"training__budget": None}, "neither training.budget"),
        ({"training__convention": "5n"}, "training.convention '5n'"),
        ({"objective__name": "masked"}, "objective.name 'masked': did you mean masked_diffusion"),
        ({"optimizer__lr": -1.0}, "optimizer.lr is -1.0"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr is nan"),
        ({"scheduler__warmup_fraction": 1.5}, "scheduler.warmup_fraction is 1.5: it must be a number from 0 to 1"),
        ({"objective__eps": 0}, "objective.eps is 0"),
        ({"validation__draws": 1}, "validation.draws is 1"),
        ({"data__batch_size": 2.5}, "data.batch_size is 2.5"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(UserError) as error:
            derive(config(**changes))
        assert words in str(error.value)


def big(**overrides):
    """A config of which the recipe still has to fill in the batch size and the learning rate."""
    groups = {**GROUPS, "model": "170M", "data": "slim_pajama"}
    composed = load_base() | {group: load_choice(group, choice) for group, choice in groups.items()}
    keys = {"training.budget": 1e19, **{key.replace("__", "."): value for key, value in overrides.items()}}
    return merge(composed, nest(keys))


def test_recipes_fill_what_is_null_and_nothing_else():
    smdm = fill(big())
    assert (smdm["data"]["batch_size"], smdm["optimizer"]["lr"]) == (256, 2e-4)
    tokens = 1e19 / 6 / 169_897_728  # 9.81e9
    law = fill(big(recipe="power_law"))
    assert law["data"]["batch_size"] == 256  # 3.614e-3 x 9.81e9^.8179 = 536,700 tokens, 262 sequences
    assert abs(3.614e-3 * tokens**0.8179 / 2048 - 262) < 1
    assert law["optimizer"]["lr"] == pytest.approx(2.83e-3, rel=2e-3)  # 1.79 x 169.9e6^-.713 x 9.81e9^.307
    assert fill(big(recipe="power_law", training__budget=1e21))["data"]["batch_size"] % 16 == 0
    assert fill(big(recipe="power_law", training__budget=1e16))["data"]["batch_size"] == 1
    own = {"data__batch_size": 24, "optimizer__lr": 7e-3}
    for name in ("smdm", "power_law"):
        kept = fill(big(recipe=name, **own))
        assert (kept["data"]["batch_size"], kept["optimizer"]["lr"]) == (24, 7e-3)
        assert fill(kept) == kept
    assert big()["optimizer"]["lr"] is None  # what was given is left as it was


def test_the_power_law_counts_tokens_by_the_convention_of_the_budget():
    a, b = (fill(big(recipe="power_law", training__convention=name)) for name in ("6n", "full"))
    ratio = 1.478  # full FLOPs over 6N at 170M
    assert a["optimizer"]["lr"] / b["optimizer"]["lr"] == pytest.approx(ratio**0.307, rel=1e-3)


def test_a_recipe_that_cannot_be_followed_is_refused():
    with pytest.raises(UserError, match="recipe 'power': did you mean power_law"):
        fill(big(recipe="power"))
    without_budget = {**big(recipe="power_law"), "training": {"budget": 1e19, "steps": 100, "convention": "6n"}}
    with pytest.raises(UserError, match=r"recipe power_law follows from training\.budget.*data\.batch_size and"):
        fill(without_budget)
