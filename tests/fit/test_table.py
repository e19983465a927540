import numpy as np
import pandas as pd
import pytest

from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_isoflop, fit_surface
from dlm.fit.rows import read_runs
from dlm.fit.table import fit_runs, fit_sweep


@pytest.fixture
def runs(world):
    n, d, loss, c = world.grid([1e18, 1e19, 1e20], sizes=6, sigma=0.003)
    return pd.DataFrame({"params": n, "tokens": d, "loss": loss, "flops": c, "budget": c, "status": "done"})


def test_a_table_gives_the_numbers_of_its_arrays(runs, tmp_path):
    path = tmp_path / "runs.csv"
    runs.to_csv(path, index=False)
    columns = [runs[k] for k in ("params", "tokens", "loss")]
    surface = fit_runs(path, bootstrap=0, at=[1e21])
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
    with pytest.raises(UserError, match="no column 'loss': it has params, tokens, x"):
        read_runs(runs[["params", "tokens"]].assign(x=1))


BAD = [
    ("loss", "abc", "row 4: loss is 'abc', not a number above 0"),
    ("tokens", -5.0, r"row 4: tokens is -5.0"),
    ("params", np.nan, "row 4: params is empty"),
    ("loss", np.inf, "row 4: loss is inf"),
    ("budget", 0.0, "row 4: budget is 0.0"),
]


@pytest.mark.parametrize(("column", "value", "words"), BAD)
def test_bad_numbers_are_reported_with_their_row(runs, column, value, words):
    runs[column] = runs[column].astype(object)
    runs.loc[2, column] = value
    with pytest.raises(UserError, match=words):
        read_runs(runs)


def test_repeated_rows_count_once(runs):
    frame = read_runs(pd.concat([runs, runs.iloc[[0, 1]]]))
    assert len(frame) == len(runs)
    assert "2 rows repeat another exactly" in frame.attrs["warnings"][0]


def test_isoflop_needs_groups(runs):
    loose = runs.drop(columns="budget").assign(flops=runs["flops"] * np.linspace(1, 1.01, len(runs)))
    with pytest.raises(UserError, match="isoFLOP curves need a column 'budget': 18 distinct flops in 18 rows"):
        fit_runs(loose, law="isoflop")
    pairs = runs.drop(columns="budget").assign(flops=1e18 * (1 + np.arange(18) // 2))
    with pytest.raises(UserError, match="9 distinct flops in 18 rows are no groups"):
        fit_runs(pairs, law="isoflop")
    runs.loc[0, "budget"] = np.nan
    assert any("1 rows without a budget" in w for w in fit_runs(runs, law="isoflop", bootstrap=0).warnings)


def test_objectives_are_not_mixed(runs):
    both = pd.concat([runs.assign(objective="masked_diffusion"), runs.assign(objective="autoregressive", loss=2.0)])
    with pytest.raises(UserError, match=r"several objectives \(autoregressive and masked_diffusion\)"):
        fit_runs(both)
    with pytest.raises(UserError, match="unknown objective 'mdm'"):
        fit_runs(both, objective="mdm")
    fits = fit_sweep(both, bootstrap=0)
    assert fits["masked_diffusion/chinchilla"].params == fit_runs(runs, bootstrap=0).params
    flat = fits["autoregressive/chinchilla"]
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
        bootstrap(fit_runs(runs.assign(loss=runs["loss"] * unit), loss="mse", bootstrap=0), replicates=200)
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
