"""Laws of repeated data: worlds whose best epochs are known, and published curves that the fit has not seen."""

import numpy as np
import pandas as pd
import pytest

from dlm.core.errors import UserError
from dlm.fit import allocation, best_epochs, crossover
from dlm.fit.choice import Choice, Score, chosen
from dlm.fit.curves import MOST_SAMPLED, TAIL, curves, sampled, weighed
from dlm.fit.engine.newton import Norm
from dlm.fit.laws.correction import Correction
from dlm.fit.laws.epochs import Epochs
from dlm.fit.laws.onset import Onset
from dlm.fit.laws.penalty import Penalty
from dlm.fit.left_out import groups, score
from dlm.fit.points import as_points
from dlm.fit.surface import fit as surface_fit
from dlm.fit.surface.fit import fit_points
from dlm.fit.table import compare_runs, fit_runs

SIZES = np.geomspace(1e7, 1e9, 5)
BUDGETS = (1e7, 3e7, 1e8, 3e8)
STEPS = 2.0 ** np.arange(11)
BASE = {"E": 2.0, "A": 300.0, "B": 900.0, "alpha": 0.33, "beta": 0.33, "kappa": 0.3, "e0": 2.0}
PENALTY = {**BASE, "P": 0.002, "delta": 0.5, "epsilon": 0.9}
WORLDS = {
    "penalty": (Penalty, PENALTY),
    "onset": (Onset, {**BASE, "K": 100.0, "u": 0.4, "n": 0.4, "s": 0.4, "k": 2.0}),
    "epochs": (Epochs, BASE),
}
WITHIN = {"bootstrap": 0, "at": [1e18]}


def loss_of(world, n, u, e):
    law, params = world
    row = np.array([[params[name] for name in law.params]])
    n, u, e = (np.atleast_1d(np.asarray(v, dtype=float)) for v in np.broadcast_arrays(n, u, e))
    return law(1e8).loss(law(1e8).theta(row, np.zeros(3)), (np.log(n)[None], np.log(u * e)[None], np.log(e)[None]))[0]


def runs(world, *, sigma=0.003, steps=STEPS, seed=0, objective="masked_diffusion"):
    n, u, e = (v.ravel() for v in np.meshgrid(SIZES, BUDGETS, steps, indexing="ij"))
    noise = np.exp(sigma * np.random.default_rng(seed).standard_normal(len(n)))
    columns = {"params": n, "tokens": u * e, "unique_tokens": u, "loss": loss_of(world, n, u, e) * noise}
    frame = pd.DataFrame({**columns, "objective": objective})
    frame["run_id"] = [f"{row.Index}" for row in frame.itertuples()]
    return frame


def true_best(world, n, u):
    grid = np.geomspace(1.0, 1e5, 4001)
    return grid[loss_of(world, n, u, grid).argmin()]


@pytest.mark.parametrize("name", ["penalty", "onset"])
def test_the_best_epochs_of_a_known_world_are_found_and_covered(name):
    """They hold for a number of unique tokens that no run has, too."""
    world = WORLDS[name]
    result = fit_runs(runs(world), law=name, bootstrap=200, at=[1e18])
    for n, u in ((SIZES[1], 1e7), (SIZES[2], 6e7), (SIZES[3], 3e8)):
        found, truth = best_epochs(result, n, u), true_best(world, n, u)
        assert found.epochs == pytest.approx(truth, rel=0.15)
        assert found.ci[0] < truth < found.ci[1] < 3 * found.ci[0]
        assert pytest.approx(loss_of(world, n, u, truth)[0], rel=0.005) == found.L


