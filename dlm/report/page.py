"""Write the report of a sweep: fits.json, the figures and one self-contained page, report.html.

pandas, matplotlib and jinja2 are imported by the functions that need them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core import names, text
from dlm.core.files import write_atomic, write_json
from dlm.core.objectives import OBJECTIVES
from dlm.fit.fitted import Minimum, Optimum
from dlm.fit.laws import LAW_NAMES
from dlm.fit.points import UNBOUNDED
from dlm.fit.proof import Proof
from dlm.fit.result import FitResult
from dlm.report import figures, words
from dlm.report.look import SIZES, Paper

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BEST_HEADS = ("parameters N*", "tokens D*", "D*/N*", "loss L*")
NO_LABEL = "runs"  # stands in the names of files for a label that is empty
FIGURES = {"isoflop": "Loss over model size, one curve per budget", "allocation": "N*, D* and L* against compute"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page."""

    heads: Sequence[str]  # the column headings
    rows: Sequence[Sequence[str]]
    words: Collection[str]  # the headings of the columns that hold words; the other columns hold numbers
    caption: str = ""
    is_wide: bool = False


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
    paper: Paper | None = None,
) -> Path:
    """Write report/report.html and report/figures/*.{png,svg,pdf}. The page needs neither network nor scripts.

    Args:
        sweep_dir: The folder of the sweep.
        runs: The rows of runs.csv, or any table with the columns params, tokens and loss.
        excluded: The rows of excluded.csv.
        fits: The fits of one or several objectives (``FitResult.label``).
        title: The title of the page.
        facts: Entries of the line under the title besides the numbers of runs and of excluded runs.
        proofs: The proof run of each objective, by its name.
        advice: What would settle the questions that the fits of an objective leave open, by its name: pairs of a
            sentence and a command, which may be ''.
        paper: Also write report/figures/SIZE/*, the same figures for a paper and for slides.

    Returns:
        The path of the page.
    """
    import jinja2

    folder = Path(sweep_dir) / "report"
    listed = list(_named(fits).values())
    groups = {label: [fit for fit in listed if fit.label == label] for label in dict.fromkeys(f.label for f in listed)}
    fitted = runs[runs["role"].isna()] if "role" in runs else runs
    sections = [
        _section(
            label,
            group,
            fitted,
            folder / "figures",
            proof=(proofs or {}).get(label),
            advice=(advice or {}).get(label, ()),
            paper=paper,
        )
        for label, group in groups.items()
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown
    )
    template = environment.from_string((Path(__file__).parent / "page.html.j2").read_text())
    page = template.render(
        title=title,
        facts={"runs": len(runs), "left out": len(excluded), **(facts or {})},
        sections=sections,
        side_by_side=_side_by_side(listed) if len(sections) > 1 else None,
        runs=_runs(runs),
        excluded=_excluded(excluded),
        refused=words.refused(listed),
        convention=words.convention(runs),
        has_bound="objective" in runs
        and any(OBJECTIVES[name].is_bound for name in OBJECTIVES.keys() & runs["objective"]),
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


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
        for key, value in _parameters(fit).items():
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


def _parameters(fit: FitResult) -> dict[str, float]:
    """Return the fitted parameters and the exponents a and b of the allocation."""
    return {**fit.params, "a": fit.allocation.a, "b": fit.allocation.b}


def _named(fits: figures.Fits) -> dict[str, FitResult]:
    if isinstance(fits, Mapping):
        return dict(fits)
    return {f"{fit.label}/{fit.law}" if fit.label else fit.law: fit for fit in fits}


def _section(
    label: str,
    fits: Sequence[FitResult],
    runs: pd.DataFrame,
    folder: Path,
    *,
    proof: Proof | None,
    advice: Sequence[tuple[str, str]],
    paper: Paper | None,
) -> dict[str, Any]:
    """Return the content of the section on one training objective, by the variable names of the template."""
    own = runs[runs["objective"] == label] if label and "objective" in runs else runs
    slug = names.slug(label, reserved=(NO_LABEL,)) if label else NO_LABEL
    return {
        "name": words.objective(label),
        "slug": slug,
        "conclusion": words.conclude(fits),
        "proof": proof,
        "proof_table": None if proof is None else _proof(proof),
        "advice": advice,
        "untuned": words.untuned(own, fits),
        "svgs": _figures(slug, {fit.law: fit for fit in fits}, own, folder, paper),
        "best": _best(fits),
        "minima": _minima(fits),
        "parameters": _parameter_table(fits),
        "conventions": _conventions(fits),
        "checks": _checks(fits),
        "reservations": words.reservations(fits),
        "methods": [words.method(fit) for fit in fits if fit.params],
        "notes": words.notes(fits),
        "has_open_curves": any(not minimum.usable for fit in fits for minimum in fit.minima),
        "scatter": next((f"{fit.noise.residual:.1%}" for fit in fits if math.isfinite(fit.noise.residual)), ""),
    }


def _figures(
    slug: str, fits: Mapping[str, FitResult], runs: pd.DataFrame, folder: Path, paper: Paper | None
) -> dict[str, str]:
    """Draw and save the figures that these fits allow; return the figures of the page as <svg> elements by name."""
    draw: dict[str, Callable[..., Figure]] = {}
    isoflop = fits.get("isoflop")
    if isoflop is not None and isoflop.points is not None:
        loss_se = runs["loss_se"].astype(float).tolist() if "loss_se" in runs and len(runs) == isoflop.n else None
        draw["isoflop"] = partial(figures.isoflop_figure, isoflop, fits.get("combined"), loss_se=loss_se)
    if any(math.isfinite(best.N) for fit in fits.values() for best in fit.at.values()):
        draw["allocation"] = partial(figures.allocation_figure, fits)
    drawn = {name: figure() for name, figure in draw.items()}
    for name, figure in drawn.items():
        figures.save(figure, folder, f"{name}-{slug}")
        if paper is not None:
            for size in [size for size in SIZES if size != "page"]:
                figures.save(draw[name](size=size, style=paper.style), folder / size, f"{name}-{slug}")
    return {name: figures.inline_svg(figure, f"{name}-{slug}", FIGURES[name]) for name, figure in drawn.items()}


def _best(fits: Sequence[FitResult]) -> Table:
    """Tabulate the best use of each C, with one row per method."""
    rows = [
        (words.place(flops, fit.at[flops]), LAW_NAMES[fit.law], *_optimum(fit.at[flops]))
        for flops in sorted({flops for fit in fits for flops in fit.at})
        for fit in fits
        if flops in fit.at
    ]
    return Table(heads=("compute C", "by", *BEST_HEADS), rows=rows, words=("compute C", "by"))


def _side_by_side(fits: Iterable[FitResult]) -> Table:
    """Tabulate the best use of the highest reported C that the runs of all usable fits reach."""
    usable = [fit for fit in fits if fit.at and fit.points is not None]
    run = [{flops for flops in fit.at if words.is_run(fit, flops)} for fit in usable]
    top = max(set.intersection(*run), default=0.0) if run else 0.0
    rows = [(words.objective(fit.label), LAW_NAMES[fit.law], *_optimum(fit.at[top])) for fit in usable if top in fit.at]
    caption = f"The best use of {text.flops(top)} FLOPs."
    return Table(heads=("objective", "by", *BEST_HEADS), rows=rows, words=("objective", "by"), caption=caption)


def _optimum(best: Optimum) -> tuple[str, ...]:
    loss = f"withheld: {best.withheld}" if best.withheld else _with_interval(best, "L", "number")
    return _with_interval(best, "N"), _with_interval(best, "D"), text.count(best.tokens_per_param, digits=2), loss


def _with_interval(best: Optimum | Minimum, key: str, style: str = "count") -> str:
    """Format N, D or L of an optimum, with the interval if there is one; ``style`` as in ``text.interval``."""
    value = getattr(best, key)
    shown = text.count(value) if style == "count" else text.number(value)
    return f"{shown} ({text.interval(best.ci[key], style)})" if key in best.ci else shown


def _minima(fits: Iterable[FitResult]) -> Table:
    heads = ("budget", "runs", "parameters N*", "tokens D*", "loss L*", "verdict")
    rows = [_minimum(minimum) for fit in fits if fit.law == "isoflop" for minimum in fit.minima]
    return Table(heads=heads, rows=rows, words=("budget", "verdict"))


def _minimum(minimum: Minimum) -> tuple[str, ...]:
    head = (text.flops(minimum.budget), str(minimum.num_points))
    if not minimum.usable:
        return (*head, *[words.MISSING] * 3, f"refused: {minimum.why}")
    best = (_with_interval(minimum, "N"), _with_interval(minimum, "D"), _with_interval(minimum, "L", "number"))
    return (*head, *best, "interior minimum")


def _parameter_table(fits: Iterable[FitResult]) -> Table:
    """Tabulate the parameters of each fit; of a combined law, those of the parts that are fitted to all runs alike."""
    rows = []
    for fit in fits:
        for key, value in _parameters(fit).items() if fit.params else ():
            part, _, name = key.rpartition(".")
            form, _, emphasis = part.partition("_")
            if not part or emphasis == "0":
                law = f"{LAW_NAMES[fit.law]}, {form} part" if part else LAW_NAMES[fit.law]
                rows.append((law, name, text.number(value), text.interval(fit.ci.get(key)), words.PARAMETERS[name]))
    heads = ("fit", "parameter", "value", "95 % interval", "meaning")
    return Table(heads=heads, rows=rows, words=("fit", "parameter", "meaning"))


def _conventions(fits: Sequence[FitResult]) -> Table:
    """Tabulate a and b under every count of N and C, from the fit with the most of them."""
    known = [fit.conventions for fit in fits if fit.conventions is not None]
    most = max(known, key=lambda found: len(found.rows), default=None)
    heads = ("N counts", "C counts", "by", "a", "b", "a + b")
    if most is None:
        return Table(heads=heads, rows=(), words=heads[:3])
    rows = [
        (words.SIZES[row.N], row.C, LAW_NAMES[row.by], *(f"{value:.3f}" for value in (row.a, row.b, row.a + row.b)))
        for row in most.rows
    ]
    return Table(heads=heads, rows=rows, words=heads[:3], caption=words.CONVENTIONS_CAPTION)


def _checks(fits: Iterable[FitResult]) -> Table:
    """Tabulate the errors of N*, D* and L* at the top budgets, as predicted by fits to the lower budgets alone."""
    rows = [
        (LAW_NAMES[fit.law], words.HELD_OUT.get(name, name), *words.relative_errors(errors))
        for fit in fits
        for name, errors in fit.holdout.items()
    ]
    heads = ("fit", "refitted without", "N*", "D*", "loss")
    return Table(heads=heads, rows=rows, words=("fit", "refitted without"))


def _proof(proof: Proof) -> Table:
    """Tabulate the forecast of the proof run and its result, next to the predictions without a law."""
    heads = ("prediction", "parameters N", "predicted loss", "measured", "prediction off by", "z of the measured loss")
    rows = []
    if proof.forecast is not None:
        for run in proof.forecast["proof"]["runs"]:
            rows.append(("the law, frozen before the run", *_proof_run(run, proof.rows)))
        for name, value, error in proof.comparisons():
            loss = words.MISSING if value is None else f"{value:.3f}"
            off = words.MISSING if error is None else f"{error:+.1%}"
            rows.append((name, words.MISSING, loss, words.MISSING, off, words.MISSING))
    return Table(heads=heads, rows=rows, words=("prediction",))


def _proof_run(run: Mapping[str, float], graded: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    said = f"{run['predicted']:.3f} ({run['low']:.3f} to {run['high']:.3f})"
    size, place = text.count(run["params"]), (run["params"], run["tokens"])
    for row in graded:
        if (row["params"], row["tokens"]) == place:
            return size, said, f"{row['loss']:.3f}", f"{row['error']:+.1%}", f"{row['z']:+.1f}"
    return size, said, *[words.MISSING] * 3


def _runs(runs: pd.DataFrame) -> Table:
    """Tabulate all runs, sorted by objective, budget and size.

    A column of CAPTION_COLUMNS with the same value for all runs goes into the caption. Empty columns are left out.
    """
    order = [name for name in ("objective", "budget", "params") if name in runs]
    rows = _records(runs.sort_values(order) if order else runs)
    columns = {name: [words.cell(name, row) for row in rows] for name in words.COLUMNS}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {words.MISSING}}
    same = [name for name in columns if name in words.CAPTION_COLUMNS and len(set(columns[name])) == 1]
    caption = ", ".join(f"{words.COLUMNS[name][0]} {columns.pop(name)[0]}" for name in same)
    return Table(
        heads=[words.COLUMNS[name][0] for name in columns],
        rows=list(zip(*columns.values(), strict=True)),
        words=[words.COLUMNS[name][0] for name in words.WORD_COLUMNS],
        caption=f"All of them: {caption}." if caption else "",
        is_wide=True,
    )


def _excluded(excluded: pd.DataFrame) -> Table:
    heads = {"run_id": "run", "status": "state", "reason": "reason"}
    rows = [[str(row.get(name) or words.MISSING) for name in heads] for row in _records(excluded)]
    return Table(heads=list(heads.values()), rows=rows, words=heads.values())


def _records(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """Return the rows of a data frame, with None for missing values."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
