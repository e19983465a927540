import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from support.worlds import least_share, worlds

from dlm.core.errors import UserError
from dlm.fit import Multiplier, bootstrap, compare, equal_loss, fit_isoflop, fit_surface, optima
from dlm.fit.table import compare_runs

BUDGETS = (1e18, 3e18, 1e19, 3e19, 1e20)


def slower(world, m):
    """The world that needs m times the compute of `world` for every loss: L(N, D) = L_world(N / sqrt m, D / sqrt m)."""
    root = np.sqrt(m)
    return dataclasses.replace(world, A=world.A * root**world.alpha, B=world.B * root**world.beta)


def fitted(world, budgets=BUDGETS, *, label="", sizes=6, sigma=0.0, seed=0, norm="mse", law="chinchilla"):
    n, d, loss, c = world.grid(budgets, sizes=sizes, sigma=sigma, seed=seed)
    if law == "isoflop":
        return fit_isoflop(n, d, loss, c, label=label)
    return fit_surface(n, d, loss, law=law, norm=norm, label=label, holdout=False)


@pytest.mark.parametrize("m", [0.4, 1.0, 2.0, 16.0])
@pytest.mark.parametrize(("law", "within"), [("chinchilla", 1e-6), ("skaling", 1e-4), ("isoflop", 3e-3)])
def test_scaled_compute_is_the_multiplier(world, m, law, within):
    found = compare(fitted(world, law=law), fitted(slower(world, m), law=law))
    assert len(found.losses) == 9
    assert found.multiplier == pytest.approx([m] * 9, rel=within)
    for loss, c in zip(found.losses, found.C_first, strict=True):
        n, d = world.best(c)
        assert world.loss(n, d) == pytest.approx(loss, rel=within)
    log_c = np.log(found.C_first)
    assert np.diff(log_c) == pytest.approx(np.ptp(log_c) / 8, rel=1e-4)
    assert (found.names, found.convention) == (("first", "second"), "6n")


def test_only_losses_that_both_reach_within_their_own_budgets(world):
    other = slower(world, 3.0)
    found = compare(fitted(world, (1e18, 1e19, 1e20)), fitted(other, (1e19, 1e20, 1e21)))
    reached = [[w.loss(*w.best(c)) for c in ends] for w, ends in ((world, (1e20, 1e18)), (other, (1e21, 1e19)))]
    assert found.overlap == pytest.approx((max(r[0] for r in reached), min(r[1] for r in reached)), rel=1e-6)
    assert (found.losses[-1], found.losses[0]) == pytest.approx(found.overlap)
    assert min(found.C_first) >= 0.999e18 and max(found.C_first) <= 1.001e20
    assert min(found.C_second) >= 0.999e19 and max(found.C_second) <= 1.001e21
    asked = compare(fitted(world), fitted(other), losses=[2.9, 3.1])
    assert asked.losses == (3.1, 2.9)
    assert asked.multiplier == pytest.approx([3.0, 3.0], rel=1e-6)


def test_losses_outside_the_overlap_are_refused(world):
    with pytest.raises(
        UserError, match=r"losses holds 2\.1, .*would need, extrapolated, first \S+ and second \S+ FLOPs"
    ):
        compare(fitted(world), fitted(slower(world, 3.0)), losses=[2.9, 2.1])
    with pytest.raises(UserError, match="finite numbers above 0"):
        compare(fitted(world), fitted(world), losses=[])


@pytest.mark.parametrize("swapped", [False, True])
def test_disjoint_losses_name_the_budgets_that_would_overlap(world, swapped):
    good, poor = (1e20, 3e20, 1e21), (1e18, 3e18, 1e19)
    pair = [fitted(world, good, label="good"), fitted(slower(world, 16.0), poor, label="poor")]
    with pytest.raises(UserError, match="no loss is reached by both") as refusal:
        compare(*pair[:: -1 if swapped else 1])
    said = re.search(
        r"runs of poor up to (\S+) FLOPs, or with runs of good down to (\S+) FLOPs \(both extrap", str(refusal.value)
    )
    more, less = map(float, said.groups())
    assert (more, less) == pytest.approx((1.6e21, 6.25e17), rel=0.1)  # 16 times the lowest, a 16th of the highest
    for longer in (
        [pair[0], fitted(slower(world, 16.0), (*poor, more), label="poor")],
        [fitted(world, (less, *good), label="good"), pair[1]],
    ):
        assert compare(*longer).multiplier == pytest.approx([16.0] * 9, rel=1e-4)