@pytest.mark.parametrize("name", ["penalty", "onset", "epochs"])
def test_a_law_that_turns_is_chosen_if_and_only_if_the_losses_turn(name):
    result = fit_runs(runs(WORLDS[name], steps=STEPS[::2]), law="repeated", **WITHIN)
    turns = result.law in ("penalty", "onset")
    assert turns == (name != "epochs")
    assert set(result.choice.scores) | set(result.choice.refused) == {"epochs", "data-constrained", "penalty", "onset"}
    found = best_epochs(result, SIZES[4], BUDGETS[0])
    assert np.isfinite(found.epochs) == turns
    assert ("no turn within the runs, which have up to 1024 epochs" in result.report()) != turns
    shown = result.to_dict()["repeated"]
    assert shown["choice"]["law"] == result.law and set(shown["choice"]["scores"]) == set(result.choice.scores)
    assert "the optima hold for 300M unique tokens; the runs have 10M to 300M" in result.report()


def test_a_parameter_at_its_bound_has_no_interval():
    """Losses that never rise do not show the penalty."""
    result = fit_runs(runs(WORLDS["epochs"], sigma=1e-5), law="penalty", bootstrap=100, at=[1e18])
    assert {"P", "delta", "epsilon"} <= set(result.at_bound)
    assert np.isnan(result.ci["P"]).all() and np.isfinite(result.ci["kappa"]).all()
    assert result.to_dict()["ci"]["P"] == [None, None]
    assert [line.split()[-3:] for line in result.report().splitlines() if line.startswith("  P ")] == [
        ["at", "its", "bound"]
    ]


def test_a_turn_beyond_the_runs_is_at_its_bound():
    """Losses that have not risen yet may fit a turn that lies further on, with intervals that mean nothing."""
    result = fit_runs(runs(WORLDS["penalty"], steps=STEPS[:3], sigma=1e-5), law="onset", bootstrap=0)
    assert {"K", "u", "n", "s", "k"} <= set(result.at_bound)
    assert any("they do not show where it turns" in line for line in result.warnings)


def test_a_law_that_cannot_turn_says_which_runs_do():
    """The loss of the largest model on the least text rises most."""
    table = runs(WORLDS["penalty"], sigma=1e-4)
    (said,) = (line for line in fit_runs(table, law="epochs", **WITHIN).warnings if "the runs turn upward" in line)
    rise = loss_of(WORLDS["penalty"], SIZES[-1], BUDGETS[0], STEPS)
    assert said.startswith(
        "the runs turn upward where epochs still falls: the loss of 1B parameters on 10M unique tokens"
    )
    assert f"{rise[-1] / rise.min() - 1:.0%} higher after 1e+03; 18 more curves too" in said
    assert not any("the runs turn upward" in line for line in fit_runs(table, law="penalty", **WITHIN).warnings)


def test_more_compute_than_the_unique_tokens_can_use_is_not_spent():
    world = WORLDS["penalty"]
    result = fit_runs(runs(world), law="penalty", bootstrap=100, unique=3e7, at=[1e17, 1e19])
    grid_n, grid_e = np.meshgrid(np.geomspace(5e6, 2e9, 120), np.geomspace(1, 1e4, 240), indexing="ij")
    loss = loss_of(world, grid_n.ravel(), 3e7, grid_e.ravel()).reshape(grid_n.shape)
    cost = 6 * grid_n * grid_e * 3e7
    for flops in (1e17, 1e19):
        place = np.where(cost <= flops, loss, np.inf).argmin()
        found = allocation(result, flops)
        assert pytest.approx(loss.ravel()[place], rel=0.005) == found.L
        assert pytest.approx(grid_n.ravel()[place], rel=0.35) == found.N
        assert found.ci["L"][0] < loss.ravel()[place] < found.ci["L"][1] * 1.003
        assert found.epochs * 3e7 * found.N * 6 == pytest.approx(found.used, rel=1e-9)
    assert found.used < 0.9 * 1e19 and "more raises the loss" in found.sentence()
    assert "withheld" in allocation(result, 1e25).sentence()


