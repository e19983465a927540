"""The laws beyond Chinchilla: published numbers, known truths, several minima, pinned parameters."""

import numpy as np
import pytest

from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_surface
from dlm.fit.engine import newton
from dlm.fit.laws import LAWS, UNIQUE
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.points import as_points
from dlm.fit.surface import resample

PUBLISHED = {
    "A": np.exp(6.255414),
    "B": np.exp(7.3049974),
    "E": np.exp(0.6254804),
    "alpha": 0.3526596,
    "beta": 0.3526596,
}


def warned(result, words):
    return any(words in warning for warning in result.warnings)


def mixed(n, d, *, k=0.35):
    return 1.5 + 30.0 * (n**-0.8 + 2.0 * d**-0.7) ** k


def grid(budgets=np.geomspace(1e17, 1e20, 5), sizes=7, width=8.0):
    """N and D around N = (C/6)^.5, C = 6 N D."""
    n = np.concatenate([(c / 120) ** 0.5 * np.geomspace(1 / width, width, sizes) for c in budgets])
    return n, np.repeat(budgets, sizes) / 6 / n


def test_five_runs_of_gadre_give_their_published_law(reference):
    frame = reference("gadre_overtraining.csv")
    frame = frame[frame["dataset"] == "rpj"]
    small = ["d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8"]
    at_one = frame["model"].isin(small) & (frame["cc_mult"] == 1)
    fitted = frame[at_one | ((frame["model"] == small[0]) & (frame["cc_mult"] == 16))]
    assert len(fitted) == 5
    result = fit_surface(fitted["params"], fitted["tokens"], fitted["loss"], law="tied", norm="mse", space="raw")
    row = np.array([[result.params[name] for name in result.surface.params]])
    for model, times, error in (("open_lm_1b", 32, 0.7103), ("open_lm_7b", 1, 0.7320)):
        (held,) = frame[(frame["model"] == model) & (frame["cc_mult"] == times)].itertuples()
        found = result.surface.predict(row, np.log([held.params]), np.log([held.tokens]))[0]
        assert 100 * abs(found / held.loss - 1) == pytest.approx(error, abs=5e-5)


def test_repeated_tokens_give_the_published_law_as_one_of_several_minima(reference):
    frame = reference("datablations_182.csv")
    result = fit_surface(
        frame["params"],
        frame["tokens"],
        frame["loss"],
        law="data-constrained",
        fixed=PUBLISHED,
        unique_tokens=frame["unique_tokens"],
    )
    assert result.value <= 0.0158047
    assert (result.params["R_D"], result.params["R_N"]) == pytest.approx((95.4, 1.71), rel=3e-3)
    published = [r for r in result.rivals if abs(r["R_D"] - 15.37) < 0.01]
    assert [r["R_N"] for r in published] == [pytest.approx(5.315, abs=1e-3)]
    assert published[0]["objective"] == pytest.approx(0.0158259, abs=5e-8)
    assert warned(result, "other minima lie within 1 % of the best")


def test_skaling_is_never_above_chinchilla(epoch):
    """k = 1 is Chinchilla, so a global search cannot end higher."""
    fits = [fit_surface(epoch["params"], epoch["tokens"], epoch["loss"], law=law) for law in ("skaling", "chinchilla")]
    assert fits[0].value < fits[1].value
    pinned = fit_surface(epoch["params"], epoch["tokens"], epoch["loss"], law="skaling", fixed={"k": 1.0})
    assert pinned.value == pytest.approx(fits[1].value, rel=1e-9)
    assert pinned.params["A"] * pinned.params["R"] == pytest.approx(fits[1].params["B"], rel=1e-5)


@pytest.mark.parametrize("norm", ["mse", "huber"])
@pytest.mark.parametrize("k", [0.3, 0.4, 0.7])
def test_skaling_is_recovered(norm, k):
    n, d = grid(width=30.0)
    result = fit_surface(n, d, mixed(n, d, k=k), law="skaling", norm=norm, at=[1e21])
    expected = {"E": 1.5, "A": 30.0, "R": 2.0, "alpha": 0.8, "beta": 0.7, "k": k}
    assert result.params == pytest.approx(expected, rel=1e-6)
    assert result.allocation.a == pytest.approx(0.7 / 1.5, rel=1e-6)
    best = result.at[1e21]
    nearby = best.N * np.geomspace(0.9, 1.1, 5)
    assert mixed(nearby, 1e21 / 6 / nearby, k=k).argmin() == 2


