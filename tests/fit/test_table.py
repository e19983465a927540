import numpy as np
import pandas as pd
import pytest

from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_isoflop, fit_surface
from dlm.fit.budgets import group
from dlm.fit.rows import checkpoints, read_runs
from dlm.fit.table import fit_runs, fit_sweep, predict_runs, score_runs


@pytest.fixture
def runs(world):
    n, d, loss, c = world.grid([1e18, 1e19, 1e20], sizes=6, sigma=0.003)
    return pd.DataFrame({"params": n, "tokens": d, "loss": loss, "flops": c, "budget": c, "status": "done"})


def test_a_table_gives_the_numbers_of_its_arrays(runs, tmp_path):
    path = tmp_path / "runs.csv"
    runs.to_csv(path, index=False)
    columns = [runs[k] for k in ("params", "tokens", "loss")]
    surface = fit_runs(path, law="chinchilla", bootstrap=0, at=[1e21])
    assert surface.params == pytest.approx(fit_surface(*columns, budget=runs["budget"]).params, rel=1e-9)
    assert list(surface.at) == [1e18, 1e19, 1e20, 1e21]
    isoflop = fit_runs(str(path), law="isoflop", bootstrap=100)
    assert isoflop.params == pytest.approx(fit_isoflop(*columns, runs["budget"]).params, rel=1e-9)
    assert np.isfinite(isoflop.at[1e20].ci["N"]).all()
    assert fit_runs(runs.drop(columns="budget"), law="isoflop", bootstrap=0).params == pytest.approx(isoflop.params)


def test_only_finished_runs_count(runs):
    runs.loc[3, ["status", "loss"]] = ["failed", np.nan]
    assert len(read_runs(runs)) == len(runs) - 1
    with pytest.raises(UserError, match=r"no run with status 'done' \(18 running\)"):
        read_runs(runs.assign(status="running"))