def test_a_law_that_never_gets_there_says_so(world):
    floor = dataclasses.replace(world, E=3.0)
    with pytest.raises(UserError, match=r"poor never gets down to 2\.\d+ \(its E is 3\)"):
        compare(fitted(world, (1e20, 1e21), label="good"), fitted(floor, (1e20, 1e21), label="poor"))


def test_the_multiplier_holds_under_another_cost_per_token(world, monkeypatch):
    """With a head that costs as much as 5e7 parameters, against a root of L* found by scipy."""
    monkeypatch.setattr(equal_loss, "FIT_NODES", 201)  # every node is a search; 401 take twice as long

    def with_head(world):
        n, d, _, c = world.grid(BUDGETS, sizes=8)
        flops = 6 * (n + 5e7) * d
        return fit_surface(n, d, world.loss(n, d), flops=flops, budget=c, norm="mse", convention="full", holdout=False)

    pair = with_head(world), with_head(slower(world, 4.0))
    found = compare(*pair)
    for k, result in enumerate(pair):
        for loss, c in list(zip(found.losses, (found.C_first, found.C_second)[k], strict=True))[::4]:

            def gap(log_c, result=result, loss=loss):
                return next(iter(optima(result, [np.exp(log_c)]).values())).L - loss

            assert np.log(c) == pytest.approx(scipy.optimize.brentq(gap, np.log(1e16), np.log(1e23)), abs=1e-5)
    draws = (bootstrap(result, replicates=100) for result in pair)  # without noise, every draw is the law
    resampled = compare(*draws, losses=found.losses[4:5])
    assert resampled.ci[0] == pytest.approx([found.multiplier[4]] * 2, rel=1e-6)


@worlds(8, 40)
@pytest.mark.parametrize(("law", "norm"), [("chinchilla", "mse"), ("chinchilla", "huber"), ("isoflop", "mse")])
def test_intervals_hold_the_truth_as_often_as_they_say(world, law, norm, worlds):
    """95 % intervals at the middle loss and for the trend hold the truth as often as they say."""
    other, hits, steady = slower(world, 2.0), [], []
    for seed in range(worlds):
        pair = [
            bootstrap(fitted(w, sigma=0.004, seed=2 * seed + k, norm=norm, law=law), replicates=200, seed=seed)
            for k, w in enumerate((world, other))
        ]
        found = compare(*pair)
        hits.append(found.ci[4][0] <= 2.0 <= found.ci[4][1])
        steady.append(found.trend_ci[0] <= 1.0 <= found.trend_ci[1])
    assert min(np.mean(hits), np.mean(steady)) >= min(0.86, least_share(worlds))
    assert found.ci[4][1] < 1.5 * found.ci[4][0]  # and says something


def test_the_interval_is_that_of_linear_propagation(world):
    """Two laws of equal noise: the variances of log C add, and Student's t has the dof of both."""
    pair = [bootstrap(fitted(world, sigma=0.002, seed=s), replicates=4000, seed=7) for s in (0, 1)]
    both = compare(*pair)
    alone = [compare(p, fitted(world), losses=both.losses[4:5]) for p in pair]
    assert all(np.isnan(a.ci[0]).all() for a in alone)  # one side has no draws
    exact = bootstrap(fitted(world), replicates=100)
    halves = [np.ptp(np.log(compare(exact, p, losses=both.losses[4:5]).ci[0])) for p in pair]
    assert np.ptp(np.log(both.ci[4])) == pytest.approx(np.hypot(*halves), rel=0.08)


