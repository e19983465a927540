import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm.core.errors import UserError
from dlm.fit import fit_envelope, fit_isoflop
from dlm.fit.isoflop.curves import CURVES
from dlm.fit.isoflop.minima import AXES
from dlm.report import figures

EVERY = [(curve, axis) for curve in CURVES for axis in AXES]


def fit(frame, **options):
    return fit_isoflop(frame["params"], frame["tokens"], frame["loss"], frame["flops"], flops=frame["flops"], **options)


def test_llama_3_gives_the_published_exponents(reference):
    frame = reference("isoflop_llama_3_raw_loss.csv")
    everything = fit(frame, at=[3.8e25])
    assert (everything.allocation.a, everything.allocation.b) == pytest.approx((0.4632, 0.5368), abs=5e-5)
    assert pytest.approx(16.10e12, rel=1e-3) == everything.at[3.8e25].D
    clean = fit(frame[~frame["outlier"]], at=[3.8e25])
    assert clean.allocation.b == pytest.approx(0.5000, abs=5e-5)
    assert pytest.approx(9.81e12, rel=1e-3) == clean.at[3.8e25].D


@pytest.mark.parametrize(
    ("source", "a", "optima"),
    [("arm", 0.5352, [111, 157, 219, 385, 572, 802, 1220]), ("mdm", 0.5673, [55, 76, 97, 182, 239, 412, 734])],
)
def test_masked_diffusion_points_give_the_known_minima(reference, source, a, optima):
    frame = reference("mdm_prime_v2_isoflop.csv")
    result = fit(frame[frame["source"].str.endswith(f":{source}")])
    assert result.allocation.a == pytest.approx(a, abs=5e-5)
    assert [round(m.N / 1e6) for m in result.minima] == optima


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("experiment", "a"),
    [
        ("rw|base|long|kaplan|kaplan|train", 0.8348),
        ("rw|base|long|kaplan|standard|val", 0.7003),  # the last layer counted
        ("rw|base|short|kaplan|standard|val", 0.6055),  # and a short warm-up
        ("rw|base|short|chinchilla|standard|val", 0.5715),  # and cosine decay to the run's own length
        ("rw|tuned|short|const|standard|val", 0.4970),
    ],
)
def test_porian_s_experiments_give_their_published_minima(reference, experiment, a, axis):
    frame = reference("porian_main.csv")
    result = fit(frame[frame["run_id"] == experiment], curve="akima", axis=axis)
    assert result.allocation.a == pytest.approx(a, abs=0.004)
    published = reference("porian_main_published_minima.csv").dropna()
    published = published[published["experiment"] == experiment].set_index("flops")["n_star"]
    assert [m.budget for m in result.usable] == pytest.approx(published.index.tolist())
    ratios = np.log([m.N for m in result.usable] / published.to_numpy())
    assert np.abs(ratios).max() < 0.07  # theirs are the medians of noisy draws
    assert np.median(np.abs(ratios)) < 0.02


@pytest.mark.parametrize(("width", "bias"), [(2, -0.327), (4, -1.301), (8, -2.903), (16, -5.100)])
def test_parabolas_over_wide_ranges_have_the_known_bias(world, width, bias):
    n, d, loss, c = world.grid(np.geomspace(1e17, 1e21, 5), width=width)
    result = fit_isoflop(n, d, loss, c, at=[1e24])
    found = result.at[1e24]
    assert any("the minima may be biased" in w for w in result.warnings) == (width > 4)
    assert 100 * (found.D / world.best(1e24)[1] - 1) == pytest.approx(bias, abs=5e-4)


def parabolas(budgets, *, sizes=6, ratio=1.0):
    """Exact parabolas over log N whose minima follow N* = .1 C^.5, L* = 30 C^-.05; a token costs 6 N ratio."""
    n = np.concatenate([0.1 * c**0.5 * np.geomspace(0.2, 5, sizes) for c in budgets])
    c = np.repeat(budgets, sizes)
    loss = 30 * c**-0.05 + 0.03 * np.log(n / (0.1 * c**0.5)) ** 2
    return n, c / (6 * ratio * n), loss, c


def test_exact_parabolas_give_the_exact_line():
    budgets = np.array([1e18, 1e19, 1e20])
    n, d, loss, c = parabolas(budgets, ratio=1.5)
    result = fit_isoflop(n, d, loss, c, flops=c, at=[1e21])
    expected = {"N0": 0.1, "a": 0.5, "D0": 1 / 0.9, "b": 0.5, "L0": 30.0, "c": -0.05}
    assert result.params == pytest.approx(expected, rel=1e-8)
    assert [m.D * 9 * m.N for m in result.minima] == pytest.approx(budgets, rel=1e-9)
    best = result.at[1e21]
    assert pytest.approx((0.1 * 1e21**0.5, 30 * 1e21**-0.05), rel=1e-8) == (best.N, best.L)
    assert result.holdout["without_top_1"]["N_error"] == pytest.approx(0.0, abs=1e-9)
    assert result.value == pytest.approx(0.0, abs=1e-20)


