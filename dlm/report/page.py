"""Write the report of a sweep: fits.json, the figures and one self-contained page, report.html.

pandas, matplotlib, plotly and jinja2 are imported by the functions that need them.
"""

from __future__ import annotations

import base64
import gzip
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core import names
from dlm.core.files import write_atomic, write_json
from dlm.core.objectives import OBJECTIVES
from dlm.fit.fitted import Minimum, Optimum
from dlm.fit.points import UNBOUNDED
from dlm.fit.proof import Proof
from dlm.fit.result import FitResult
from dlm.report import figures, page_tables, verdict, words
from dlm.report.content import CONTENT, Material
from dlm.report.look import FAINT, INK, PAPER, Paper
from dlm.report.placed import Placed, for_script, placed
from dlm.report.together import Part, together

if TYPE_CHECKING:
    import jinja2
    import pandas as pd

PAGE = "page.html.j2"
RELOADS = re.compile(r'<meta http-equiv="refresh"[^>]*>\n|, and loads itself again every \d+ seconds')
NO_LABEL = "runs"  # stands in the names of files for a label that is empty
FILES = {  # of the folder of the sweep, beside the folder of the page
    "runs.csv": "the runs",
    "excluded.csv": "the runs that were left out",
    "fits.json": "the fits",
    "history.parquet": "the curves of all runs",
    "plan.json": "the plan",
}


def write_fits(sweep_dir: Path, fits: figures.Fits) -> Path:
    """Write fits.json, with one object per fit as `dlm fit --json` prints it, and return the path of the file."""
    path = Path(sweep_dir) / "fits.json"
    write_json(path, {name: fit.to_dict() for name, fit in _named(fits).items()})
    return path