def test_two_samples_of_one_law_show_no_difference(world):
    pair = [bootstrap(fitted(world, sigma=0.004, seed=s), replicates=400, seed=s) for s in (3, 4)]
    found = compare(*pair)
    assert all(low <= 1.0 <= high for low, high in found.ci)
    assert "no difference is shown: its 95% intervals lie within" in found.report()
    assert "no change with scale is shown" in found.report()
    far = compare(pair[0], bootstrap(fitted(slower(world, 2.0), sigma=0.004, seed=5), replicates=400))
    assert "no difference" not in far.report()
    low, high = compare(pair[0], pair[0]).ci[4]  # draws of one seed are no pairs: they are shuffled
    assert high - low > 0.5 * (found.ci[4][1] - found.ci[4][0])


def test_a_multiplier_that_rises_with_scale_is_reported(world):
    steeper = dataclasses.replace(world, alpha=0.36, beta=0.30, A=world.A * 1.2, B=world.B * 1.4)
    pair = [bootstrap(fitted(w, sigma=0.001, seed=k), replicates=300) for k, w in enumerate((steeper, world))]
    assert re.search(r"the multiplier rises with scale, from [\d.]+ to [\d.]+$", compare(*pair).verdict())
    assert re.search(r"the multiplier falls with scale, from [\d.]+ to [\d.]+$", compare(*pair[::-1]).verdict())


def test_without_draws_there_is_no_interval(world):
    found = compare(fitted(world, label="ar"), fitted(slower(world, 2.0), label="mdm"))
    assert np.isnan(found.ci).all() and np.isnan(found.trend_ci).all()
    verdict = found.verdict()
    assert verdict.startswith("at equal loss, mdm needs 2 times the compute of ar (over losses ")
    assert verdict.endswith("there is no interval; the multiplier does not change with scale")
    assert "no interval: ar and mdm has no resampled laws" not in found.report()
    assert any("ar and mdm have no resampled laws" in w for w in found.warnings)
    said = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert said["ci"] == [[None, None]] * 9
    assert set(said) == {f.name for f in dataclasses.fields(Multiplier)} | {"verdict"}


def test_laws_lost_in_the_resampling_leave_no_interval(world):
    pair = [bootstrap(fitted(w, sigma=0.002), replicates=200) for w in (world, slower(world, 2.0))]
    draws = pair[1].draws.copy()
    draws[:20] = np.nan
    found = compare(pair[0], dataclasses.replace(pair[1], draws=draws))
    assert np.isnan(found.ci).all()
    assert any(w.startswith("no interval at any loss: 10.0% or more of the pairs") for w in found.warnings)


def test_conventions_must_agree(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=6)
    full = fit_isoflop(n, d, loss, c, flops=7 * n * d, convention="full", label="b")
    with pytest.raises(UserError, match="a counts FLOPs as '6n' and b as 'full'"):
        compare(fitted(world, label="a"), full)
    given = fit_surface(n, d, loss, flops=6 * n * d, holdout=False)  # named by no one, and 6 N D
    assert compare(fitted(world), given).multiplier == pytest.approx([1.0] * 9)
    dearer = fit_isoflop(n, d, loss, c, flops=8 * n * d, convention="full")
    assert any("costs 7 N FLOPs in b and 8 N in second" in w for w in compare(full, dearer).warnings)


def test_fits_that_cannot_be_compared_are_refused(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=6)
    with pytest.raises(UserError, match="second has no law"):
        compare(fitted(world), fit_isoflop(n, d, np.sort(loss), np.full(len(n), 1e18)))
    with pytest.raises(UserError, match="second does not fall with C"):
        compare(fitted(world, law="isoflop"), fit_isoflop(n, d, loss * (c / 1e18) ** 0.2, c))
    with pytest.raises(UserError, match="level is 95"):
        compare(fitted(world), fitted(world), level=95)
    mixed = compare(fitted(world), fitted(world, law="isoflop"))
    assert any("may be the form of the law" in w for w in mixed.warnings)


def test_html_escapes_and_holds_the_table(world):
    page = compare(fitted(world, label="<ar>"), fitted(world, label="mdm"))._repr_html_()
    assert "<ar>" not in page and "&lt;ar&gt;" in page
    assert page.count("<tr>") == 10