def test_the_compute_at_which_diffusion_overtakes_is_found():
    """Autoregressive training learns faster, and pays more for repetition."""
    late = WORLDS["penalty"]
    early = (Penalty, {**PENALTY, "B": 700.0, "P": 0.02})
    table = pd.concat([runs(early, objective="autoregressive"), runs(late, objective="masked_diffusion", seed=1)])
    found = compare_runs(table, law="penalty", bootstrap=100)
    assert found.names == ("masked_diffusion", "autoregressive")
    assert "upper bound on -log p, and that of autoregressive training is exact" in found.report()
    grid_n, grid_e = np.meshgrid(np.geomspace(5e6, 2e9, 80), np.geomspace(1, 1e4, 160), indexing="ij")
    crossed = [at for at in found.at if np.isfinite(at.C)]
    assert len(crossed) >= 2
    assert [at.C for at in crossed] == sorted(at.C for at in crossed)  # more unique tokens favour the exact loss
    for at in crossed:
        cost = 6 * grid_n * grid_e * at.U
        losses = [loss_of(world, grid_n.ravel(), at.U, grid_e.ravel()).reshape(cost.shape) for world in (late, early)]
        lowest = [min(each[cost <= at.C * 1.5]) for each in losses]
        before = [min(each[cost <= at.C / 1.5]) for each in losses]
        assert lowest[0] < lowest[1] and before[0] > before[1]
        assert at.ci[0] <= at.C <= at.ci[1]
    assert found.to_dict()["at"][0]["U"] == BUDGETS[0]


def test_two_fits_that_count_flops_differently_are_not_compared():
    frame = runs(WORLDS["penalty"])
    one = fit_runs(frame, law="penalty", **WITHIN)
    other = fit_runs(frame.assign(flops=7 * frame.params * frame.tokens, convention="full"), law="penalty", **WITHIN)
    with pytest.raises(UserError, match="count both alike"):
        crossover(one, other, [1e8])


def test_close_checkpoints_count_no_more_than_a_few_and_the_far_tail_counts_less():
    world = WORLDS["penalty"]
    dense = np.linspace(1, 1024, 1024)
    e = np.concatenate([STEPS, dense])
    n = np.repeat([1e8, 2e8], [len(STEPS), len(dense)])
    points = weighed(as_points(n, e * 1e8, loss_of(world, n, 1e8, e), unique_tokens=np.full(len(n), 1e8)))
    sparse, close = list(curves(points))
    assert points.num_clusters == 2
    assert points.weight[close.rows].sum() == pytest.approx(points.weight[sparse.rows].sum(), rel=0.1)
    tail = points.weight[sparse.rows][~sparse.below]
    assert len(tail) and tail / points.weight[sparse.rows][0] == pytest.approx(TAIL)


def test_the_simplest_law_within_one_standard_error_of_the_best_is_taken():
    def of(*errors):
        zero = np.zeros(len(errors))
        return Score(excess=np.array(errors), log_error=zero, absolute=zero, rms=zero)

    assert chosen({"plain": of(0.011, 0.009, 0.01), "turning": of(0.009, 0.0105, 0.0095)}) == "plain"
    assert chosen({"plain": of(0.05, 0.06, 0.055), "turning": of(0.009, 0.0105, 0.0095)}) == "turning"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"law": "chinchilla", "unique": 1e8}, "chinchilla does not depend on unique tokens"),
        ({"law": "penalty", "unique": -1.0}, "unique is -1.0: give a number of unique tokens above 0"),
        ({"law": "repeated", "holdout": False}, "--no-holdout forbids it: name one law, such as --law penalty"),
    ],
)
def test_a_mistake_in_the_options_is_named(how, said):
    with pytest.raises(UserError, match=said):
        fit_runs(runs(WORLDS["penalty"]), **how, **WITHIN)


