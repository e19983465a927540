"""The figure and the tables of repeated data, on curves whose best epochs are known, and on curves that never turn."""

import math

import numpy as np
import pandas as pd
import pytest

from dlm.fit.between import fit_repeats, overtaking
from dlm.fit.repeated import best_epochs
from dlm.fit.table import fit_runs
from dlm.report.charts.repeated import NOISE_ONLY, repeated_chart, repeated_tables, uncertainty

SIZES, TEXTS, EPOCHS = (1e6, 3e6, 1e7, 3e7), (1e6, 3e6, 1e7), 2.0 ** np.arange(9)


def table(*, turns=True, objective="masked_diffusion", level=1.0, sigma=0.0005):
    n, u, e = (axis.ravel() for axis in np.meshgrid(SIZES, TEXTS, EPOCHS, indexing="ij"))
    loss = level * (1.5 + 300 / n**0.4 + 900 / (u**0.4 * e**0.3))
    if turns:
        loss = loss + 0.002 * (n / u) ** 0.5 * e**0.9
    noise = np.exp(sigma * np.random.default_rng(0).standard_normal(len(n)))
    frame = pd.DataFrame({"params": n, "tokens": u * e, "unique_tokens": u, "loss": loss * noise})
    return frame.assign(objective=objective, run_id=[f"run{k}" for k in range(len(n))])


@pytest.fixture(scope="module")
def turning():
    return fit_runs(table(), law="penalty", bootstrap=100, conventions=False)


def test_points_lines_and_best_epochs_of_each_text_are_drawn(turning):
    chart = repeated_chart(turning)
    assert [panel.title for panel in chart.panels] == ["1M unique tokens", "3M unique tokens", "10M unique tokens"]
    for panel, unique in zip(chart.panels, TEXTS, strict=True):
        points = [series for series in panel.series if series.name]
        assert len(points) == len(SIZES) and all(series.x == pytest.approx(EPOCHS) for series in points)
        own = table().query("unique_tokens == @unique and params == 1e6")
        assert points[0].y == pytest.approx(own.loss.tolist())
        diamonds = [series for series in panel.series if series.shape == "D"]
        found = [best_epochs(turning, n, unique) for n in SIZES]
        assert [series.x[0] for series in diamonds] == [one.epochs for one in found if not one.withheld]
    assert "A diamond is the best number of epochs" in chart.sentence


@pytest.mark.parametrize("sigma", [0.0005, 0.002])
def test_a_law_of_curves_that_never_turn_says_that_its_turn_means_nothing(sigma):
    """With the smaller noise, the law turns beyond the runs only; with the larger one, within them, by noise."""
    flat = fit_runs(table(turns=False, sigma=sigma), law="onset", bootstrap=0, conventions=False)
    assert any("K, u, n, s and k of onset, with all their intervals, say nothing" in said for said in flat.warnings)
    assert any("K, u, n, s and k of onset are not determined and mean nothing" in said for said in uncertainty(flat))
    assert "No model turns upward within the runs" in repeated_chart(flat).sentence


def test_curves_that_turn_have_no_such_warning(turning):
    assert not any("mean nothing" in said for said in uncertainty(turning))


def test_intervals_that_hold_the_noise_only_are_named(turning):
    _, spending = repeated_tables([turning])
    assert NOISE_ONLY in spending.caption


def test_only_runs_that_repeat_several_texts_get_a_law_of_repeated_data():
    once = table().query("tokens == unique_tokens")
    one_text = table().query("unique_tokens == 1e6")
    assert fit_repeats(once, bootstrap=0) == fit_repeats(one_text, bootstrap=0) == {}
    few = table().query("params <= 3e6 and unique_tokens <= 3e6")  # too few sizes and texts to choose a law
    (fit,) = fit_repeats(few, bootstrap=0).values()
    assert fit.status == "refused" and "fewer than three" in fit.warnings[0]
    assert repeated_chart(fit) is None and repeated_tables([fit]) == []


def test_a_crossing_is_given_at_texts_that_both_objectives_repeat():
    laws = {
        name: fit_runs(table(objective=name, turns=name[0] == "a", level=level), law="penalty", bootstrap=0)
        for name, level in (("autoregressive", 0.97), ("masked_diffusion", 1.0))
    }
    found = overtaking(laws)
    assert found.names == ("masked_diffusion", "autoregressive")
    assert [one.U for one in found.at] == list(TEXTS)
    assert math.isfinite(found.at[0].C)
    crossings = repeated_tables(list(laws.values()), found)[-1]
    assert "masked_diffusion overtakes" in {row[-1] for row in crossings.rows}
    assert "diffusion may overtake earlier than stated" in crossings.caption


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_resampled_fits_without_a_law_say_nothing_on_the_terminal(turning):
    """The second of these two rows is that of a refit that found no law."""
    law, row = turning.surface, [turning.params[name] for name in turning.surface.params]
    rows = np.array([row, [np.nan] * len(row)])
    rows[1, 0] = np.inf
    predicted = law.predict(rows, np.log([[1e6], [1e6]]), np.log([[1e6], [1e6]]))
    assert np.isfinite(predicted[0]).all() and not np.isfinite(predicted[1]).any()