def exact(curve, axis, *, ratio=1.5, budgets=(1e18, 1e19, 1e20), sizes=7):
    """(N, D, L, C) on exact curves whose minima follow N* = .1 C^.5, L* = 30 C^-.05, none of them at a size tried.

    u is log N / N* (or log D / D*): L* + .03 u^2, that and .004 u^3, and log L* + .01 u^2, which Akima's curve through
    even sizes follows exactly.
    """
    c = np.repeat(budgets, sizes)
    u = np.tile(np.linspace(-1.5, 1.7, sizes), len(budgets))
    n = 0.1 * c**0.5 * np.exp(u if axis == "params" else -u)
    lowest = 30 * c**-0.05
    if curve == "akima":
        loss = lowest * np.exp(0.01 * u**2)
    else:
        loss = lowest + 0.03 * u**2 + (0.004 * u**3 if curve == "cubic" else 0)
    return n, c / (6 * ratio * n), loss, c


EXACT = {"N0": 0.1, "a": 0.5, "D0": 1 / 0.9, "b": 0.5, "L0": 30.0, "c": -0.05}


@pytest.mark.parametrize(("curve", "axis"), EVERY)
def test_exact_curves_of_every_kind_are_recovered(curve, axis):
    n, d, loss, c = exact(curve, axis)
    result = fit_isoflop(n, d, loss, c, flops=c, curve=curve, axis=axis, at=[1e21])
    assert result.params == pytest.approx(EXACT, rel=1e-6)
    assert [m.D * 9 * m.N for m in result.minima] == pytest.approx([1e18, 1e19, 1e20], rel=1e-9)
    assert pytest.approx((0.1 * 1e21**0.5, 1e21**0.5 / 0.9), rel=1e-6) == (result.at[1e21].N, result.at[1e21].D)
    assert result.holdout["without_top_1"]["N_error"] == pytest.approx(0.0, abs=1e-6)
    assert result.value == pytest.approx(0.0, abs=1e-12)
    curvature = {"parabola": 0.03, "cubic": 0.03}.get(curve)
    if curvature:  # what the regret of a wrong size rests on
        assert [m.coefficients[2] for m in result.minima] == pytest.approx([curvature] * 3, rel=1e-6)


@pytest.mark.parametrize("axis", AXES)
def test_a_cubic_is_nearer_the_truth_than_a_parabola(world, axis):
    n, d, loss, c = world.grid(np.geomspace(1e17, 1e21, 5), width=8)
    fits = {k: fit_isoflop(n, d, loss, c, curve=k, axis=axis, at=[1e24]) for k in CURVES}
    bias = {k: abs(found.at[1e24].D / world.best(1e24)[1] - 1) for k, found in fits.items()}
    warned = {k: any("may be biased" in w for w in found.warnings) for k, found in fits.items()}
    assert warned == {"parabola": True, "cubic": False, "akima": False}
    assert bias["cubic"] < 0.1 * bias["parabola"]
    assert bias["akima"] < 0.1 * bias["parabola"]


def noisy(world, seed=0):
    return world.grid([1e18, 3e18, 1e19], sizes=7, width=5, sigma=0.003, seed=seed)


def numbers(result):
    found = [v for m in result.minima for v in (m.N, m.D, m.L)]
    return np.array([*result.params.values(), *found, result.value])