def test_runs_without_unique_tokens_or_without_enough_of_them_are_refused():
    frame = runs(WORLDS["penalty"])
    with pytest.raises(UserError, match="penalty needs the unique tokens of every run: add a column unique_tokens"):
        fit_runs(frame.drop(columns="unique_tokens"), law="penalty", **WITHIN)
    few = frame[frame["unique_tokens"].isin(BUDGETS[:2]) & frame["params"].isin(SIZES[:2])]
    with pytest.raises(UserError, match="fewer than three of both: name one law, such as --law penalty"):
        fit_runs(few, law="repeated", **WITHIN)


@pytest.mark.parametrize("law", ["epochs", "penalty", "onset", "repeated"])
def test_runs_that_repeat_nothing_are_refused_by_every_law_of_repeated_data(law):
    """Nothing would move the parameters of repetition from where the search starts."""
    with pytest.raises(UserError, match=r"no run reads its unique tokens more than 1 times, so \w+, what repetition"):
        fit_runs(runs(WORLDS["onset"], steps=[1.0]), law=law, bootstrap=0)


def test_a_size_at_the_end_of_those_considered_is_no_optimum():
    result = fit_runs(runs(WORLDS["epochs"], steps=STEPS[::3]), law="epochs", bootstrap=100, at=[1e18])
    inside, small = allocation(result, 1e18, 1e7), allocation(result, 1e15, 3e8)
    assert inside.edge == "" and np.isfinite(inside.ci["N"]).all() and "size considered" not in inside.sentence()
    assert small.edge == "smallest" and not np.isfinite(small.ci["N"]).any() and np.isfinite(small.ci["L"]).all()
    assert small.sentence().endswith("; N is the smallest size considered, and a smaller one may be better")


def test_a_law_of_repeated_data_does_not_warn_of_repeated_data():
    frame = runs(WORLDS["epochs"], steps=STEPS[::3])
    said = {law: fit_runs(frame, law=law, bootstrap=0, holdout=False).warnings for law in ("epochs", "chinchilla")}
    warned = {law: any(line.startswith("runs read their data up to") for line in lines) for law, lines in said.items()}
    assert warned == {"epochs": False, "chinchilla": True}


def test_far_from_the_runs_no_best_epochs_are_given():
    result = fit_runs(runs(WORLDS["penalty"]), law="penalty", **WITHIN)
    assert (
        best_epochs(result, 1e8, 1e12).withheld == "withheld: 1T unique tokens are far from the 10M to 300M of the runs"
    )
    assert np.isnan(best_epochs(result, 1e12, 1e8).epochs)
    with pytest.raises(UserError, match="params is 0"):
        best_epochs(result, 0.0)
    with pytest.raises(UserError, match="chinchilla does not depend on unique tokens: fit --law repeated"):
        best_epochs(fit_runs(runs(WORLDS["penalty"]), law="chinchilla", **WITHIN), 1e8)


def test_the_base_of_the_data_constrained_law_settles_within_a_few_fits(world, monkeypatch):
    """Taking each fit as the next base takes 58 fits here."""
    axes = np.geomspace(1e7, 3e9, 6), [1e8, 1e9, 1e10], [1, 3, 10, 30]
    n, u, e = (v.ravel() for v in np.meshgrid(*axes, indexing="ij"))
    law = surface_fit.DataConstrained(vars(world), 1e9)
    row = np.array([[vars(world)[name] for name in ("E", "A", "B", "alpha", "beta")] + [12.0, 4.0]])
    x = law._features(np.log(n), np.log(u * e), u)
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(len(n)))
    loss = law.loss(law.theta(row, np.zeros(4)), tuple(v[None] for v in x))[0] * noise
    fits = []
    monkeypatch.setattr(surface_fit, "solve", lambda *a, solve=surface_fit.solve, **k: fits.append(1) or solve(*a, **k))
    surface_fit.fit_surface(n, u * e, loss, law="data-constrained", unique_tokens=u, norm="mse", holdout=False)
    assert len(fits) <= 30