# Tables and the command.


def table(world, objective, *, seed=0):
    n, d, loss, c = world.grid(BUDGETS, sizes=6, sigma=0.003, seed=seed)
    return pd.DataFrame({"params": n, "tokens": d, "loss": loss, "flops": c, "budget": c, "objective": objective})


def test_the_objectives_of_one_table_are_compared(world, tmp_path):
    both = pd.concat([table(slower(world, 2.0), "masked_diffusion", seed=1), table(world, "autoregressive")])
    found = compare_runs(both, bootstrap=0)
    assert found.names == ("autoregressive", "masked_diffusion")
    assert found.multiplier == pytest.approx([2.0] * 9, rel=0.1)
    back = compare_runs(both, first="masked_diffusion", bootstrap=0)
    assert back.names == ("masked_diffusion", "autoregressive")
    assert back.multiplier[4] == pytest.approx(0.5, rel=0.1)
    with pytest.raises(UserError, match=r"its objectives are autoregressive: name two, or a second CSV"):
        compare_runs(both[both["objective"] == "autoregressive"])
    with pytest.raises(UserError, match="it has no column objective"):
        compare_runs(both.drop(columns="objective"))
    with pytest.raises(UserError, match="unknown objective 'mdm'"):
        compare_runs(both, first="mdm", second="autoregressive")


def test_two_files_are_told_apart(world, tmp_path):
    paths = [tmp_path / f"{name}.csv" for name in ("adamw", "muon")]
    for k, path in enumerate(paths):
        table(world, "masked_diffusion", seed=k).to_csv(path, index=False)
    assert compare_runs(*paths, bootstrap=0).names == ("adamw", "muon")
    run = subprocess.run(
        [sys.executable, "-m", "dlm.cli", "compare", *paths, "--law", "tied", "--bootstrap", "200", "--json"],
        capture_output=True,
        text=True,
    )
    said = json.loads(run.stdout)
    assert (run.returncode, said["names"]) == (0, ["adamw", "muon"])
    assert said["multiplier"] == pytest.approx([1.0] * 9, rel=0.2)
    refused = subprocess.run(
        [sys.executable, "-m", "dlm.cli", "compare", paths[0], "--objective", "a"], capture_output=True, text=True
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--objective is given 1 times" in refused.stderr


# The published diffusion points (mdm-prime-v2): plain masked diffusion against autoregressive. SMDM (2410.18514) finds
# 16 times by isoFLOP curves on its own text and ladder.


@pytest.fixture
def arm_and_mdm(reference, tmp_path):
    frame = reference("mdm_prime_v2_isoflop.csv")
    paths = [tmp_path / f"{name}.csv" for name in ("arm", "mdm", "prime")]
    for path in paths:
        frame[frame["source"] == f"mdm_prime_v2:{path.stem}"].to_csv(path, index=False)
    return paths


@pytest.mark.parametrize(("law", "low", "high"), [("isoflop", 16.0, 21.0), ("chinchilla", 13.0, 27.0)])
def test_masked_diffusion_needs_more_than_ten_times_the_compute(arm_and_mdm, law, low, high):
    arm, mdm, prime = arm_and_mdm
    found = compare_runs(arm, mdm, law=law, bootstrap=400)
    assert low < min(found.multiplier) < max(found.multiplier) < high
    assert all(10.0 < c[0] < m < c[1] < 45.0 for m, c in zip(found.multiplier, found.ci, strict=True))
    with pytest.raises(UserError, match=r"no loss is reached by both: mdm reaches .*prime reaches"):
        compare_runs(prime, mdm, law=law, bootstrap=0)


def test_the_command_gives_the_known_multiplier_of_published_points(arm_and_mdm):
    run = subprocess.run(
        [sys.executable, "-m", "dlm.cli", "compare", *arm_and_mdm[:2], "--law", "isoflop"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(
        r"at equal loss, mdm needs 17\.4 to 20 times the compute of arm \(over losses 3\.096 to 3\.384\)", run.stdout
    )