@pytest.mark.parametrize(("curve", "axis"), EVERY)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(21)), seed=st.integers(0, 20))
def test_the_order_of_rows_changes_nothing(world, curve, axis, order, seed):
    columns = noisy(world, seed)
    straight = fit_isoflop(*columns, curve=curve, axis=axis)
    mixed = fit_isoflop(*(v[list(order)] for v in columns), curve=curve, axis=axis)
    assert numbers(mixed) == pytest.approx(numbers(straight), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(("curve", "axis"), EVERY)
@settings(max_examples=10, deadline=None)
@given(doubled=st.sets(st.integers(0, 20), min_size=1), seed=st.integers(0, 20))
def test_a_row_twice_with_half_its_weight_changes_nothing(world, curve, axis, doubled, seed):
    columns, rows = noisy(world, seed), np.r_[np.arange(21), sorted(doubled)]
    weights = np.where(np.isin(rows, sorted(doubled)), 0.5, 1.0)
    once = fit_isoflop(*columns, curve=curve, axis=axis)
    twice = fit_isoflop(*(v[rows] for v in columns), weights=weights, curve=curve, axis=axis)
    assert numbers(twice) == pytest.approx(numbers(once), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(("curve", "axis"), EVERY)
@settings(max_examples=10, deadline=None)
@given(unit=st.sampled_from([1e-3, 1e3, 1e6]), seed=st.integers(0, 20))
def test_the_unit_of_n_changes_only_the_constant(world, curve, axis, unit, seed):
    n, d, loss, c = noisy(world, seed)
    plain = fit_isoflop(n, d, loss, c, flops=c, curve=curve, axis=axis)
    scaled = fit_isoflop(n / unit, d, loss, c, flops=c, curve=curve, axis=axis)
    expected = {**plain.params, "N0": plain.params["N0"] / unit}
    assert scaled.params == pytest.approx(expected, rel=1e-6)
    assert [m.N * unit for m in scaled.minima] == pytest.approx([m.N for m in plain.minima], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(("curve", "axis"), EVERY)
def test_seeds_of_one_size_are_averaged(curve, axis):
    """Two seeds, one heavy and .01 too low, one light and .03 too high, average to the exact curve."""
    n, d, loss, c = exact(curve, axis)
    low, high = (np.exp([-0.01, 0.03]) if curve == "akima" else np.array([-0.01, 0.03])).tolist()
    seeds = (loss * low, loss * high) if curve == "akima" else (loss + low, loss + high)
    columns = (np.tile(n, 2), np.tile(d, 2), np.concatenate(seeds), np.tile(c, 2))
    weights = np.repeat([3.0, 1.0], len(n))
    result = fit_isoflop(*columns, flops=columns[3], weights=weights, curve=curve, axis=axis)
    assert result.params == pytest.approx(EXACT, rel=1e-6)
    assert [m.num_points for m in result.minima] == [14] * 3


def test_points_without_weight_are_not_sizes():
    n, d, loss, c = exact("parabola", "params", budgets=(1e18,), sizes=5)
    result = fit_isoflop(n, d, loss, c, weights=[0, 0, 1, 1, 1])
    assert result.minima[0].reason == "too_few_points"


@pytest.mark.parametrize(("curve", "axis"), EVERY)
def test_text_json_and_figure_show_the_curve(curve, axis):
    n, d, loss, c = exact(curve, axis, ratio=1.0)
    result = fit_isoflop(n, d, loss, c, curve=curve, axis=axis)
    said = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (said["curve"], said["axis"]) == (curve, axis)
    assert f"{curve} over log {'N' if axis == 'params' else 'D'}" in result.report().splitlines()[0]
    axes = figures.isoflop_figure(result).axes[0]
    drawn = max((line for line in axes.lines if len(line.get_xdata()) > 20), key=lambda line: line.get_ydata().min())
    lowest = drawn.get_ydata().argmin()
    assert drawn.get_xdata()[lowest] == pytest.approx(0.1 * 1e18**0.5, rel=0.03)
    assert drawn.get_ydata()[lowest] == pytest.approx(30 * 1e18**-0.05, rel=1e-4)
    assert sorted(drawn.get_xdata()[[0, -1]]) == pytest.approx([n[c == 1e18].min(), n[c == 1e18].max()])
    legend = [t.get_text() for t in axes.figure.legends[0].get_texts()]
    assert f"{curve} of one budget" in legend


def test_an_unknown_curve_or_axis_is_refused():
    columns = exact("parabola", "params")
    with pytest.raises(UserError, match="unknown curve 'akema': did you mean akima"):
        fit_isoflop(*columns, curve="akema")
    with pytest.raises(UserError, match="unknown axis 'token': did you mean tokens"):
        fit_isoflop(*columns, axis="token")


def refused(curve, axis, kind):
    """Three exact curves, the middle one spoilt: (N, D, L, C)."""
    n, d, loss, c = exact(curve, axis, ratio=1.0)
    middle = np.flatnonzero(c == 1e19)
    x = np.linspace(-1.5, 1.7, 7)
    if kind == "edge":
        loss[middle] = 3.0 - 0.1 * x + 0.01 * x**2
    elif kind == "not_convex":
        loss[middle] = 3.0 - 0.1 * x**2 if curve == "parabola" else 3.0 - 0.1 * x - 0.05 * x**3
    elif kind == "outside_grid":  # noise makes the last but one lowest
        loss[middle] = 3.0 + np.array([0.568, 0.382, 0.299, 0.166, 0.16, -0.028, 0.02])
    keep = np.ones(len(n), dtype=bool)
    if kind == "too_few_points":
        keep[middle[3:]] = False
    return tuple(v[keep] for v in (n, d, loss, c))


@pytest.mark.parametrize(
    ("curve", "kind"),
    [(c, k) for c in CURVES for k in ("too_few_points", "edge", "not_convex", "outside_grid")],
)
@pytest.mark.parametrize("axis", AXES)
def test_every_curve_refuses_with_its_reason(curve, axis, kind):
    result = fit_isoflop(*refused(curve, axis, kind), curve=curve, axis=axis)
    spoilt = result.minima[1]
    if curve == "akima" and kind in ("not_convex", "outside_grid"):
        # a curve through every point is lowest inside or at an end, never beyond it
        assert spoilt.reason == ("edge" if kind == "not_convex" else "")
        return
    assert spoilt.reason == kind
    assert np.isnan([spoilt.N, spoilt.D, spoilt.L]).all()
    assert f"left out: {spoilt.detail}" in result.warnings
    assert [m.usable for m in result.minima] == [True, False, True]
    assert result.params == pytest.approx({**EXACT, "D0": 1 / 0.6}, rel=1e-6)
    if kind == "edge":
        assert ("larger ones" if axis == "params" else "longer ones") in spoilt.detail


def broken(kind):
    """Three curves, the middle one spoilt; the reason that must be given for it."""
    n, d, loss, c = parabolas(np.array([1e18, 1e19, 1e20]))
    keep = np.ones(len(n), dtype=bool)
    middle = np.flatnonzero(c == 1e19)
    if kind == "too_few_points":
        keep[middle[3:]] = False
    elif kind == "edge":
        keep[middle[:3]] = False
        keep[middle] |= n[middle] > 0.1 * 1e19**0.5
        loss[middle[5:]] += 0.2
        n, d, loss, c = (
            np.append(v, w) for v, w in zip((n, d, loss, c), (n[middle[5]] * 1.5, 1e9, 9.0, 1e19), strict=True)
        )
        keep = np.append(keep, True)
    elif kind == "not_convex":
        loss[middle] = 3.0 - 0.1 * np.log(n[middle] / n[middle[3]]) ** 2
    elif kind == "outside_grid":
        loss[middle] = 3.0 + np.array([0.50, 0.30, 0.24, 0.16, 0.03, 0.031])
    return (v[keep] for v in (n, d, loss, c))


@pytest.mark.parametrize("kind", ["too_few_points", "edge", "not_convex", "outside_grid"])
def test_a_curve_without_an_interior_minimum_is_refused(kind):
    n, d, loss, c = broken(kind)
    result = fit_isoflop(n, d, loss, c)
    spoilt = result.minima[1]
    assert spoilt.reason == kind
    assert np.isnan(spoilt.N)
    assert "1e19" in spoilt.detail
    assert [m.usable for m in result.minima] == [True, False, True]
    assert f"left out: {spoilt.detail}" in result.warnings
    assert any("two budgets only" in w for w in result.warnings)
    assert result.allocation.a == pytest.approx(0.5, rel=1e-8)


def test_one_budget_gives_no_line():
    result = fit_isoflop(*parabolas(np.array([1e18])), at=[1e19])
    assert (result.status, dict(result.params), dict(result.at)) == ("refused", {}, {})
    assert pytest.approx(0.1 * 1e9, rel=1e-8) == result.minima[0].N
    assert "needs 2 budgets" in result.warnings[0]
    assert np.isnan(result.allocation.a)


def test_envelope_recovers_the_frontier(world):
    c = np.geomspace(1e18, 1e21, 7)
    n, d = world.best(c)
    beaten = world.loss(n / 5, d * 5)
    result = fit_envelope(
        np.append(n, n / 5), np.append(d, d * 5), np.append(world.loss(n, d), beaten), at=[1e20], flops=np.tile(c, 2)
    )
    assert len(result.minima) == 7
    assert result.allocation.a == pytest.approx(0.28 / 0.62, abs=1e-9)
    assert pytest.approx(world.best(1e20), rel=1e-9) == (result.at[1e20].N, result.at[1e20].D)


def test_envelope_refuses_what_cannot_support_it(world):
    n, d, loss, _ = world.grid([1e18, 2e18], sizes=5)
    result = fit_envelope(n, d, loss)
    assert result.status == "refused"
    assert "no envelope" in result.warnings[0]
    for name in ("cosine", "linear", "wsd"):
        with pytest.raises(UserError, match=f"middle of a {name} schedule"):
            fit_envelope(n, d, loss, run_id=["a"] * 10, schedule=[name] * 10)
    assert fit_envelope(n, d, loss, run_id=["a"] * 10, schedule=["constant"] * 10).n == 10