def test_published_curves_that_the_fit_has_not_seen_are_decided_well(reference):
    """Quokka, 2510.03280, figure 4: masked diffusion, 4 numbers of unique tokens and 8 sizes each."""
    frame = reference("quokka_data_constrained_masked.csv")
    columns = {name: frame[name] for name in ("params", "tokens", "loss", "flops", "unique_tokens")}
    points = weighed(as_points(**columns))
    for law in (Penalty, Onset):
        fit = fit_points(points, law(1e8), Norm(delta=1e-2), {}, holdout=False)
        for by in ("unique", "params"):
            errors = score(fit, groups(points, by=[by]))
            assert len(errors.excess) == 32
            assert np.median(errors.excess) < 0.01 and np.median(errors.rms) < 0.03
            assert errors.log_epochs_error < 0.5


def test_every_published_curve_of_a_budget_between_others_is_decided_well_by_a_corrected_law(reference):
    """29M and 82M of Quokka's unique tokens are left out in turn; 10M and 139M lie outside those that are left."""
    frame = reference("quokka_data_constrained_masked.csv")
    columns = {name: frame[name] for name in ("params", "tokens", "loss", "flops", "unique_tokens")}
    points = weighed(as_points(**columns))
    fit = fit_points(points, Penalty(1e8), Norm(delta=1e-2), {}, holdout=False)
    between = [mask for mask in groups(points, by=["unique"]) if 1e7 < points.unique[mask][0] < 1e8]
    errors = score(fit, between, correct=True)
    assert len(errors.excess) == 16
    assert errors.excess.max() < 0.01 and errors.rms.max() < 0.03 and errors.log_epochs_error < 0.2
    for by in ("unique", "params"):
        held = groups(points, by=[by])
        assert score(fit, held, correct=True).total.mean() < 0.8 * score(fit, held).total.mean()


@pytest.mark.parametrize("is_missed_by_the_form", [True, False])
def test_a_law_is_corrected_if_and_only_if_its_form_misses_in_a_way_that_curves_share(is_missed_by_the_form):
    frame = runs(WORLDS["penalty"], steps=STEPS[::2])
    if is_missed_by_the_form:  # the largest size learns more slowly, on all unique tokens alike
        slow = frame["params"] == SIZES[-1]
        frame.loc[slow, "loss"] *= 1.0 + 0.1 / (1.0 + frame["tokens"] / frame["unique_tokens"])
    result = fit_runs(frame, law="penalty", **WITHIN)
    assert ("penalty" in result.choice.corrected) == is_missed_by_the_form
    assert (result.surface.correction is not None) == is_missed_by_the_form
    assert ("corrected by the residuals of nearby curves: penalty" in result.report()) == is_missed_by_the_form
    assert result.to_dict()["repeated"]["choice"]["corrected"] == list(result.choice.corrected)


def test_far_from_the_runs_a_correction_adds_nothing():
    correction = Correction.of(np.array([[20.0, 17.0, 3.0]]), np.array([0.1]))
    near, far = correction.at(np.array([20.0, 30.0]), np.array([17.0, 17.0]), np.array([3.0, 3.0]))
    assert near == pytest.approx(0.1, rel=0.05) and abs(far) < 1e-12


def test_a_law_that_falls_where_one_curve_clearly_rises_is_not_taken():
    """The one curve that turns counts little in the mean over the held-out curves, yet it decides how long to train."""
    frame = runs(WORLDS["epochs"], steps=STEPS[::2])
    turned = (frame["params"] == SIZES[-1]) & (frame["unique_tokens"] == BUDGETS[0])
    frame.loc[turned, "loss"] *= 1.0 + 0.3 * (frame["tokens"] / frame["unique_tokens"] / 1024.0)
    result = fit_runs(frame, law="repeated", **WITHIN)
    assert result.law in ("penalty", "onset") and "epochs" in result.choice.blind
    assert (
        "passed over, because the loss of some runs rises by 5 % and more where they still fall: epochs"
        in result.report()
    )
    assert np.isfinite(best_epochs(result, SIZES[-1], BUDGETS[0]).epochs)


