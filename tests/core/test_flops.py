"""FLOPs per token against the published column, and budgets against the steps they pay for."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.smdm_table import BUDGETS, SMDM

from dlm.core.errors import UserError
from dlm.core.flops import (
    CONVENTIONS,
    all_conventions,
    budget_to_steps,
    check_budget,
    check_convention,
    flops_per_token,
)
from dlm.core.objectives import OBJECTIVES
from dlm.core.shape import load_shape

DIFFUSION, CAUSAL = OBJECTIVES["masked_diffusion"], OBJECTIVES["autoregressive"]


@pytest.mark.parametrize("size", SMDM, ids=lambda size: size.name)
def test_the_published_ratio_of_full_to_6n_and_the_published_steps(size):
    shape = load_shape(size.name)
    count = {
        name: flops_per_token(shape, convention=name, block_size=2048, objective=DIFFUSION) for name in CONVENTIONS
    }
    assert count["6n"] == 6 * size.num_params and count["6n_total"] == 6 * size.num_params_total
    assert round(float(count["full"] / count["6n"]), 3) == size.full_over_6n
    assert tuple(budget_to_steps(C, count["6n"], 256 * 2048) for C in BUDGETS) == size.steps


def test_the_conventions_differ_by_attention_and_head():
    shape, T = load_shape("170M"), 2048
    heads = 6 * 32000 * shape.n_embd
    attention = 12 * shape.n_layer * shape.n_embd * T
    both = {
        one.causal: {name: flops_per_token(shape, convention=name, block_size=T, objective=one) for name in CONVENTIONS}
        for one in (DIFFUSION, CAUSAL)
    }
    assert both[False]["full"] - both[True]["full"] == attention / 2  # a causal model looks at half of the pairs
    assert both[True]["full_masked_head"] == both[True]["full"]  # next-token loss needs every logit
    masked_rate = Fraction(1, 2) * (1 + Fraction(1, 1000))  # mean of (1 - eps) t + eps
    assert both[False]["full"] - both[False]["full_masked_head"] == heads * (1 - masked_rate)
    assert both[False]["6n_total"] - both[True]["6n_total"] == 6 * shape.n_embd
    total = all_conventions(shape, tokens=1000, block_size=T, objective=DIFFUSION)
    assert total == {name: float(1000 * value) for name, value in both[False].items()}


@given(
    budget=st.floats(1e6, 1e24),
    name=st.sampled_from([size.name for size in SMDM] + ["4k", "410k"]),
    convention=st.sampled_from(CONVENTIONS),
    objective=st.sampled_from([DIFFUSION, CAUSAL]),
    tokens=st.integers(1, 10**7),
)
def test_a_budget_pays_for_its_steps_and_not_for_one_more(budget, name, convention, objective, tokens):
    cost = flops_per_token(load_shape(name), convention=convention, block_size=128, objective=objective) * tokens
    steps = budget_to_steps(budget, cost / tokens, tokens)
    assert steps * cost <= Fraction(budget) < (steps + 1) * cost
    assert budget_to_steps(float(steps * cost), cost / tokens, tokens) in (steps - 1, steps)  # float's own rounding


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf, "much", "", None, True, False, [1e19], "nan"])
def test_a_value_that_is_no_budget_is_refused(value):
    with pytest.raises(UserError, match=r"training\.budget is .*above zero"):
        check_budget(value)


@given(st.floats(min_value=1e-3, max_value=1e30))
def test_a_number_or_its_text_is_a_budget(value):
    assert check_budget(value) == value == check_budget(repr(value))


def test_an_unknown_convention_is_refused_with_its_close_match():
    assert check_convention("full_masked_head") == "full_masked_head"
    with pytest.raises(UserError, match=r"training\.convention '6N': did you mean 6n"):
        check_convention("6N")
