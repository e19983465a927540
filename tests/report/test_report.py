"""The page, the figures and the tables of a report on synthetic runs of a known law."""

import html
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from support.demo_runs import BUDGETS, demo_runs, excluded, no_excluded

from dlm.core import text
from dlm.fit.table import fit_runs, fit_sweep
from dlm.report import figures, look, published, verdict, words
from dlm.report import page as report_page
from dlm.report.charts.allocation import allocation_chart
from dlm.report.content import Material

REPLICATES = 100  # the fewest that give intervals; how wide they are is tested with the fits
TITLE = {"title": "A <b>small</b> sweep", "facts": {"cells": 21}}

FIGURES = ("isoflop", "allocation", "surface", "residuals", "holdout", "cost")  # of a finished sweep without curves


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder, runs, page and fits of a report on runs that determine the law well."""
    folder = tmp_path_factory.mktemp("good")
    runs = demo_runs()
    fits = fit_sweep(runs, bootstrap=REPLICATES)
    path = report_page.write_report(folder, runs, no_excluded(), fits, **TITLE)
    return folder, runs, path.read_text(), fits


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the page of runs, without the files of its figures: (page, fits). The fits are made if none are given."""
    monkeypatch.setattr(figures, "save", lambda figure, folder, name: {"svg": b"<svg></svg>", "png": b""})

    def written(runs, left_out=None, *, fits=None, bootstrap=0):
        fits = fits or fit_sweep(runs, bootstrap=bootstrap)
        left_out = no_excluded() if left_out is None else left_out
        path = report_page.write_report(tmp_path, runs, left_out, fits, title="any")
        return path.read_text(), fits

    return written


def without_plotly(page):
    """Return a page without plotly.js, which is not ours to check."""
    return re.sub(r'<script type="text/plain".*?</script>', "", page, flags=re.DOTALL)


