import numpy as np
import pytest

from dlm.errors import UserError
from dlm.fit import fit_envelope, fit_isoflop


def fit(frame, **options):
    return fit_isoflop(frame["params"], frame["tokens"], frame["loss"], frame["flops"], flops=frame["flops"], **options)


def test_llama_3(reference):  # T10
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
def test_masked_diffusion_points(reference, source, a, optima):  # T22
    frame = reference("mdm_prime_v2_isoflop.csv")
    result = fit(frame[frame["source"].str.endswith(f":{source}")])
    assert result.allocation.a == pytest.approx(a, abs=5e-5)
    assert [round(m.N / 1e6) for m in result.minima] == optima


@pytest.mark.parametrize(("width", "bias"), [(2, -0.327), (4, -1.301), (8, -2.903), (16, -5.100)])
def test_bias_of_the_parabola(world, width, bias):  # T23
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
    assert result.objective == pytest.approx(0.0, abs=1e-20)


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
def test_refuses_a_curve_without_an_interior_minimum(kind):
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
    with pytest.raises(UserError, match="middle of a cosine schedule"):
        fit_envelope(n, d, loss, run_id=["a"] * 10, schedule=["cosine"] * 10)
