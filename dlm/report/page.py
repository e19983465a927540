"""report: fits and records -> fits.json, figures and one self-contained report.html. Called by cli and notebooks.

pandas, matplotlib and jinja2 are imported by the functions that need them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.core.files import write_atomic, write_json
from dlm.fit.fitted import Minimum, Optimum
from dlm.fit.laws import LAW_NAMES
from dlm.fit.result import FitResult
from dlm.report import figures, words
from dlm.report.figures import allocation_figure, isoflop_figure

if TYPE_CHECKING:
    import pandas as pd


__all__ = ["allocation_figure", "isoflop_figure", "tables", "write_fits", "write_report"]


Fits = Mapping[str, FitResult] | Iterable[FitResult]


BEST_HEADS = ("parameters N*", "tokens D*", "D*/N*", "loss L*")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as the page shows it: heads, rows of text, and which columns are words (the others are numbers)."""

    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: frozenset[int] = frozenset({0})
    caption: str = ""
    is_wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """Everything the page says about one training objective."""

    name: str
    slug: str
    answer: words.Answer
    svgs: dict[str, str] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    reservations: list[str] = field(default_factory=list)
    how: list[str] = field(default_factory=list)


def write_fits(sweep_dir: Path, fits: Fits) -> Path:
    """fits.json: one object per fit, as `dlm fit --json` prints it."""
    path = Path(sweep_dir) / "fits.json"
    write_json(path, {name: fit.to_dict() for name, fit in _named(fits).items()})
    return path