def test_a_file_that_is_missing_or_no_table_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no file .*absent\.csv: give a CSV with the columns params, tokens, loss"):
        read_runs(tmp_path / "absent.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="is not a CSV file"):
        read_runs(tmp_path / "empty.csv")


def test_a_missing_column_is_reported_with_the_likely_one(runs):
    with pytest.raises(UserError, match="no column 'params': did you mean param_s"):
        read_runs(runs.rename(columns={"params": "param_s"}))
    with pytest.raises(
        UserError, match="no columns 'params' and 'loss': it has tokens; needed are params, tokens, loss"
    ):
        read_runs(runs[["tokens"]])
    with pytest.raises(UserError, match="add a column unique_tokens"):
        fit_runs(runs, law="data-constrained")
    with pytest.raises(UserError, match="unique tokens of every run: 9 rows have no unique_tokens"):
        fit_runs(runs.assign(unique_tokens=[1e9, None] * 9), law="data-constrained")
    with pytest.raises(UserError, match="no column 'loss': it has params, tokens, x"):
        read_runs(runs[["params", "tokens"]].assign(x=1))


BAD = [
    ("loss", "abc", "row 4: loss is 'abc', not a number above 0"),
    ("tokens", -5.0, r"row 4: tokens is -5.0"),
    ("params", np.nan, "row 4: params is empty"),
    ("tokens", np.inf, "row 4: tokens is inf"),
    ("loss", 0.0, "row 4: loss is 0.0, not a number above 0"),
    ("budget", 0.0, "row 4: budget is 0.0"),
]


@pytest.mark.parametrize(("column", "value", "words"), BAD)
def test_bad_numbers_are_reported_with_their_row(runs, column, value, words):
    runs[column] = runs[column].astype(object)
    runs.loc[2, column] = value
    with pytest.raises(UserError, match=words):
        read_runs(runs)


def test_runs_without_a_loss_are_left_out_and_counted_wherever_the_table_is_used(runs, tmp_path):
    diverged = runs.assign(loss=runs["loss"].astype(object))
    diverged.loc[[1, 4, 7], "loss"] = ["NaN", "", "inf"]
    diverged.to_csv(tmp_path / "runs.csv", index=False)
    said = "3 rows have no finite loss (empty, NaN or infinite) and are left out (first: row 3)"
    kept = read_runs(tmp_path)  # a folder stands for its runs.csv
    pd.testing.assert_frame_equal(kept, read_runs(runs.drop(index=[1, 4, 7])), check_flags=False)
    assert kept.attrs["warnings"] == [said]
    for fit in fit_sweep(tmp_path / "runs.csv", bootstrap=0).values():
        assert fit.n == 15 and fit.warnings.count(said) == 1
    path = tmp_path / "frozen.json"
    predict_runs(kept, at=[1e21], freeze=path, law="chinchilla", bootstrap=100)
    assert said in score_runs(path, tmp_path / "runs.csv").notes
    with pytest.raises(UserError, match=r"no row with a loss: all 18 are empty, NaN or infinite"):
        read_runs(runs.assign(loss=np.nan))
    with pytest.raises(UserError, match=r"no file .*nothing/runs\.csv: give a CSV"):
        (tmp_path / "nothing").mkdir()
        read_runs(tmp_path / "nothing")


def test_repeated_rows_count_once(runs):
    frame = read_runs(pd.concat([runs, runs.iloc[[0, 1]]]))
    assert len(frame) == len(runs)
    assert "2 rows repeat another exactly" in frame.attrs["warnings"][0]


def test_isoflop_needs_groups(runs):
    loose = runs.drop(columns="budget").assign(flops=runs["flops"] * np.linspace(1, 1.01, len(runs)))
    with pytest.raises(UserError, match="isoFLOP curves need a column 'budget': 18 distinct flops in 18 rows"):
        fit_runs(loose, law="isoflop", budget_tolerance=0)
    pairs = runs.drop(columns="budget").assign(flops=1e18 * (1 + np.arange(18) // 2))
    with pytest.raises(
        UserError, match=r"9 distinct flops in 18 rows are no groups, where those within 5 % .*; add the"
    ):
        fit_runs(pairs, law="isoflop")
    runs.loc[0, "budget"] = np.nan
    assert any("1 rows without a budget" in w for w in fit_runs(runs, law="isoflop", bootstrap=0).warnings)
    differing = runs.assign(budget=1e18 * 1.1 ** np.arange(len(runs)))
    with pytest.raises(
        UserError, match=r"all 18 budgets differ, where those within 5 % count as one; raise --budget-t"
    ):
        fit_runs(differing, law="isoflop")
    with pytest.raises(UserError, match=r"all 18 budgets differ; raise --budget-tolerance, or fit another law"):
        fit_runs(differing, law="isoflop", budget_tolerance=0)


def test_budgets_within_the_tolerance_are_one(runs):
    """Each budget is missed by up to 1 %, as where tokens come in whole steps."""
    spent = runs["flops"] * np.tile([0.99, 1.0, 1.01], 6)
    exact = fit_runs(runs, law="isoflop", bootstrap=0)
    assert exact.notes == fit_runs(runs, law="isoflop", bootstrap=0, budget_tolerance=0).notes
    for name, near in (
        ("flops", runs.assign(flops=spent).drop(columns="budget")),
        ("budget", runs.assign(budget=spent)),
    ):
        found = fit_runs(near, law="isoflop", bootstrap=0)
        assert [m.num_points for m in found.minima] == [6, 6, 6]
        assert [m.budget for m in found.minima] == pytest.approx([1e18, 1e19, 1e20], rel=1e-3)
        assert found.params["a"] == pytest.approx(exact.params["a"], abs=0.01)
        said = f"9 values of {name} count as 3 budgets, because those within 5 % are one budget (--budget-tolerance)"
        assert said in found.notes
    apart = fit_runs(runs.assign(budget=spent), law="isoflop", bootstrap=0, budget_tolerance=0)
    assert len(apart.minima) == 9 and said not in apart.notes
    surface = fit_runs(runs.assign(budget=spent), bootstrap=0)
    assert said in surface.notes and surface.holdout["without_top_1"]["num_held_out"] == 6
    without = runs.drop(columns=["budget", "flops"]).assign(tokens=runs["tokens"] * np.tile([0.99, 1.0, 1.01], 6))
    assert [m.num_points for m in fit_runs(without, law="isoflop", bootstrap=0).minima] == [6, 6, 6]
    empty = fit_runs(runs.assign(budget=np.nan), law="isoflop", bootstrap=0)
    assert empty.params == pytest.approx(exact.params)
    for wrong in (-0.1, 1.0, np.nan):
        with pytest.raises(UserError, match=f"budget tolerance is {wrong}: give a share from 0"):
            fit_runs(runs, budget_tolerance=wrong)


def test_a_chain_of_near_budgets_joins_no_far_ones():
    chain = 1e18 * 1.02 ** np.arange(40.0)
    budgets = group(chain, 0.05)
    for level in np.unique(budgets):
        own = chain[budgets == level]
        assert own.max() <= 1.05 * own.min() and level == pytest.approx(np.exp(np.log(own).mean()))
    assert len(np.unique(budgets)) <= 30
    # The nearest are joined first, not the lowest.
    assert len(set(group(np.array([1.0, 1.048, 1.051, 1.054]), 0.05)[1:])) == 1


def checkpoints_of(world, tokens, *, sizes=22, seed=0):
    """Rows of a run of each size at these tokens, with the noise of the run in all of its rows."""
    rng, rows = np.random.default_rng(seed), []
    for n in np.geomspace(1e7, 1e9, sizes):
        d = tokens(n)
        loss = world.loss(n, d) * (1 + 0.003 * rng.standard_normal() + 2e-4 * rng.standard_normal(len(d)))
        rows.append(pd.DataFrame({"params": n, "tokens": d, "loss": loss}))
    return pd.concat(rows, ignore_index=True)


CHECKPOINTS = {
    "220 rows of 22 sizes": ({}, lambda n: 2 * n * np.arange(1.0, 11)),
    "the same tokens for every size": ({}, lambda n: 1e9 * np.arange(1.0, 11)),
    "sizes and tokens that double": ({"sizes": 8}, lambda n: 1e9 * np.arange(1.0, 17)),
    "in steps of equal ratio": ({"sizes": 6}, lambda n: 1e8 * 1.5 ** np.arange(10)),
    "few sizes, many rows": ({"sizes": 3}, lambda n: 1e7 * np.arange(1.0, 201)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_without_a_run_id_are_noticed(world, name):
    how, tokens = CHECKPOINTS[name]
    rows = checkpoints_of(world, tokens, **how)
    (said,) = checkpoints(rows)
    count = rows["params"].nunique()
    assert f"{len(rows)} of {len(rows)} rows look like checkpoints of {count} runs" in said and "run_id" in said
    assert checkpoints(rows.assign(run_id=rows["params"].astype(str))) == []
    if count == 22:
        assert said in fit_runs(rows, bootstrap=0).warnings
        overfitted = rows.assign(loss=rows["loss"] + 0.2 * (rows["tokens"] > rows["params"] * 12))
        assert len(checkpoints(overfitted)) == 1
        halves = pd.concat([rows.assign(seed=0), rows.assign(seed=1)])
        assert "checkpoints of 44 runs" in checkpoints(halves)[0]


@pytest.mark.parametrize("ratio", [1.3, 1.5, 2.0, 10.0])
@pytest.mark.parametrize("budgets", [6, 12])
@pytest.mark.parametrize("sizes", [4, 16])
def test_isoflop_tables_of_few_sizes_are_no_checkpoints(world, ratio, budgets, sizes):
    n = np.tile(np.geomspace(1e7, 1e9, sizes), budgets)
    c = np.repeat(1e18 * ratio ** np.arange(budgets), sizes) * np.random.default_rng(0).uniform(0.99, 1.01, len(n))
    d = c / 6 / n
    runs = pd.DataFrame({"params": n, "tokens": d, "loss": world.loss(n, d)})
    assert checkpoints(runs) == [] and checkpoints(runs.assign(flops=c)) == []


def test_grids_of_few_rows_are_no_checkpoints(world):
    doubling = checkpoints_of(world, lambda n: 1e9 * 2.0 ** np.arange(10), sizes=6)
    assert checkpoints(doubling) == []
    assert checkpoints(pd.concat([doubling, doubling.assign(loss=doubling["loss"] * 0.999)])) == []  # of two seeds
    assert checkpoints(checkpoints_of(world, lambda n: 1e9 * np.arange(1.0, 6))) == []


ISOFLOP_LIKE = ["porian_main", "gadre_overtraining", "isoflop_ml_scalefit", "isoflop_llama_3_raw_loss"]
ISOFLOP_LIKE += ["mdm_prime_v2_isoflop", "quokka_isoflop_masked", "epoch_chinchilla", "datablations_182"]


@pytest.mark.parametrize("name", ISOFLOP_LIKE)
def test_published_tables_of_separate_runs_are_no_checkpoints(reference, name):
    table = reference(f"{name}.csv")
    parts = [part for _, part in table.groupby("run_id")] if name == "porian_main" else [table]
    assert [checkpoints(part.drop(columns="run_id", errors="ignore")) for part in [table, *parts]] == [[]] * (
        1 + len(parts)
    )


def test_published_training_curves_are_checkpoints(reference):
    table = reference("quokka_data_constrained_masked.csv")
    assert "checkpoints of 31 runs, one for each size and setting" in checkpoints(table)[0]


def test_objectives_are_not_mixed(runs):
    both = pd.concat([runs.assign(objective="masked_diffusion"), runs.assign(objective="autoregressive", loss=2.0)])
    with pytest.raises(UserError, match=r"several objectives \(autoregressive and masked_diffusion\)"):
        fit_runs(both)
    with pytest.raises(UserError, match="unknown objective 'mdm'"):
        fit_runs(both, objective="mdm")
    fits = fit_sweep(both, bootstrap=0)
    assert fits["masked_diffusion/combined"].params == fit_runs(runs, bootstrap=0).params
    flat = fits["autoregressive/combined"]
    assert (flat.status, flat.label) == ("refused", "autoregressive")
    assert flat.warnings == ("every loss is 2: nothing to fit",)


def test_what_the_law_does_not_know_gives_a_warning(runs):
    runs = runs.assign(epochs=4.0, parent="trunk", schedule=["wsd", "cosine"] * 9)
    warnings = " ".join(fit_runs(runs, bootstrap=0).warnings)
    assert all(words in warnings for words in ("up to 4.0 times", "differ in schedule"))
    with pytest.raises(UserError, match=r"several conventions \(6n and full\)"):
        fit_runs(runs.assign(convention=["6n", "full"] * 9))


def test_wrong_arguments_of_a_fit_are_refused(runs):
    with pytest.raises(UserError, match=r"unknown law .skaled..*skaling"):
        fit_runs(runs, law="skaled")
    with pytest.raises(UserError, match="isoflop has no fixed parameters: only surfaces do"):
        fit_runs(runs, law="isoflop", fixed={"E": 1.0})
    with pytest.raises(UserError, match="at is -1"):
        fit_runs(runs, at=[-1])


def test_units_with_flops_of_their_own_change_nothing(runs):
    """N and D in millions, FLOPs as they are: a token then costs a million million times 6 N."""
    plain = fit_runs(runs, at=[1e20], bootstrap=0).at[1e20]
    scaled = runs.assign(params=runs["params"] / 1e6, tokens=runs["tokens"] / 1e6)
    other = fit_runs(scaled, at=[1e20], bootstrap=0).at[1e20]
    assert pytest.approx((plain.N, plain.D, plain.L), rel=1e-3) == (other.N * 1e6, other.D * 1e6, other.L)


def test_losses_may_have_any_unit(runs):
    plain, large = (
        bootstrap(
            fit_runs(runs.assign(loss=runs["loss"] * unit), law="chinchilla", loss="mse", bootstrap=0), replicates=200
        )
        for unit in (1.0, 1e6)
    )
    assert large.params["alpha"] == pytest.approx(plain.params["alpha"], rel=1e-4)
    assert large.failed == 0


IGNORED = [
    ("isoflop", {"loss": "l1"}, "isoflop has no loss"),
    ("isoflop", {"loss": "nonsense"}, "isoflop has no loss"),
    ("envelope", {"weights": "compute"}, "envelope has no weights from compute"),
    ("chinchilla", {"curve": "akima"}, "chinchilla has no curve or axis"),
    ("isoflop", {"curve": "spline"}, "unknown curve 'spline'"),
]


@pytest.mark.parametrize(("law", "options", "words"), IGNORED)
def test_no_option_is_ignored(runs, law, options, words):
    with pytest.raises(UserError, match=words):
        fit_runs(runs, law=law, bootstrap=0, **options)


def test_rows_without_weight_count_as_absent(runs):
    half = np.arange(len(runs)) % 2 == 0
    weighted = fit_runs(runs.assign(weight=half.astype(float)), law="tied", bootstrap=100)
    dropped = fit_runs(runs[half], law="tied", bootstrap=100)
    assert weighted.n == dropped.n == half.sum()
    assert weighted.params == dropped.params and weighted.ci == dropped.ci
    with pytest.raises(UserError, match="3 points cannot fit"):
        fit_runs(runs.assign(weight=np.where(runs.index % 6 == 0, 1.0, 0.0)), bootstrap=0)


def test_the_scale_of_the_weights_does_not_change_the_noise(runs):
    plain, heavy = (fit_runs(runs.assign(weight=w), loss="mse", bootstrap=0) for w in (1.0, 100.0))
    assert heavy.noise.residual == pytest.approx(plain.noise.residual, rel=1e-6)


def test_files_without_rows_or_with_ragged_ones_are_refused(tmp_path):
    (tmp_path / "head.csv").write_text("params,tokens,loss\n")
    with pytest.raises(UserError, match="there are no runs"):
        fit_runs(tmp_path / "head.csv")
    (tmp_path / "ragged.csv").write_text("params,tokens,loss\n1,2,3,4,5\n1,2,3,4,5\n")
    with pytest.raises(UserError, match="rows with more fields than its header"):
        fit_runs(tmp_path / "ragged.csv")


def test_an_envelope_leaves_out_rows_without_weight(world):
    c = np.geomspace(1e18, 1e21, 7)
    n, d = world.best(c)
    runs = pd.DataFrame({"params": n, "tokens": d, "loss": world.loss(n, d), "flops": c, "weight": [1.0] * 6 + [0.0]})
    result = fit_runs(runs, law="envelope")
    assert result.n == 6 and any("knows no weights" in w for w in result.warnings)


def test_outliers_are_dropped_only_if_asked_and_named(runs):
    broken = runs.assign(run_id=[f"run-{k}" for k in range(len(runs))])
    broken.loc[[3, 11], "loss"] *= [1.3, 1.2]
    plain, dropped = (fit_runs(broken, law="chinchilla", drop_outliers=drop, bootstrap=0) for drop in (False, True))
    assert (plain.n, dropped.n) == (len(runs), len(runs) - 2)
    assert any("dropped 2 runs far from the law: run-3; run-11" in w for w in dropped.warnings)
    rest = fit_runs(broken.drop(index=[3, 11]), law="chinchilla", bootstrap=0)
    assert dropped.params == pytest.approx(rest.params, rel=1e-6)
    some = broken.assign(weight=np.where(broken.index == 2, 0.0, 1.0))
    for weights, n in ((None, len(runs) - 3), ("compute", len(runs) - 2)):
        again = fit_runs(some, law="chinchilla", drop_outliers=True, weights=weights, bootstrap=0)
        assert again.n == n and any("run-3; run-11" in w for w in again.warnings)
    with pytest.raises(UserError, match="isoflop has no outliers to drop"):
        fit_runs(broken, law="isoflop", drop_outliers=True)


def test_without_hold_outs_the_parts_weigh_the_same(runs):
    result = fit_runs(runs, holdout=False, bootstrap=0)
    assert result.holdout == {} and len({*np.round(list(result.surface.weights.values()), 12)}) == 1
    alone = fit_runs(runs, law="chinchilla", holdout=False, bootstrap=100)
    assert alone.holdout == {} and [form.holdout for form in alone.verdict.forms.values()] == [{}, {}]
    assert np.isnan(alone.verdict.missed) and alone.verdict.limit == "no budget was held out to check it"
    assert alone.verdict.reach == alone.verdict.top
    with pytest.raises(UserError, match="isoflop has no hold-outs to leave out"):
        fit_runs(runs, law="isoflop", holdout=False)
