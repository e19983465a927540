"""Names in a W&B project that many hands write: they reach tables, pages, figures and the terminal as text only."""

import csv
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from support.demo_runs import demo_runs, no_excluded
from support.hostile import NAMES, Elements
from support.wandb_cli import dlm
from support.wandb_server import ENTITY

from dlm.core.names import printable, slug
from dlm.fit.comparison import side_by_side
from dlm.fit.rows import read_runs
from dlm.fit.table import fit_runs
from dlm.plan.grid import cell_config
from dlm.report import figures
from dlm.report.page import write_fits, write_report

PROJECT = f"{ENTITY}/dlm"
COLUMNS = ("params", "tokens", "steps", "objective", "model", "data")
MAPPING = {"columns": {name: name for name in COLUMNS}, "history": {"step": "step", "val/loss": "loss"}}
SOME = (
    "<img src=x onerror=alert(1)>",
    "../../../../x",
    "\x1b[31mred\x1b]0;title\x07",
    "$\\frac$",
    "\r=x",
    "two\nlines",
    "NA",
)
FIGURES = ("isoflop", "allocation", "holdout", "cost")  # of an isoFLOP fit alone
FITTED = "=1+1 [red]\x1b[31m"  # the objective of enough runs for a law


@pytest.fixture(scope="module")
def fitted():
    """Runs, and a fit of them with figures to draw."""
    runs = demo_runs()
    return runs, fit_runs(runs, law="isoflop", bootstrap=0)


def add_runs(server):
    """Store a run of each of SOME objectives, runs of FITTED that determine a law, and one that stopped early."""
    config = {"steps": 2, "model": "half \ud800", "data": "@x"}
    for name in SOME:
        sizes = {"params": 1000, "tokens": 9000, "objective": name, "model": name}
        server.add(
            f"one{len(server.runs)}",
            rows=[{"step": 2, "loss": 3.0}],
            config=config | sizes,
            state="finished",
            group=name,
        )
    for row in demo_runs(budgets=(3e12,)).iloc[:5].itertuples():
        sizes = {"params": row.params, "tokens": row.tokens, "objective": FITTED}
        server.add(row.run_id, rows=[{"step": 2, "loss": row.loss}], config=config | sizes, state="finished")
    state = "crash\x1b[31med\nleft out b: c"
    server.add("short", rows=[{"step": 1, "loss": 3.0}], config=config | sizes, state=state)


def is_text(said):
    return all(letter in "\n\t" or letter.isprintable() for letter in said)


