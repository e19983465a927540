from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_surface


def fit(frame, **options):
    scale = options.pop("scale", (1.0, 1.0))
    return fit_surface(frame["params"] / scale[0], frame["tokens"] / scale[1], frame["loss"], **options)


def check(result, objective=None, rel=1e-4, **params):
    for name, value in params.items():
        assert result.params[name] == pytest.approx(value, rel=rel), name
    if objective is not None:
        assert result.value == pytest.approx(objective, rel=1e-5)


def test_besiroglu_s_points_give_their_published_law(epoch):
    result = fit(epoch)
    check(result, 1.0182740178e-3, A=477.83, B=2143.42, E=1.81722, alpha=0.347310, beta=0.367172)
    assert result.allocation.a == pytest.approx(0.51390, abs=1e-5)
    assert result.allocation.how.startswith("closed form")


def test_absolute_errors_give_the_published_numbers(epoch):  # 482.01, 2085.43 in the paper
    check(fit(epoch, norm="l1"), rel=3e-4, A=482.01, B=2085.43, E=1.81686, alpha=0.34781, beta=0.36585)


def test_the_points_that_were_left_out_move_beta(reference):
    check(fit(reference("epoch_chinchilla.csv")), beta=0.45305, E=1.89134)


def test_points_below_1e21_flops_give_the_published_laws(epoch):
    low = epoch[epoch["flops"] < 1e21]
    assert len(low) == 217
    squares = fit(low, norm="mse", space="raw", scale=(1e6, 1e9))
    check(squares, E=1.90509, A=4.00052, B=1.05095, alpha=0.35106, beta=0.45874)
    assert squares.value == pytest.approx(0.062414, abs=1e-6)
    check(fit(low, norm="mse"), E=1.89259, alpha=0.35224, beta=0.44297)


def test_squares_of_the_240_points_give_the_published_law(epoch):
    result = fit(epoch, norm="mse", space="raw")
    check(result, E=1.88281, A=567.81, B=7581.85, alpha=0.35762, beta=0.42762)
    assert result.value == pytest.approx(0.083204, abs=1e-6)


def test_the_fit_lies_below_the_best_of_the_published_grid(reference):  # 1.62314e-3 is the best on a grid of .01
    result = fit(reference("isoflop_ml_scalefit.csv"), space="raw", scale=(1e6, 1e9))
    assert result.value <= 1.62314e-3
    check(result, rel=0.01, alpha=0.37, beta=0.40)


def test_llama_3_gives_the_published_surface(reference):
    result = fit(reference("isoflop_llama_3_raw_loss.csv"), norm="mse", space="raw")
    check(result, E=0.60467, A=59.14, B=155.11, alpha=0.31001, beta=0.31364)


@pytest.mark.parametrize(("source", "vp", "huber"), [("arm", 0.5098, 0.5241), ("mdm", 0.5092, 0.4959)])
def test_masked_diffusion_points_give_the_known_exponents(reference, source, vp, huber):
    frame = reference("mdm_prime_v2_isoflop.csv")
    frame = frame[frame["source"].str.endswith(f":{source}")]
    squares, robust = fit(frame, norm="mse", space="raw"), fit(frame)
    assert squares.allocation.a == pytest.approx(vp, abs=1e-4)
    assert robust.allocation.a == pytest.approx(huber, abs=1e-4)
    if source == "mdm":
        assert (squares.params["E"], robust.params["E"]) == pytest.approx((2.348, 2.427), abs=1e-3)
        assert robust.value == pytest.approx(4.45244e-4, rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    floor=st.floats(0.5, 3),
    alpha=st.floats(0.2, 0.7),
    beta=st.floats(0.2, 0.7),
    norm=st.sampled_from(["huber", "mse"]),
    space=st.sampled_from(["log", "raw"]),
)
def test_any_law_is_found_again_without_noise(world, floor, alpha, beta, norm, space):
    truth = replace(world, E=floor, A=0.5 * 1e8**alpha, B=0.5 * 1e10**beta, alpha=alpha, beta=beta)
    n, d, loss, c = truth.grid(np.geomspace(1e18, 1e21, 4), sizes=7)
    result = fit_surface(n, d, loss, norm=norm, space=space, budget=c)
    check(result, rel=1e-5, E=floor, A=truth.A, B=truth.B, alpha=alpha, beta=beta)
    assert abs(result.holdout["without_top_1"]["L_error"]) < 1e-6


