"""Which runs are replicates, what repeated text does to a fit, and what a fit says of it."""

import numpy as np
import pandas as pd
import pytest

from dlm.core.errors import UserError
from dlm.fit import fit_surface
from dlm.fit.known import IDENTITY, SETTINGS
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.rows import read_runs
from dlm.fit.table import fit_runs


@pytest.fixture
def pairs(world):
    """Two runs of each cell, with 1 % of noise."""
    n, d, loss, _ = world.grid(np.repeat([1e18, 1e19, 1e20], 2), sizes=5, sigma=0.01)
    return pd.DataFrame({"params": n, "tokens": d, "loss": loss, "seed": np.repeat([0, 1, 0, 1, 0, 1], 5)})


def noise_of(runs, **options):
    return fit_runs(runs, law="chinchilla", bootstrap=0, holdout=False, **options).noise


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("model", ("9k", "9k-deep")),
        ("global_batch_size", (32, 64)),
        ("learning_rate", (3e-3, 1e-3)),
        ("weight_decay", (0.0, 0.1)),
        ("dropout", (0.0, 0.1)),
        ("schedule", ("wsd", "cosine")),
        ("data_hash", ("ab", "cd")),
        ("unique_tokens", (1e6, 2e6)),
    ],
)
def test_runs_that_differ_in_a_setting_are_no_replicates(pairs, column, values):
    assert column in SETTINGS and (*SETTINGS, "seed") == IDENTITY
    same = pairs.assign(**{column: values[0]})
    assert noise_of(same).replicates == 15
    other = noise_of(pairs.assign(**{column: [values[seed] for seed in pairs["seed"]]}))
    assert other.replicates == 0 and np.isnan(other.seed) and np.isnan(other.lack_of_fit)
    assert noise_of(same.assign(**{column: None})).replicates == 15  # an empty column tells nothing apart


def test_runs_that_read_no_text_twice_are_replicates_however_much_more_there_is(pairs):
    more = pairs.assign(unique_tokens=pairs["tokens"] * (2.0 + pairs["seed"]))
    assert noise_of(more).replicates == 15
    said = (
        "30 rows have more unique_tokens than tokens: as many as tokens count, because a run reads no more of its text"
    )
    assert read_runs(more).attrs["notes"] == [said]
    assert read_runs(pairs.assign(unique_tokens=pairs["tokens"] * 1.0005)).attrs["notes"] == []
    with pytest.raises(UserError, match=r"row 6: unique_tokens is 0\.0, not a number above 0"):
        read_runs(pairs.assign(unique_tokens=np.where(pairs.index == 4, 0, 1e6)))


@pytest.mark.parametrize(("space", "norm"), [("log", "mse"), ("raw", "l1")])
def test_the_ratio_of_a_lack_of_fit_is_never_negative(world, space, norm):
    """One of three replicates lies far above the law, where shares of the loss and differences of logs disagree."""
    n, d, loss, _ = world.grid([1e18, 1e19, 1e20], sizes=5)
    columns = [np.concatenate([column] * 3) for column in (n, d)]
    far = np.concatenate([loss, loss, loss * 3])
    noise = fit_surface(*columns, far, norm=norm, space=space, holdout=False).noise
    assert noise.replicates == 30 and 0 <= noise.lack_of_fit < 3 and 0 <= noise.lack_of_fit_p <= 1


def repeated(world, *, r_d=12.0, epochs=(1.0, 3.0, 10.0)):
    """Runs of three sizes and four lengths whose text is read up to ten times, with losses that follow the law."""
    n, d = (column.ravel() for column in np.meshgrid([1e8, 4e8, 16e8], [1e9, 4e9, 16e9, 64e9]))
    n, d, epoch = (np.concatenate(parts) for parts in zip(*((n, d, np.full(12, k)) for k in epochs), strict=True))
    law = DataConstrained(vars(world), 64e9)
    row = np.array([[{**vars(world), "R_D": r_d, "R_N": 4.0}[name] for name in law.params]])
    x = law._features(np.log(n), np.log(d), d / epoch)
    loss = law.loss(law.theta(row, np.zeros(4)), tuple(v[None] for v in x))[0]
    return pd.DataFrame({"params": n, "tokens": d, "loss": loss, "unique_tokens": d / epoch})


def test_runs_without_repetition_do_not_show_what_it_is_worth(world):
    once = repeated(world, epochs=(1.0,))
    for unique in (once["tokens"], once["tokens"] * 3, 1e12):  # equal to the tokens, above them, the same for all
        with pytest.raises(
            UserError, match=r"^no run reads its unique tokens more than 1 times, so R_D, what .* repeat"
        ):
            fit_runs(once.assign(unique_tokens=unique), law="data-constrained", bootstrap=0)


def test_a_mixture_of_weight_decays_is_a_warning_unless_every_cell_has_them_all(pairs):
    said = "the runs differ in weight_decay: one law for all of them mixes those effects in"
    large = pairs["params"] > pairs["params"].median()
    by_size = fit_runs(pairs.assign(weight_decay=0.1 * large), law="chinchilla", bootstrap=0, holdout=False)
    assert said in by_size.warnings
    crossed = fit_runs(pairs.assign(weight_decay=0.1 * pairs["seed"]), law="chinchilla", bootstrap=0, holdout=False)
    assert said not in crossed.warnings
