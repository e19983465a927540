import json
import subprocess
import sys

import numpy as np
import pytest

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit import FitResult, bootstrap, fit_isoflop, fit_surface, side_by_side

KEYS = {"law", "loss", "space", "delta", "n", "params", "ci", "objective", "allocation", "at", "holdout", "status"}


@pytest.fixture(scope="module")
def fits(world):
    n, d, loss, c = world.grid([1e18, 1e19, 1e20], sizes=6, sigma=0.003)
    surface = fit_surface(n, d, loss, budget=c, at=[1e20, 1e22], label="masked_diffusion")
    return [bootstrap(f, replicates=300) for f in (surface, fit_isoflop(n, d, loss, c, at=[1e20]))]


def test_json_has_the_promised_keys_and_no_nan(fits):
    for result in fits:
        said = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert said.keys() >= KEYS | {"warnings"}
        assert set(said["allocation"]) == {"a", "b", "how"}
        assert set(said["at"]["1e+20"]) >= {"N", "D", "L", "ci"}
    surface = fits[0].to_dict()
    assert set(surface["params"]) == {"E", "A", "B", "alpha", "beta"}
    assert surface["at"]["1e+22"]["ci"]["L"] == [None, None]
    assert "one form alone" in surface["at"]["1e+22"]["withheld"]


def test_text_and_html_say_what_is_known(fits):
    surface = fits[0]
    report, page = surface.report(), surface._repr_html_()
    for face in (report, page):
        assert text.number(surface.params["alpha"], digits=6) in face
        assert text.count(surface.at[1e20].N) in face
    assert "masked_diffusion" in report
    assert all(f"warning: {w}" in report for w in surface.warnings)
    assert "nan" not in (report + page).replace("finance", "")


def test_side_by_side_shows_the_disagreement(fits):
    surface, line = fits
    both = side_by_side({"surface": surface, "line": line}, at=1e20)
    sizes = [surface.at[1e20].N, line.at[1e20].N]
    assert both.spread == pytest.approx(max(sizes) / min(sizes))
    assert f"a factor of {both.spread:.2f}" in both.report()
    elsewhere = side_by_side(fits, at=3e19).rows  # not among the reported C: computed from the parameters
    assert pytest.approx(side_by_side([fit_again(surface)], at=3e19).rows[0].N) == elsewhere[0].N
    assert "<table>" in both._repr_html_()
    with pytest.raises(UserError, match="nothing to set side by side"):
        side_by_side([])


def fit_again(result):
    p = result.points
    return fit_surface(p.params, p.tokens, p.loss, at=[3e19])


@pytest.mark.parametrize(
    ("value", "shown"), [(33000, "33k"), (1234567, "1.23M"), (999_999, "1M"), (42, "42"), (np.nan, "not known")]
)
def test_counts_are_read_easily(value, shown):
    assert text.count(value) == shown


def test_flops_keep_their_exponent():
    assert [text.flops(c) for c in (3e11, 1.25e16, 1e21)] == ["3e11", "1.25e16", "1e21"]


def test_import_brings_numpy_only():
    heavy = "pandas matplotlib torch scipy lightning"
    code = f"import sys, dlm.fit; print([m for m in {heavy.split()!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_plot_shows_points_and_law(fits, tmp_path):
    for k, result in enumerate(fits):
        figure = result.plot()
        figure.savefig(tmp_path / f"{k}.png")
        assert len(figure.axes) >= 2
        assert figure.axes[0].get_xscale() == "log"
    with pytest.raises(UserError, match="nothing to draw"):
        FitResult(law="isoflop", n=0).plot()