def test_a_surface_is_exact_where_parabolas_are_biased(world):
    n, d, loss, _ = world.grid(np.geomspace(1e17, 1e21, 5))
    result = fit_surface(n, d, loss, norm="mse", space="raw", at=[1e24])
    check(result, rel=1e-9, E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
    best = result.at[1e24]
    assert pytest.approx(world.best(1e24), rel=1e-8) == (best.N, best.D)


def test_a_weight_of_two_counts_a_point_twice(world):
    n, d, loss, _ = world.grid([1e18, 1e19, 1e20], sigma=0.01, sizes=6)
    twice = [np.concatenate([v, v[:5]]) for v in (n, d, loss)]
    weights = np.where(np.arange(len(n)) < 5, 2.0, 1.0)
    assert fit_surface(n, d, loss, weights=weights).params == pytest.approx(fit_surface(*twice).params, rel=1e-6)


def test_holdout_sees_a_law_that_bends(world):
    n, d, loss, c = world.grid(np.geomspace(1e18, 1e21, 4), sizes=7)
    bent = np.where(c == c.max(), 1.02 * loss, loss)
    held = fit_surface(n, d, bent, budget=c).holdout["without_top_1"]
    assert held["L_error"] == pytest.approx(1 / 1.02 - 1, abs=1e-6)
    assert (held["num_held_out"], held["from_flops"]) == (7, c.max())


def warned(result, words):
    return any(words in warning for warning in result.warnings)


def test_warnings_name_what_the_points_do_not_determine(world):
    n, d, loss, _ = world.grid([1e18, 1e19, 1e20], sizes=6)
    assert fit_surface(n, d, loss).status == "ok"
    floorless = fit_surface(n, d, loss - 1.69)
    assert floorless.status == "warned"
    assert warned(floorless, "E, the loss that no run gets below, came out at zero")
    line = np.geomspace(1e7, 1e9, 9)
    assert warned(fit_surface(line, 20 * line, world.loss(line, 20 * line)), "one ratio of tokens to parameters")
    beyond = fit_surface(n, d, loss, at=[1e21])
    assert beyond.status == "ok" and "beyond the highest C used" in beyond.notes[0]


BAD = [
    ({"law": "skalling"}, "unknown law 'skalling': did you mean skaling"),
    ({"norm": "hubber"}, "did you mean huber"),
    ({"space": "linear"}, "allowed: log, raw"),
    ({"delta": 0.0}, "delta is 0"),
    ({"flops": [1.0]}, "flops has 1 values but loss has 7"),
    ({"weights": [-1.0] * 7}, "weights"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_options_that_do_not_exist_are_refused(options, words):
    n = np.geomspace(1e6, 1e8, 7)
    with pytest.raises(UserError, match=words):
        fit_surface(n, n[::-1] * 20, 2 + n**-0.3, **options)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (np.linspace(3, 2, 5), "5 points cannot fit 5 parameters of chinchilla: give 6 or more, or pin"),
        ([2.0] * 7, "every loss is 2: nothing to fit"),
        ([2.0] * 6 + [np.nan], r"loss\[6\] is nan"),
        (np.arange(1.0, 8), "does not fall"),
    ],
)
def test_points_without_a_law_are_refused(loss, words):
    n = np.geomspace(1e6, 1e8, len(loss))
    with pytest.raises(UserError, match=words):
        fit_surface(n, n * np.linspace(20, 40, len(n)), loss)


@settings(max_examples=4, deadline=None)  # each run of the tests draws other examples
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(6, 20),
    kind=st.integers(0, 4),
    norm=st.sampled_from(["huber", "mse", "l1"]),
)
def test_any_numbers_give_a_result_or_a_user_error(seed, size, kind, norm):
    rng = np.random.default_rng(seed)
    n, d = np.exp(rng.uniform(8, 20, size)), np.exp(rng.uniform(10, 25, size))
    noise = rng.normal(0, 1, size)
    loss = [np.exp(1 + noise), 2 + 1e-6 * noise, 2 + noise**2 / n**0.3, rng.choice([2.0, 3.0], size), np.exp(5 * noise)]
    try:
        result = bootstrap(
            fit_surface(n, d, loss[kind], norm=norm, space=["log", "raw"][seed % 2], at=[1e15]), replicates=100
        )
    except UserError:
        return
    assert np.isfinite(result.value)
    assert result.status == "warned" or np.isfinite(result.at[1e15].N)
    assert result.report()
