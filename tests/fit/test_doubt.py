"""Top budgets that lie above what the runs below predict: when they are in doubt, and what the intervals then cover."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dlm.fit import bootstrap, judge, optima
from dlm.fit.combined.doubt import CLEAR
from dlm.fit.combined.fit import fit_combined
from dlm.fit.frozen import forecast, predicted
from dlm.fit.optimum import own_optimum
from dlm.fit.predict import predict

BUDGETS = np.geomspace(1e18, 1e20, 6)
TOP = BUDGETS[-1]


def fitted(world, factor, *, sigma=0.003, **options):
    """A combined law of runs whose losses at the top two budgets are multiplied by `factor`."""
    n, d, loss, c = world.grid(BUDGETS, width=5.0, sizes=5, sigma=sigma, seed=1)
    spoiled = np.where(c >= BUDGETS[-2], loss * factor, loss)
    return bootstrap(fit_combined(n, d, spoiled, budget=c, **options), replicates=100)


@pytest.fixture(scope="module")
def doubted(world):
    return judge(fitted(world, 1.03))


def without_doubts(result):
    return replace(result, combination=replace(result.combination, doubts=()))


def test_the_interval_of_the_loss_covers_what_the_runs_below_mistuned_budgets_predict(doubted, world):
    for flops in (TOP, 3 * TOP):
        truth = world.loss(*world.best(flops))
        low, high = own_optimum(doubted, flops, 0.95).ci["L"]
        alone = own_optimum(without_doubts(doubted), flops, 0.95).ci["L"]
        below = [own_optimum(doubt.lower, flops, 0.95).ci["L"] for doubt in doubted.combination.doubts]
        assert (low, high) == (min(ends[0] for ends in [alone, *below]), max(ends[1] for ends in [alone, *below]))
        assert low <= truth <= high
        assert truth < alone[0]  # the law follows the mistuned budgets
        assert optima(doubted, [flops])[flops].ci["L"] == (low, high)


def test_the_excess_and_its_standard_error_are_those_of_the_runs_above(doubted):
    points, doubt = doubted.points, doubted.combination.doubts[-1]
    above = points.take(points.flops >= BUDGETS[-2] * 0.99)
    assert doubt.num_budgets == 2 and doubt.start == pytest.approx(BUDGETS[-2]) and len(doubt.lower.points) == 20
    rows = np.concatenate([[list(doubt.lower.params.values())], doubt.lower.draws])
    loss = doubt.lower.surface.predict(
        rows, *(np.tile(np.log(v), (len(rows), 1)) for v in (above.params, above.tokens))
    )
    excess = np.log(above.loss / loss).mean(axis=1)
    assert doubt.excess == pytest.approx(excess[0])
    noise = doubt.lower.noise.residual / np.sqrt(10)
    assert doubt.error == pytest.approx(np.sqrt(noise**2 + np.var(excess[1:])))
    assert doubt.excess > CLEAR * doubt.error


def test_the_verdict_and_the_json_name_the_doubt(doubted):
    (said,) = [word for word in doubted.verdict.words if "standard errors" in word]
    doubt = doubted.combination.doubts[-1]
    assert said.startswith(
        f"The top two budgets lie {np.expm1(doubt.excess):.1%} above what the runs below 3.98e19 FLOPs"
    )
    assert "the interval of L* covers both" in said and len(doubted.verdict.words) <= 5
    shown = json.loads(json.dumps(doubted.to_dict()))["combination"]["doubts"][-1]
    names = ("num_budgets", "start", "excess", "error")
    assert shown == pytest.approx({name: getattr(doubt, name) for name in names})


def test_the_interval_of_a_run_covers_both_also_in_a_frozen_file(doubted, world):
    n, d = world.best(3 * TOP)
    loss = world.loss(n, d)
    seen, alone = predict(doubted, [n], [d]), predict(without_doubts(doubted), [n], [d])
    assert seen.ci[0, 0] <= loss < alone.ci[0, 0] and seen.ci[0, 1] >= alone.ci[0, 1]
    (frozen,) = predicted(json.loads(json.dumps(forecast(doubted, [3 * TOP]))), [n], [d])
    assert [frozen["low"], frozen["high"]] == pytest.approx(seen.pi[0], rel=1e-6)
    assert frozen["low"] < loss


@pytest.mark.parametrize(("factor", "sigma"), [(1.0, 0.003), (0.97, 0.003), (1.0, 0.0), (1.002, 0.0)])
def test_sound_runs_lower_losses_and_a_tiny_excess_raise_no_doubt(world, factor, sigma):
    assert fitted(world, factor, sigma=sigma).combination.doubts == ()


def test_without_hold_outs_nothing_is_doubted(world):
    assert fitted(world, 1.03, holdout=False).combination.doubts == ()