def test_hostile_names_are_text_from_the_server_to_the_report(server, tmp_path):
    add_runs(server)
    outside, out = tmp_path / "outside", tmp_path / "outside/a/b/c/d/out"
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(yaml.safe_dump(MAPPING))
    said = dlm(server, "collect", "--wandb", PROJECT, "--mapping", mapping, "--out", out)
    assert said.code == 0 and is_text(said.out + said.err), said
    assert "crash\\x1b[31med\\nleft out b: c" in said.out and said.out.count("\nleft out") == 0
    with open(out / "runs.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(SOME) + 5
    assert not any(cell.startswith(tuple("=+-@\t\r")) for row in rows for cell in row.values())
    assert set(read_runs(out).objective) == {*SOME, FITTED}
    for name in (FITTED, "no such \x1b[31m"):
        pins = [word for pin in ("alpha=0.35", "beta=0.35", "E=1.5") for word in ("--pin", pin)]
        law = ("--law", "chinchilla", "--bootstrap", "0", "--no-holdout", *pins)
        said = dlm(server, "fit", out, "--objective", name, *law)
        assert is_text(said.out + said.err) and said.code == (0 if name == FITTED else 2), said
        assert name == FITTED or printable(name) in said.complaint
    said = dlm(server, "report", out)
    assert said.code == 0 and is_text(said.out + said.err) and printable(FITTED) in said.out, said
    page = Elements((out / "report/report.html").read_text())
    assert all(printable(name) in page.words for name in (*SOME, FITTED)) and "img" not in dict(page.found)
    names = {path.name for path in outside.rglob("*") if path.is_file() and not path.is_relative_to(out)}
    assert not names and (out / "fits.json").is_file()


def write_page(folder, fitted, label, names):
    """Write a report with figures of one objective, and with names wherever a text may stand; return its elements."""
    runs, fit = fitted
    of = runs.assign(objective=label)
    texts = [names[place % len(names)] for place in range(len(of))]
    of = of.assign(run_id=texts, model=texts, device=texts, schedule=texts, convention=texts, role=None)
    left_out = no_excluded().reindex(range(len(names))).assign(run_id=names, status=names, reason=names)
    labelled = [replace(fit, label=label, warnings=names, notes=names)]
    write_fits(folder, labelled)
    settling = {label: [(name, name) for name in names]}
    path = write_report(
        folder, of, left_out, labelled, title=label, facts={name: name for name in names}, advice=settling
    )
    return Elements(path.read_text())


def test_a_page_of_hostile_names_has_the_elements_of_any_other_page(fitted, tmp_path):
    label, folder = '../../../../x"><script>alert(1)</script>', tmp_path / "a/b/c/d"
    usual = write_page(tmp_path / "usual", fitted, "usual", [f"name{place}" for place in range(len(NAMES))])
    shutil.rmtree(tmp_path / "usual")
    hostile = write_page(folder, fitted, label, NAMES)
    assert hostile.found == usual.found and len(hostile.ids) == len(usual.ids) == len(set(hostile.ids))
    assert all(re.fullmatch(r"[\w.-]+", one) for one in hostile.ids)
    assert all(re.fullmatch(r"#[\w-]+|figures/[\w.-]*|\.\./[\w.]+", one) for one in hostile.links)
    assert all(printable(name) in hostile.words for name in (label, *NAMES))
    drawn = {path.name for path in (folder / "report/figures").iterdir()}
    kinds = {f"{name}-{slug(label)}.{kind}" for name in FIGURES for kind in ("png", "svg", "pdf")}
    assert drawn == kinds and {path.name for path in tmp_path.rglob("*") if path.is_file()} == drawn | {
        "fits.json", "report.html"
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_a_name_as_it_is(fitted, name):
    fit = replace(fitted[1], label=name, warnings=(name,))
    for shown in (fit, side_by_side({name: fit})):
        page = Elements(shown._repr_html_())
        assert {tag for tag, _ in page.found} <= {"div", "b", "table", "tr", "th", "td", "ul", "li", "p"}
        assert printable(name) in page.words and page.found >= {("div", "class")}


def test_matplotlib_draws_a_name_as_it_is(fitted, tmp_path):
    name = "$\\frac$ a $x$ _^{ \x1b nul\0 \\"
    figure = replace(fitted[1], label=name).plot()
    description = 'a "figure" of <a> & <b>'
    svg = figures.inline_svg(figures.save(figure, tmp_path, "x")["svg"], "x", description)
    page = Elements(svg)
    assert printable(name) in page.words and page.labels == [description]


def test_a_run_on_the_server_cannot_choose_its_folder(sweep, server, tmp_path):
    _, plan = sweep
    (tmp_path / "secret").mkdir()
    names = ("../../secret", str(tmp_path / "secret"), "..", "nul\0", "y" * 300, "half \ud800")
    config = cell_config(plan.cells[0].groups, plan.cells[0].overrides)
    for number, name in enumerate(names):
        server.add(f"run{number}", config={**config, "cell_id": name, "sweep": "s"}, state="finished", group="s")
    said = dlm(server, "collect", "--wandb", PROJECT, "--out", tmp_path / "in/out")
    assert said.code == 0 and is_text(said.out + said.err), said
    assert said.out.count("cannot be the name of a file in ") == len(names)