def write_report(
    sweep_dir: Path,
    runs: pd.DataFrame,
    excluded: pd.DataFrame,
    fits: Fits,
    *,
    title: str,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write report/report.html and report/figures/*.{png,svg,pdf}; return the path of the page.

    runs, excluded: runs.csv and excluded.csv as collected; fits: of one or several objectives (`FitResult.label`);
    facts: what else the head of the page should say. The page needs no network and no script.
    """
    import jinja2

    folder = Path(sweep_dir) / "report"
    sections = [_section(name, group, runs, folder / "figures") for name, group in _grouped(fits).items()]
    template = (Path(__file__).parent / "page.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(template).render(
        title=title,
        facts={"runs": len(runs), "left out": len(excluded), **(facts or {})},
        sections=sections,
        several=len(sections) > 1,
        side_by_side=_side_by_side(_named(fits)) if len(sections) > 1 else None,
        bound=words.BOUND,
        runs=_runs(runs),
        excluded=_excluded(excluded),
        refused=words.refused(_named(fits).values()),
        convention=words.convention(runs),
        glossary=words.glossary(runs),
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def tables(runs: pd.DataFrame, fits: Fits) -> dict[str, pd.DataFrame]:
    """The report's numbers as DataFrames, for notebooks: 'best', 'minima', 'parameters' and 'runs'."""
    import pandas as pd

    named = _named(fits)
    best = [
        {"fit": name, "flops": c, "N": o.N, "D": o.D, "L": o.L, **_ends(o.ci), "regret": o.regret, "reach": o.reach}
        for name, fit in named.items()
        for c, o in fit.at.items()
    ]
    minima = [
        {"fit": name, "budget": m.budget, "N": m.N, "D": m.D, "L": m.L, **_ends(m.ci), "reason": m.reason}
        for name, fit in named.items()
        for m in fit.minima
    ]
    parameters = [
        {"fit": name, "parameter": key, "value": value, "low": low, "high": high}
        for name, fit in named.items()
        for key, value in {**fit.params, "a": fit.allocation.a, "b": fit.allocation.b}.items()
        for low, high in [fit.ci.get(key, (float("nan"), float("nan")))]
    ]
    found = {"best": pd.DataFrame(best), "minima": pd.DataFrame(minima), "parameters": pd.DataFrame(parameters)}
    return {**found, "runs": runs.copy()}


def _ends(ci: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {
        f"{key}_{side}": value for key, pair in ci.items() for side, value in zip(("low", "high"), pair, strict=True)
    }


def _named(fits: Fits) -> dict[str, FitResult]:
    if isinstance(fits, Mapping):
        return dict(fits)
    return {f"{fit.label}/{fit.law}" if fit.label else fit.law: fit for fit in fits}


def _grouped(fits: Fits) -> dict[str, list[FitResult]]:
    groups: dict[str, list[FitResult]] = {}
    for fit in _named(fits).values():
        groups.setdefault(fit.label, []).append(fit)
    return groups


def _section(name: str, fits: list[FitResult], runs: pd.DataFrame, folder: Path) -> Section:
    own = runs[runs["objective"] == name] if name and "objective" in runs else runs
    slug = name or "runs"
    by_law = {fit.law: fit for fit in fits}
    return Section(
        name=words.objective(name),
        slug=slug,
        answer=words.answer(fits),
        svgs=_figures(slug, by_law, own, folder),
        tables={
            "best": _best(by_law),
            "minima": _minima(by_law),
            "parameters": _parameters(fits),
            "checks": _checks(fits),
        },
        reservations=words.reservations(fits),
        how=[f"{LAW_NAMES[f.law]}: {words.method(f)}" for f in fits if f.params],
    )


def _figures(slug: str, fits: Mapping[str, FitResult], runs: pd.DataFrame, folder: Path) -> dict[str, str]:
    """Draw, save and inline what can be drawn of these fits."""
    drawn = {}
    isoflop, surface = fits.get("isoflop"), fits.get("chinchilla")
    if isoflop is not None and isoflop.points is not None:
        loss_se = runs["loss_se"].astype(float).tolist() if "loss_se" in runs and len(runs) == isoflop.n else None
        drawn["isoflop"] = isoflop_figure(isoflop, surface, loss_se=loss_se)
    if any(fit.params for fit in fits.values()):
        drawn["allocation"] = allocation_figure(fits)
    for name, figure in drawn.items():
        figures.save(figure, folder, f"{name}-{slug}")
    said = {"isoflop": "Loss over model size, one curve per budget", "allocation": "N*, D* and L* against compute"}
    return {name: figures.inline_svg(figure, f"{name}-{slug}", said[name]) for name, figure in drawn.items()}


def _best(fits: Mapping[str, FitResult]) -> Table:
    """The best use of each C, method beside method."""
    levels = sorted({c for fit in fits.values() for c in fit.at})
    rows = [
        (words.place(c, fit.at[c]), words.method_name(fit), *_optimum(fit.at[c]))
        for c in levels
        for fit in fits.values()
        if c in fit.at
    ]
    return Table(heads=("compute C", "by", *BEST_HEADS), rows=rows, words=frozenset({0, 1}))


def _side_by_side(fits: Mapping[str, FitResult]) -> Table:
    """All objectives at the highest C that all of them were run at."""
    usable = [fit for fit in fits.values() if fit.at and fit.points is not None]
    inside = [{c for c in fit.at if fit.points is not None and c <= 1.05 * fit.points.budgets()[-1]} for fit in usable]
    common = set.intersection(*inside) if inside else set()
    top = max(common, default=0.0)
    rows = [(words.objective(f.label), words.method_name(f), *_optimum(f.at[top])) for f in usable if top in f.at]
    caption = f"The best use of {text.flops(top)} FLOPs."
    return Table(heads=("objective", "by", *BEST_HEADS), rows=rows, words=frozenset({0, 1}), caption=caption)


def _optimum(best: Optimum) -> tuple[str, ...]:
    sizes = (_with_ends(getattr(best, k), best.ci.get(k), "count") for k in "ND")
    loss = f"withheld: {best.withheld}" if best.withheld else _with_ends(best.L, best.ci.get("L"), "number")
    return (*sizes, text.count(best.D / best.N, digits=2), loss)


def _with_ends(value: float, ends: tuple[float, float] | None, style: str) -> str:
    shown = text.count(value) if style == "count" else text.number(value)
    return f"{shown} ({text.interval(ends, style)})" if ends is not None else shown


def _minima(fits: Mapping[str, FitResult]) -> Table:
    minima = fits["isoflop"].minima if "isoflop" in fits else ()
    heads = ("budget", "runs", "parameters N*", "tokens D*", "loss L*", "verdict")
    return Table(heads=heads, rows=[_minimum(m) for m in minima], words=frozenset({0, 5}))


def _minimum(minimum: Minimum) -> tuple[str, ...]:
    head = (text.flops(minimum.budget), str(minimum.num_points))
    if not minimum.usable:
        return (*head, "–", "–", "–", f"refused: {minimum.detail.split(': ', 1)[1]}")
    sizes = (_with_ends(getattr(minimum, k), minimum.ci.get(k), "count") for k in "ND")
    return (*head, *sizes, _with_ends(minimum.L, minimum.ci.get("L"), "number"), "interior minimum")


def _parameters(fits: Iterable[FitResult]) -> Table:
    rows = [
        (
            words.method_name(fit),
            name,
            text.number(value, digits=4),
            text.interval(fit.ci.get(name)),
            words.PARAMETERS[name],
        )
        for fit in fits
        if fit.params
        for name, value in {**fit.params, "a": fit.allocation.a, "b": fit.allocation.b}.items()
    ]
    heads = ("fit", "parameter", "value", "95 % interval", "meaning")
    return Table(heads=heads, rows=rows, words=frozenset({0, 1, 4}))


def _checks(fits: Iterable[FitResult]) -> Table:
    """Leave-future-out: what the lower budgets alone would have said about the top ones."""
    rows = [
        (
            words.method_name(fit),
            words.left_out(name),
            *(words.signed(errors.get(k)) for k in ("N_error", "D_error", "L_error")),
        )
        for fit in fits
        for name, errors in fit.holdout.items()
    ]
    return Table(heads=("fit", "refitted without", "N*", "D*", "loss"), rows=rows, words=frozenset({0, 1}))


def _runs(runs: pd.DataFrame) -> Table:
    """Every run, by objective, budget and size; columns that say the same of all runs go into the caption."""
    order = [name for name in ("objective", "budget", "params") if name in runs]
    rows = (runs.sort_values(order) if order else runs).to_dict("records")
    columns = {name: [words.cell(name, row) for row in rows] for name in words.RUN_COLUMNS}
    same = {name: cells[0] for name, cells in columns.items() if len(set(cells)) == 1 and name in words.OFTEN_SAME}
    shown = [name for name, cells in columns.items() if name not in same and set(cells) != {"–"}]
    caption = ", ".join(f"{words.RUN_COLUMNS[name]} {cell}" for name, cell in same.items() if cell != "–")
    return Table(
        heads=tuple(words.RUN_COLUMNS[name] for name in shown),
        rows=list(zip(*(columns[name] for name in shown), strict=True)),
        words=frozenset(k for k, name in enumerate(shown) if name in words.WORDS),
        caption=f"All of them: {caption}." if caption else "",
        is_wide=True,
    )


def _excluded(excluded: pd.DataFrame) -> Table:
    rows = [tuple(_word(row.get(k)) for k in ("run_id", "status", "reason")) for row in excluded.to_dict("records")]
    return Table(heads=("run", "state", "reason"), rows=rows, words=frozenset({0, 1, 2}))


def _word(value: Any) -> str:
    return "–" if value is None or value != value else str(value)