def write_report(
    sweep_dir: Path,
    runs: pd.DataFrame,
    excluded: pd.DataFrame,
    fits: figures.Fits,
    *,
    title: str,
    facts: Mapping[str, object] | None = None,
    proofs: Mapping[str, Proof] | None = None,
    advice: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    history: pd.DataFrame | None = None,
    plan: Sequence[Mapping[str, Any]] = (),
    estimate: Mapping[str, Mapping[str, Any]] | None = None,
    versions: Mapping[str, str] | None = None,
    definition: str = "",
    paper: Paper | None = None,
    repeats: Mapping[str, FitResult] | None = None,
    standing: Sequence[str] = (),
    reload_sec: float | None = None,
) -> Path:
    """Write report/report.html and report/figures/*.{png,svg,pdf}. The page needs no network.

    Its own scripts make the figures interactive. Without scripts, a browser shows the drawings and all tables.

    Args:
        sweep_dir: The folder of the sweep.
        runs: The rows of runs.csv, or any table with the columns params, tokens and loss; may be empty.
        excluded: The rows of excluded.csv.
        fits: The fits of one or several objectives (``FitResult.label``); may be empty.
        title: The title of the page.
        facts: Entries of the line under the title besides the numbers of runs and of excluded runs.
        proofs: The proof run of each objective, by its name.
        advice: What would settle the questions that the fits of an objective leave open, by its name: pairs of a
            sentence and a command, which may be ''.
        history: The rows of history.parquet.
        plan: The cells of the plan, each as a row of values by column; shown while no run has finished.
        estimate: What the plan expects each cell to cost, as estimate.json has it.
        versions: What made the page, such as the versions of dlm and torch, the commit and the date, by name.
        definition: The exact definition of the sweep, as text.
        paper: Also write report/figures/SIZE/*, the same figures for a paper and for slides.
        repeats: The laws of repeated data of `fit_repeats`, if runs repeat texts.
        standing: Sentences on how far the sweep is; empty once all of its cells are done.
        reload_sec: A browser loads the page again after so many seconds, and the page says when it was made. None: it
            does neither.

    Returns:
        The path of the page.
    """
    folder = Path(sweep_dir) / "report"
    listed = list(_named(fits).values())
    budgets = sorted(runs["budget"].dropna().unique().tolist()) if "budget" in runs else []
    materials = [
        Material(
            label=label,
            fits={fit.law: fit for fit in listed if fit.label == label},
            runs=_of(label, runs[runs["role"].isna()] if "role" in runs else runs),
            all_runs=_of(label, runs),
            excluded=_of(label, excluded),
            history=history,
            estimate=estimate or {},
            proof=(proofs or {}).get(label),
            advice=(advice or {}).get(label, ()),
            budgets=budgets,
        )
        for label in dict.fromkeys(fit.label for fit in listed)
    ]
    sections = [_section(material, folder / "figures", paper) for material in materials]
    parts = placed_parts(together(_named(fits), repeats or {}), folder / "figures", paper)
    page = template(PAGE).render(
        title=title,
        facts={"runs": len(runs), "left out": len(excluded), **(facts or {})},
        sections=sections,
        parts=parts,
        standing=standing,
        reload_sec=reload_sec,
        made="" if reload_sec is None else time.strftime("%Y-%m-%d %H:%M:%S"),
        verdict=verdict.of_all(runs, excluded, estimate=estimate or {}, planned=[str(cell["run_id"]) for cell in plan]),
        side_by_side=page_tables.side_by_side(listed) if len(sections) > 1 else None,
        runs=page_tables.runs(runs),
        excluded=page_tables.excluded(excluded),
        plan=page_tables.plan(plan) if runs.empty else None,
        refused=words.refused(listed),
        convention=words.convention(runs),
        has_bound="objective" in runs
        and any(OBJECTIVES[name].is_bound for name in OBJECTIVES.keys() & runs["objective"]),
        files={name: said for name, said in FILES.items() if (Path(sweep_dir) / name).is_file()},
        versions={**(versions or {}), **_code_of(runs)},
        definition=definition,
        **scripts(has_figures=any(section["charts"] for section in sections) or bool(parts)),
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def _code_of(runs: pd.DataFrame) -> dict[str, str]:
    """Return the commits of the code that trained the runs."""
    shas = sorted(set(runs["git_sha"].dropna().astype(str))) if "git_sha" in runs else []
    return {"commits of the runs": ", ".join(sha[:12] for sha in shas)} if shas else {}


def _of(label: str, table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one objective; all rows if the table or the fits name none."""
    return table[table["objective"] == label] if label and "objective" in table else table


def template(name: str) -> jinja2.Template:
    """Return a template of this folder, which shows texts from elsewhere without obeying them."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    return environment.get_template(name)


def scripts(*, has_figures: bool) -> dict[str, str]:
    """Return what draws the figures: plotly.js, the script of the page, and the colours that the script replaces."""
    return {
        "colours": for_script({INK: "--ink", FAINT: "--faint", PAPER: "--paper"}),
        "plotly": _plotly() if has_figures else "",
        "script": (Path(__file__).parent / "page.js").read_text(encoding="utf-8"),
    }


def _plotly() -> str:
    """Return plotly.js compressed, which makes a page of 6 MB one of 3 MB; page.js unpacks it."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def stop_reloading(page: Path) -> None:
    """Let browsers no longer reload a page that was written with ``reload_sec``; nothing happens without a page."""
    if page.is_file():
        written = page.read_text(encoding="utf-8")
        if RELOADS.search(written):
            write_atomic(page, RELOADS.sub("", written))


def placed_parts(parts: Sequence[Part], folder: Path, paper: Paper | None) -> list[dict[str, Any]]:
    """Return parts across objectives by the variable names of the template, and save their figures."""
    return [
        {
            "name": part.name,
            "title": part.title,
            "figure": None if part.chart is None else placed(part.chart, part.name, folder, paper=paper),
            "tables": part.tables,
            "notes": part.notes,
        }
        for part in parts
    ]


def _section(material: Material, folder: Path, paper: Paper | None) -> dict[str, Any]:
    """Return the content of the section on one training objective, by the variable names of the template."""
    fits, label = [*material.fits.values()], material.label
    slug = names.slug(label, reserved=(NO_LABEL,)) if label else NO_LABEL
    charts = _charts(material, slug, folder, paper)
    has_checks = any(chart.name == f"holdout-{slug}" for chart in charts)  # whose tables say the same
    return {
        "name": words.objective(label),
        "slug": slug,
        "conclusion": words.conclude(fits),
        "points": verdict.points(material, slug),
        "proof": material.proof,
        "proof_table": None if material.proof is None else page_tables.proof(material.proof),
        "advice": material.advice,
        "untuned": words.untuned(material.runs, fits),
        "charts": charts,
        "parameters": page_tables.parameter_table(fits),
        "conventions": page_tables.conventions(fits),
        "checks": page_tables.checks(() if has_checks else fits),
        "reservations": verdict.rest_of(verdict.reservations(material), material.advice),
        "methods": [words.method(fit) for fit in fits if fit.params],
        "notes": words.notes(fits),
        "scatter": next((f"{fit.noise.residual:.1%}" for fit in fits if math.isfinite(fit.noise.residual)), ""),
    }


def _charts(material: Material, slug: str, folder: Path, paper: Paper | None) -> list[Placed]:
    """Draw and save the figures that this material allows."""
    found = ((item, item.chart(material)) for item in CONTENT)
    return [
        placed(chart, slug, folder, paper=paper, tables=item.tables(material))
        for item, chart in found
        if chart is not None
    ]


def _shown(value: object) -> object:
    """Show what a text holds that a browser would obey; HTML of the template itself (markupsafe) stays as it is."""
    return names.printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def tables(runs: pd.DataFrame, fits: figures.Fits) -> dict[str, pd.DataFrame]:
    """Return the numbers of the report as data frames for notebooks: 'best', 'minima', 'parameters' and 'runs'."""
    import pandas as pd

    best, minima, parameters = [], [], []
    for name, fit in _named(fits).items():
        for flops, optimum in fit.at.items():
            extra = {"regret": optimum.regret, "reach": optimum.reach}
            best.append({"fit": name, "flops": flops, **_numbers(optimum), **extra})
        for minimum in fit.minima:
            minima.append({"fit": name, "budget": minimum.budget, **_numbers(minimum), "reason": minimum.reason})
        for key, value in page_tables.parameters_of(fit).items():
            low, high = fit.ci.get(key, UNBOUNDED)
            parameters.append({"fit": name, "parameter": key, "value": value, "low": low, "high": high})
    found = {"best": best, "minima": minima, "parameters": parameters}
    return {name: pd.DataFrame(rows) for name, rows in found.items()} | {"runs": runs.copy()}


def _numbers(best: Optimum | Minimum) -> dict[str, float]:
    """Return N, D and L, and the ends of their intervals as N_low, N_high and so on."""
    numbers = {"N": best.N, "D": best.D, "L": best.L}
    for key, (low, high) in best.ci.items():
        numbers |= {f"{key}_low": low, f"{key}_high": high}
    return numbers


def _named(fits: figures.Fits) -> dict[str, FitResult]:
    if isinstance(fits, Mapping):
        return dict(fits)
    return {f"{fit.label}/{fit.law}" if fit.label else fit.law: fit for fit in fits}