def test_tied_and_data_constrained_are_recovered(world):
    n, d = grid(width=10.0)
    tied = fit_surface(n, d, 1.7 + 400 / n**0.33 + 900 / d**0.33, law="tied", norm="mse")
    assert tied.params == pytest.approx({"E": 1.7, "A": 400.0, "B": 900.0, "alpha": 0.33}, rel=1e-6)
    assert tied.allocation.a == 0.5
    unique = np.tile([1e8, 1e9, 1e13], len(n) // 3 + 1)[: len(n)]
    truth = dict(vars(world), R_D=12.0, R_N=4.0)
    law = DataConstrained(vars(world), 1e9)
    points = {"params": n, "tokens": d, "unique_tokens": unique}
    x = law._features(np.log(n), np.log(d), unique)
    row = np.array([[truth[name] for name in law.params]])
    loss = law.loss(law.theta(row, np.zeros(4)), tuple(v[None] for v in x))[0]
    result = fit_surface(**points, loss=loss, law="data-constrained", norm="mse", at=[1e20])
    assert result.params == pytest.approx(truth, rel=1e-6)
    best = result.at[1e20]
    assert pytest.approx(1e20, rel=1e-9) == best.N * best.D * 6
    nearby = np.log(best.N) + np.linspace(-0.1, 0.1, 5)
    assert result.surface.predict(row, nearby[None], np.log(1e20 / 6) - nearby[None])[0].argmin() == 2


def test_a_pinned_asymptote_stays(world):
    n, d, loss, _ = world.grid([1e18, 1e19, 1e20], sizes=6, sigma=0.003)
    free = bootstrap(fit_surface(n, d, loss, at=[1e21]), replicates=300)
    pinned = bootstrap(fit_surface(n, d, loss, fixed={"E": 1.69}, at=[1e21]), replicates=300)
    assert pinned.params["E"] == pytest.approx(1.69, rel=1e-12)
    assert "E" not in pinned.ci
    assert pinned.to_dict()["fixed"] == {"E": 1.69}
    wide, narrow = (np.ptp(r.ci["A"]) for r in (free, pinned))
    assert narrow < 0.7 * wide
    with pytest.raises(UserError, match=r"unknown parameter to pin in chinchilla: 'F'.*E, alpha, beta"):
        fit_surface(n, d, loss, fixed={"F": 1.0})
    with pytest.raises(UserError, match="fixed E is -1"):
        fit_surface(n, d, loss, fixed={"E": -1.0})


def test_under_tuned_runs_pull_less(world):
    """A third of the runs lies 3 % above the law, as badly tuned ones do."""
    n, d, loss, _ = world.grid([1e18, 1e19, 1e20], sizes=9, sigma=0.002)
    loss = loss * np.where(np.arange(len(n)) % 3 == 0, 1.03, 1.0)
    even, tilted = (fit_surface(n, d, loss, norm="mse", under_tuned=u, at=[1e20]) for u in (1.0, 0.05))
    truth = world.loss(*world.best(1e20))
    assert abs(tilted.at[1e20].L / truth - 1) < 0.3 * abs(even.at[1e20].L / truth - 1)
    with pytest.raises(UserError, match="under_tuned is 2"):
        fit_surface(n, d, loss, under_tuned=2.0)


def test_weights_from_compute_are_c_over_its_mean(world):
    n, d, loss, c = world.grid([1e18, 1e19, 1e20], sizes=6, sigma=0.01)
    by_name = fit_surface(n, d, loss, weights="compute")
    assert by_name.params == pytest.approx(fit_surface(n, d, loss, weights=c / c.mean()).params, rel=1e-6)
    with pytest.raises(UserError, match="weights is 'flops'"):
        fit_surface(n, d, loss, weights="flops")


def test_the_data_constrained_law_names_what_it_lacks(world):
    n, d, loss, _ = world.grid([1e18, 1e19, 1e20], sizes=6)
    with pytest.raises(UserError, match="a column unique_tokens"):
        fit_surface(n, d, loss, law="data-constrained")
    with pytest.raises(UserError, match=r"the 0 such runs give none .* or pin E, A, B, alpha and beta"):
        fit_surface(n, d, loss, law="data-constrained", unique_tokens=d / 3)


@pytest.mark.parametrize("name", LAWS)
def test_every_replicate_begins_at_its_own_scan(world, name):
    """A law makes several starts of the Chinchilla law of each replicate; none may be handed to another replicate."""
    law = LAWS[name](3e9) if name in UNIQUE and name != "data-constrained" else None
    law = law or (DataConstrained(vars(world), 3e9) if name == "data-constrained" else LAWS[name]())
    n, d, loss, _ = world.grid([1e18, 1e19, 1e20], sizes=6, sigma=0.01)
    points = as_points(n, d, loss, unique_tokens=np.full(len(n), 3e9))
    problem = newton.problem_of(points, law, newton.Norm())
    residual = np.full(len(n), 0.01)
    targets = np.log(loss) + 0.02 * np.random.default_rng(0).standard_normal((3, len(n)))
    weight = points.weight[None]
    starts = resample._scanned(problem, residual, targets, weight)
    assert starts.shape[1:] == (3, len(law.params))
    for k in range(3):
        alone = resample._scanned(problem, residual, targets[k : k + 1], weight)
        np.testing.assert_allclose(starts[:, k], alone[:, 0], rtol=1e-9)