def plots(page):
    """Return what plotly draws on a page, by the name of the figure."""
    found = re.findall(r'<h3 id="([^"]+)">.*?<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return {name: json.loads(plot, parse_constant=pytest.fail) for name, plot in found}


def test_the_page_stands_alone(good):
    _, _, page, _ = good
    own = without_plotly(page)
    assert not re.search(r"""src=["'](?!data:)|href=["'](?!#|figures/|\.\./)|@import|url\((?!#)""", own)
    assert len(page) < 3e6
    assert "A &lt;b&gt;small&lt;/b&gt; sweep" in page
    assert "cells: 21" in page


def test_drawings_are_valid_xml_and_their_ids_do_not_collide(good):
    _, _, page, _ = good
    svgs = re.findall(r"<svg.*?</svg>", without_plotly(page), re.DOTALL)
    assert len(svgs) == len(FIGURES)
    for svg in svgs:
        ET.fromstring(svg)
    ids = re.findall(r'\bid="([^"]+)"', "".join(svgs))
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', "".join(svgs))) <= set(ids)
    assert "#1f2933" not in "".join(svgs)  # the page's ink, in light and dark


def test_figures_are_also_written_as_files(good):
    folder = good[0] / "report" / "figures"
    names = {f"{name}-masked_diffusion.{kind}" for name in FIGURES for kind in ("png", "svg", "pdf")}
    assert {path.name for path in folder.iterdir()} == names
    heads = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert all((folder / name).read_bytes().startswith(heads[name.rsplit(".", 1)[1]]) for name in names)


def test_the_conclusion_comes_first_and_is_that_of_the_fit(good):
    _, _, page, fits = good
    lead = re.search(r'<p class="lead">(.*?)</p>', page).group(1)
    best = fits["masked_diffusion/combined"].at[3e12]
    assert lead.startswith(f"With 3e12 FLOPs, train about {text.count(best.N, digits=2)} parameters")
    assert text.count(best.D, digits=2) in lead
    low, high = best.ci["N"]
    assert f"is {text.count(low)} to {text.count(high)} for the parameters" in page
    assert page.index("<svg") > page.index(lead)
    said = re.sub(r"<[^>]+>", " ", page[: page.index("<svg")])
    for question in ("How far to trust it", "What limits it", "Proof run", "Which runs failed", "What it cost"):
        assert question in said  # before the first figure


def test_every_number_of_the_fits_is_on_the_page(good):
    _, runs, page, fits = good
    for fit in fits.values():
        shown = {name: value for name, value in fit.params.items() if name.rpartition(".")[0][-2:] in ("", "_0")}
        assert shown and all(text.number(value) in page for value in shown.values())
        assert all(text.count(best.N) in page for best in fit.at.values())
        assert all(text.count(m.D) in page for m in fit.minima)
        assert all(held["L_error"] is not None and f"{held['L_error']:+.1%}" in page for held in fit.holdout.values())
    assert all(f"{loss:.4f} ± 0.0020" in page for loss in runs["loss"])
    assert "full_masked_head" in page
    share = (runs["flops_6n"] / runs["flops"]).agg(["min", "max"])
    assert f"count {share['min']:.0%} to {share['max']:.0%}" in page


def test_the_same_input_gives_the_same_bytes(good, tmp_path):
    folder, runs, page, fits = good
    again = report_page.write_report(tmp_path, runs, no_excluded(), fits, **TITLE)
    assert again.read_text() == page
    name = "report/figures/isoflop-masked_diffusion.svg"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_page_says_what_the_data_do_not_support(write):
    runs = demo_runs(skip=[(3e12, "131k"), (3e12, "200k"), (3e12, "262k"), (3e11, "17k")])
    page, fits = write(runs, excluded("diverged at step 412"))
    assert fits["masked_diffusion/isoflop"].minima[2].reason == "edge"
    assert "diverged at step 412" in page
    assert "no runs at 3e12 FLOPs enclose that size" in page
    assert "refused: the lowest loss is at the largest size tried" in page
    assert "3e12, refused" in page  # beside its hollow curve


def test_one_budget_gives_no_law(write):
    page, fits = write(demo_runs(budgets=[1e12]), bootstrap=REPLICATES)
    assert {fit.status for fit in fits.values()} == {"refused"}
    assert "The data do not support a law yet." in page
    assert "a line needs 2 budgets" in page
    only = fits["masked_diffusion/isoflop"].minima[0]
    assert f"near {text.count(only.N, digits=2)} parameters ({text.interval(only.ci['N'], 'count')})" in page


def test_each_refit_without_top_budgets_is_named_in_words():
    runs = demo_runs(budgets=(1e11, *BUDGETS, 1e13))
    rows = report_page.page_tables.checks(fit_sweep(runs, bootstrap=0).values()).rows
    assert "the top three budgets" in {row[1] for row in rows} and not any("_" in row[1] for row in rows)


def test_noisy_runs_give_no_answer(write):
    page, _ = write(demo_runs(sigma=0.08, seed=3), bootstrap=REPLICATES)
    assert 'class="answer refusal"' in page
    assert "These runs do not determine the best size at 3e12 FLOPs." in page


def test_objectives_have_sections_of_their_own(good, write):
    one = good[3]
    other = {f"autoregressive/{fit.law}": replace(fit, label="autoregressive") for fit in one.values()}
    page, fits = write(demo_runs(objectives=("masked_diffusion", "autoregressive")), fits={**one, **other})
    assert [page.index(f'<h2 id="{name}">') for name in ("masked_diffusion", "autoregressive")]
    assert len(fits) == 4
    beside = page[page.index(">Side by side<") : page.index('<h2 id="masked_diffusion"')]
    assert all(text.count(fit.at[3e12].N) in beside for fit in fits.values())
    assert beside.count('<td class="word">Autoregressive</td>') == 2
    assert "upper bound" in beside


def test_any_table_of_runs_gives_a_report(write):
    runs = demo_runs()[["params", "tokens", "loss", "flops", "budget"]]
    page, _ = write(runs, pd.DataFrame(columns=["reason"]))
    assert "The runs do not say how their FLOPs were counted" in page
    assert 'class="lead"' in page


def test_the_script_draws_what_the_drawing_for_paper_shows(good):
    _, runs, page, _ = good
    found = plots(page)
    assert found.keys() == {f"{name}-masked_diffusion" for name in FIGURES}
    points = [one for one in found["isoflop-masked_diffusion"]["data"] if one["mode"] == "markers"]
    drawn = {(x, y) for one in points for x, y in zip(one["x"], one["y"], strict=True)}
    assert drawn >= {(n, float(f"{loss:.7g}")) for n, loss in zip(runs["params"], runs["loss"], strict=True)}
    assert {run_id for run_id in runs["run_id"] if run_id in page} == set(runs["run_id"])
    lines = {one["name"] for one in found["allocation-masked_diffusion"]["data"] if one["showlegend"]}
    assert lines == {"isoFLOP curves", "isoFLOP minima", "combined law"}


def test_names_that_a_browser_would_obey_stay_text(write):
    evil = "</script><script>alert(1)</script>&日本 $x$"
    runs = demo_runs().assign(run_id=lambda table: evil + table["run_id"], model=evil)
    page, _ = write(runs, excluded(evil), fits={"isoflop": fit_runs(runs, law="isoflop", bootstrap=0)})
    assert "<script>alert" not in page
    (plot,) = (one for name, one in plots(page).items() if name.startswith("isoflop-"))
    hover = [said for trace in plot["data"] for said in trace["hovertext"]]
    assert any("&lt;/script&gt;" in one and "日本 $x$" in one for one in hover)


def test_without_javascript_every_figure_and_table_is_there(good):
    """The script hides a drawing only where it has drawn the figure itself."""
    _, runs, page, fits = good
    still = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    drawings = re.findall(r'<figure class="chart".*?</figure>', still, re.DOTALL)
    assert len(drawings) == len(FIGURES)
    assert all(re.search(r'class="static">\s*(<svg|<img)', drawing) for drawing in drawings)
    assert "figure .live, figure.drawn .static { display: none; }" in still
    tables = [report_page.page_tables.runs(runs), report_page.page_tables.parameter_table(fits.values())]
    assert all(f">{html.escape(cell)}</td>" in still for table in tables for row in table.rows for cell in row)


def test_without_a_finished_run_the_page_shows_the_plan(tmp_path):
    runs = demo_runs()
    plan = runs[["run_id", "model", "params", "tokens", "budget"]].to_dict("records")
    page = report_page.write_report(
        tmp_path, runs.iloc[:0], excluded("crashed"), {}, title="any", plan=plan
    ).read_text()
    assert "No run has finished yet: there is nothing to fit." in page
    assert f"0 of {len(plan)} planned cells can be used" in page
    assert all(row["run_id"] in page for row in plan)
    assert "<script>" not in page  # nothing to draw


def test_the_cost_is_stated_against_the_plan(write, tmp_path):
    runs = demo_runs()
    runs["gpu_hours"] = 2.0
    estimate = {run_id: {"hours": 1.0, "gpu_hours": 1.0} for run_id in runs["run_id"][:10]}
    page = report_page.write_report(tmp_path, runs, no_excluded(), {}, title="any", estimate=estimate).read_text()
    of_ten = "Of these, 10 have an estimate: they cost 20 GPU-hours, and the plan expected 10 GPU-hours (+100%)."
    assert page.count(f"{len(runs)} runs cost {2 * len(runs)} GPU-hours. {of_ten}") == 1
    assert f"The runs that can be used took {text.flops(runs['flops'].sum())} training FLOPs." in page


def test_the_cost_counts_failed_runs_as_its_figure_does(write):
    runs, failed = demo_runs().assign(gpu_hours=2.0), excluded("diverged").assign(gpu_hours=7.0)
    failed["objective"] = "masked_diffusion"
    page, _ = write(runs, failed)
    assert page.count(f"{len(runs) + len(failed)} runs cost {2 * len(runs) + 7 * len(failed)} GPU-hours") == 2


def test_the_cost_counts_the_steps_of_a_trunk_once(tmp_path):
    runs = demo_runs().assign(gpu_hours=0.0)
    runs["parent"] = [None, *["trunk"] * (len(runs) - 1)]
    shares = dict(zip(runs["run_id"], [1.0, *[0.25] * (len(runs) - 1)], strict=True))
    seconds = runs["tokens"] / runs["tokens_per_sec"] * list(shares.values())
    estimate = {name: {"hours": 1.0, "gpu_hours": 0.0, "own_share": share} for name, share in shares.items()}
    points = verdict.of_all(runs, no_excluded(), estimate=estimate, planned=())
    spent, cost = points[-1].answer
    flops = (runs["flops"] * list(shares.values())).sum()
    assert spent == f"The runs that can be used took {text.flops(flops)} training FLOPs."
    assert f"{len(runs)} runs cost {text.duration(seconds.sum())} of process time; the plan expected" in cost
    spent, cost = verdict.of_all(runs, no_excluded(), estimate={}, planned=())[-1].answer
    assert "counted again for each of its branches" in spent and cost.startswith("1 run cost ")


def test_process_time_is_stated_in_a_unit_that_one_reads():
    runs = demo_runs().assign(tokens=6e5, tokens_per_sec=1e4)  # 60 s each
    cost = verdict.of_all(runs, no_excluded(), estimate={}, planned=())[-1]
    assert cost.answer[-1].startswith(f"{len(runs)} runs cost {len(runs)} min of process time; ")


def test_what_limits_the_answer_is_said_once():
    low = BUDGETS[0]  # its runs lie on one side of the minimum
    runs = demo_runs(skip=[(low, name) for name in ("4k", "8k", "17k", "33k", "66k")])
    fits = {fit.law: fit for fit in fit_sweep(runs, bootstrap=0).values()}
    refused = [minimum for minimum in fits["isoflop"].minima if minimum.reason]
    assert refused
    advice = [(f"{one.why}. Another size would show it.", "dlm sweep any") for one in refused]
    material = Material(label="", fits=fits, runs=runs, all_runs=runs, excluded=no_excluded())
    assert any(refused[0].why in line for line in verdict.reservations(material))
    said = verdict.points(replace(material, advice=advice), "any")
    (limits,) = (point for point in said if point.question == "What limits it")
    assert " ".join(limits.answer).count(refused[0].why) == 1


def test_a_page_of_many_cells_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "METADATA", {kind: {} for kind in ("png", "svg")})  # the page holds no PDF
    runs = demo_runs()
    many = pd.concat([runs.assign(run_id=runs["run_id"] + f"-{copy}") for copy in range(2000 // len(runs) + 1)])
    steps = np.unique(np.geomspace(1, 1000, 60).astype(int))
    curves = {"tokens": steps * 1e6, "train/loss": 3 + 5 / steps, "val/loss": 3 + 5 / steps}
    history = pd.concat([pd.DataFrame(curves).assign(run_id=name) for name in many["run_id"]])
    fits = {"isoflop": fit_runs(runs, law="isoflop", bootstrap=0)}
    path = report_page.write_report(tmp_path, many, no_excluded(), fits, title="any", history=history)
    page = path.read_text()
    assert len(many) > 2000 and path.stat().st_size < 10e6
    assert all(f">{name}<" in page for name in many["run_id"])
    curve = plots(page)["curves-masked_diffusion"]["data"]
    assert curve and all(run in str(curve) for run in many["run_id"].iloc[[0, -1]])


def test_a_published_law_is_drawn_only_beside_runs_that_count_alike(write):
    def drawn(runs):
        fits = {"combined": fit_runs(runs, law="chinchilla", bootstrap=0)}
        page, _ = write(runs, fits=fits)
        (plot,) = (one for name, one in plots(page).items() if name.startswith("allocation-"))
        return "Chinchilla, text" in str(plot["data"]), page

    runs = demo_runs()[["params", "tokens", "loss", "budget"]]
    all_counted = runs.assign(params_total=runs["params"], flops=6 * runs["params"] * runs["tokens"])
    assert drawn(all_counted)[0]
    is_drawn, page = drawn(demo_runs())
    assert not is_drawn and "No published law is drawn, because" in page


def test_where_nothing_tells_how_runs_count_the_page_says_why_no_published_law_is_drawn():
    runs = demo_runs()
    runs.loc[0, "convention"] = "6n"
    drawn, (note,) = published.beside(runs)
    assert drawn == () and note.startswith("No published law is drawn, because it is not known how these runs count")


def test_fits_json_is_what_the_command_prints(good, tmp_path):
    fits = good[3]
    said = json.loads(report_page.write_fits(tmp_path, fits).read_text(), parse_constant=pytest.fail)
    assert said == json.loads(json.dumps({name: fit.to_dict() for name, fit in fits.items()}))
    listed = json.loads(report_page.write_fits(tmp_path, list(fits.values())).read_text())
    assert listed.keys() == fits.keys()


def test_tables_for_notebooks_carry_the_numbers_of_the_fits(good):
    _, runs, _, fits = good
    tables = report_page.tables(runs, fits)
    best = tables["best"].set_index(["fit", "flops"])
    for name, fit in fits.items():
        for c, expected in fit.at.items():
            row = best.loc[(name, c)]
            assert (row["N"], row["N_low"]) == (expected.N, expected.ci["N"][0])
            assert row["L"] == pytest.approx(expected.L, nan_ok=True)
            assert np.isnan(row["L"]) == bool(expected.withheld)
    assert len(tables["minima"]) == len(BUDGETS)
    assert len(tables["runs"]) == len(runs)
    assert set(tables["parameters"]["parameter"]) >= {"chinchilla_0.E", "skaling_1.alpha", "a", "b", "N0"}


def test_isoflop_figure_marks_the_minima(good):
    _, runs, _, fits = good
    isoflop = fits["masked_diffusion/isoflop"]
    axes = figures.isoflop_figure(isoflop, loss_se=runs["loss_se"].tolist()).axes[0]
    marks = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(marks, [(m.N, m.L) for m in isoflop.minima])
    dots = np.concatenate([line.get_xydata() for line in axes.lines if line.get_marker() in look.BUDGET_SHAPES])
    np.testing.assert_allclose(np.sort(dots[:, 1]), np.sort(runs["loss"]))


def test_allocation_figure_draws_each_law(good):
    fits = good[3]
    figure = figures.allocation_figure(fits)
    for axes, key in zip(figure.axes, "NDL", strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        for law, label in (("isoflop", "isoFLOP curves"), ("combined", "combined law")):
            first = lines[label].get_xydata()[0]
            best = fits[f"masked_diffusion/{law}"].at[3e11]
            assert tuple(first) == pytest.approx((3e11, getattr(best, key)), rel=1e-9)


def test_importing_the_report_loads_no_pandas_matplotlib_jinja_or_torch():
    code = "import sys, dlm.report; print([m for m in ('pandas', 'matplotlib', 'jinja2', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def tuned(*, at, rates=(1e-3, 3e-3, 1e-2), best=3e-3):
    """Runs with one rate, and at the budgets ``at`` copies of the best run with these rates, lowest at ``best``."""
    runs = demo_runs().assign(learning_rate=3e-3)
    lowest = [runs[runs["budget"] == budget].sort_values("loss").iloc[0] for budget in at]
    extra = [
        {**row, "learning_rate": rate, "loss": row["loss"] * (1 + (rate != best) / 100)}
        for row in lowest
        for rate in rates
    ]
    others = runs.drop(index=[row.name for row in lowest])
    return pd.concat([others, pd.DataFrame(extra)], ignore_index=True)


def test_exponents_are_called_untuned_unless_the_rate_was_tuned_at_both_ends():
    low, _, high = BUDGETS
    assert words.untuned(tuned(at=[low, high])) == ""
    said = "Untuned: these exponents describe this recipe"
    assert words.untuned(tuned(at=[low])).startswith(said)
    assert words.untuned(tuned(at=[low, high], best=1e-2)).startswith(said)  # the best rate is at the edge
    assert words.untuned(tuned(at=[low, high], rates=(3e-3, 1e-2))).startswith(said)
    by_size = demo_runs().assign(learning_rate=lambda runs: 1 / runs["params"])  # a rate for each size tunes nothing
    assert words.untuned(by_size).startswith(said)
    assert words.untuned(demo_runs()) == ""  # the rates are not known


def test_the_page_shows_the_exponents_under_other_counts_of_n_and_c(write):
    def page_of(runs):
        return write(runs, fits={"isoflop": fit_runs(runs, law="isoflop", bootstrap=0)})[0]

    runs = demo_runs()
    page = page_of(runs.assign(params_total=2 * runs["params"] + 1000))
    head = "What the exponents would be if N and C were counted otherwise"
    table = page.split(head, 1)[1].split("</table>", 1)[0]
    assert table.count("<caption>") == 1 and "b of the isoFLOP curves" in table
    assert "blocks, head and input embedding" in table and "full_masked_head" in table
    assert head not in page_of(runs[["params", "tokens", "loss", "budget"]])


def test_the_page_says_what_tuning_did_to_the_exponents_or_could_do():
    untuned = fit_runs(tuned(at=[]), law="isoflop", bootstrap=0)
    said = words.untuned(tuned(at=[]), [untuned])
    assert said.startswith("Untuned: these exponents describe this recipe") and "tuning would move a by" in said
    with_term = replace(untuned, tuning={"sentence": "the losses are those at the best rate"})
    assert words.untuned(tuned(at=[]), [with_term, untuned]) == "The losses are those at the best rate."


def test_the_figure_of_one_law_does_not_speak_of_two(good):
    fits = [*good[3].values()]
    assert allocation_chart(fits).sentence.startswith("Two ways")
    assert allocation_chart(fits[:1]).sentence.startswith("The best use of each compute by the one law")
