"""Learning rates against their closed forms and PyTorch's own schedules."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlm.core.errors import UserError
from dlm.core.schedule import SHAPES, Rates, multiplier, rates_of, warmup_steps

names = st.sampled_from(sorted(SHAPES))


@given(name=names, steps=st.integers(20, 5000), fraction=st.floats(0, 1), minimum=st.integers(0, 200),
       min_ratio=st.floats(0, 1), decay=st.floats(0.01, 1))  # fmt: skip
def test_a_schedule_rises_to_the_peak_and_falls_to_the_end(name, steps, fraction, minimum, min_ratio, decay):
    warmup = warmup_steps(steps, fraction=fraction, minimum=minimum)
    assert 0 <= warmup <= steps // 2
    shape = {"name": name, "steps": steps, "warmup": warmup, "min_ratio": min_ratio, "decay_fraction": decay}
    rates = [multiplier(step, **shape) for step in range(steps)]
    assert all(rate > 0 for rate in rates[:-1]) or min_ratio == 0
    up, down = rates[: warmup + 1], rates[warmup:]
    assert all(a < b for a, b in itertools.pairwise(up))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(down))
    assert rates[warmup] == pytest.approx(1) and max(rates) <= 1 + 1e-12
    assert rates[-1] == pytest.approx(min_ratio, abs=1e-9)
    assert multiplier(steps + 5, **shape) == pytest.approx(min_ratio, abs=1e-9)  # never beyond


def test_the_warm_up_is_that_of_smdm():
    assert warmup_steps(18710, fraction=0.01, minimum=100) == 188  # 1 % of the steps
    assert warmup_steps(5000, fraction=0.01, minimum=100) == 100
    assert warmup_steps(40, fraction=0.01, minimum=100) == 20  # a short run still decays


def test_a_warm_up_in_tokens_per_parameter_depends_on_the_model_and_not_on_the_length():
    relative = {"warmup_fraction": 0.01, "warmup_min_steps": 100}
    per_param = {**relative, "warmup_tokens_per_param": 2}
    sizes = {"num_params": 33_000, "tokens_per_step": 1024}
    assert {rates_of(per_param, steps=steps, **sizes).warmup for steps in (1000, 18710, 10**6)} == {65}  # 66,000 tokens
    assert rates_of(per_param, steps=10**6, num_params=330_000, tokens_per_step=1024).warmup == 645
    assert rates_of(per_param, steps=40, **sizes).warmup == 20  # a short run still decays
    assert rates_of({**per_param, "warmup_tokens_per_param": 0}, steps=1000, **sizes).warmup == 0
    for scheduler in (relative, {**relative, "warmup_tokens_per_param": None}):
        assert rates_of(scheduler, steps=18710, **sizes).warmup == 188


def test_the_cosine_of_smdm_is_that_of_pytorch():
    steps, warmup, peak = 400, 40, 2e-4
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=peak)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - 1 - warmup, eta_min=peak / 10)
    for step in range(warmup, steps):
        ours = peak * multiplier(step, name="cosine", steps=steps, warmup=warmup, min_ratio=0.1)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        peer.step()


def test_wsd_is_constant_and_then_falls_as_one_minus_a_root():
    rates = [multiplier(s, name="wsd", steps=1001, warmup=0, min_ratio=0.0, decay_fraction=0.2) for s in range(1001)]
    assert rates[:800] == [1.0] * 800
    for into in (0.25, 0.5, 0.75):
        assert rates[800 + round(200 * into)] == pytest.approx(1 - math.sqrt(into))


@given(steps=st.integers(20, 10**6), warmup=st.floats(0, 0.5), decay=st.floats(1e-3, 1), min_ratio=st.floats(0, 0.9))
def test_the_last_constant_step_of_wsd_is_found(steps, warmup, decay, min_ratio):
    shape = {"name": "wsd", "min_ratio": min_ratio, "decay_fraction": decay}
    rates = Rates(config=shape, steps=steps, warmup=int(warmup * steps))
    last = rates.last_held()
    assert rates.warmup <= last < steps - 1 and rates.multiplier(last) == 1 > rates.multiplier(last + 1)
    assert not Rates(config={**shape, "name": "cosine"}, steps=steps, warmup=0).holds(last)


def test_the_linear_schedule_is_a_straight_line():
    rates = [multiplier(s, name="linear", steps=101, warmup=0, min_ratio=0.2) for s in range(101)]
    assert rates == pytest.approx([1 - 0.8 * s / 100 for s in range(101)])


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match=r"scheduler\.name 'cosin': did you mean cosine"):
        multiplier(0, name="cosin", steps=10, warmup=0, min_ratio=0)