@pytest.mark.parametrize("law", ["repeated", "epochs"])
@pytest.mark.parametrize(
    ("own", "words"),
    [
        (lambda frame: frame["params"] == SIZES[2], "all runs have one size, 100M, so nothing shows alpha"),
        (
            lambda frame: frame["tokens"] == frame["unique_tokens"],
            "what repetition is worth, cannot be determined: fit chinchilla",
        ),
    ],
)
def test_runs_that_do_not_show_the_law_are_refused(own, words, law):
    frame = runs(WORLDS["penalty"])
    with pytest.raises(UserError, match=words):
        fit_runs(frame[own(frame)], law=law, **WITHIN)


def test_one_size_supports_a_law_whose_alpha_is_held_fixed():
    frame = runs(WORLDS["penalty"])
    result = fit_runs(frame[frame["params"] == SIZES[2]], law="penalty", fixed={"alpha": BASE["alpha"]}, **WITHIN)
    assert result.noise.residual < 0.01
    assert best_epochs(result, SIZES[2], 1e8).epochs == pytest.approx(
        true_best(WORLDS["penalty"], SIZES[2], 1e8), rel=0.2
    )


def test_runs_with_one_number_of_unique_tokens_say_that_the_law_holds_for_it():
    frame = runs(WORLDS["epochs"], steps=STEPS[::2])
    one = fit_runs(frame[frame["unique_tokens"] == 1e7], law="epochs", **WITHIN)
    assert "all runs have 10M unique tokens: the law holds for this number" in one.report()
    assert "unique tokens: the law holds" not in fit_runs(frame, law="epochs", **WITHIN).report()


def test_no_use_of_compute_is_given_that_takes_far_more_epochs_than_the_runs():
    """A law that never turns would read few unique tokens for ever."""
    frame = runs(WORLDS["epochs"])
    result = fit_runs(frame[frame["tokens"] <= 8 * frame["unique_tokens"]], law="epochs", **WITHIN)
    far = allocation(result, result.points.top_flops, 1e7)
    assert np.isnan([far.N, far.epochs, far.L]).all()
    assert "withheld: its best use takes" in far.sentence() and "above 16, twice the most" in far.sentence()
    assert np.isfinite(allocation(result, 1e15, 1e7).L)


def test_a_law_that_the_rest_of_the_runs_does_not_determine_is_never_chosen():
    lost, known = np.full(3, np.nan), np.full(3, 0.01)
    scores = {
        "plain": Score(excess=lost, log_error=lost, absolute=lost, rms=lost),
        "turning": Score(excess=known, log_error=known, absolute=known, rms=known),
    }
    choice = Choice(law=chosen(scores), scores=scores, refused={})
    assert choice.law == "turning" and "nan" not in choice.sentence() and "none of plain" in choice.sentence()


def test_data_constrained_laws_are_compared_at_each_number_of_unique_tokens():
    tables = [
        runs(WORLDS["epochs"], steps=STEPS[:4], objective=name) for name in ("autoregressive", "masked_diffusion")
    ]
    few = pd.concat(tables).query("params in @SIZES[::2]")
    found = compare_runs(few, law="data-constrained", bootstrap=0)
    assert [at.U for at in found.at] == [*BUDGETS] and "upper bound on -log p" in found.report()


def test_a_correction_of_many_curves_is_made_of_some_of_them():
    """The time that it takes grows as the third power of the number of places."""
    n, u = (v.ravel() for v in np.meshgrid(np.geomspace(1e6, 1e9, 50), np.geomspace(1e6, 1e9, 30)))
    points = as_points(n, 4 * u, loss_of(WORLDS["epochs"], n, u, 4.0), unique_tokens=u)
    places, log_loss = sampled(points)
    assert places.shape == (len(log_loss), 3) and 300 < len(log_loss) <= MOST_SAMPLED
