"""table: any CSV or DataFrame of runs -> the fits of them.
Called by cli, report and notebooks; pandas ends here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dlm.core import text
from dlm.core.errors import UserError, unknown
from dlm.fit import laws
from dlm.fit.envelope import fit_envelope
from dlm.fit.isoflop.fit import fit_isoflop
from dlm.fit.multiplier import Multiplier, compare
from dlm.fit.points import as_points
from dlm.fit.resample import bootstrap as add_intervals
from dlm.fit.result import FitResult
from dlm.fit.rows import Runs, read_runs
from dlm.fit.surface.fit import fit_surface
from dlm.fit.verdict import judge

if TYPE_CHECKING:
    from dlm.fit.frozen import Score


__all__ = ["compare_runs", "fit_runs", "fit_sweep", "predict_runs", "read_runs", "score_runs"]


LAWS = (*laws.LAWS, "isoflop", "envelope")


NORM = {"loss": "huber", "delta": 1e-3, "space": "log"}  # of a surface, unless said otherwise


FEW_BUDGETS = 8  # up to here, every budget is reported


def fit_runs(
    source: Runs,
    *,
    law: str = "chinchilla",
    loss: str = "huber",
    delta: float = 1e-3,
    space: str = "log",
    bootstrap: int = 4000,
    seed: int = 0,
    at: Sequence[float] = (),
    objective: str | None = None,
    fixed: Mapping[str, float] | None = None,
    under_tuned: float = 1.0,
    weights: str | None = None,
    curve: str = "parabola",
    axis: str = "params",
) -> FitResult:
    """Fit one law to the finished runs of one objective, with `bootstrap` replicates (0: no intervals).

    loss, delta, space, fixed and under_tuned are those of `fit_surface`, curve and axis those of `fit_isoflop`; isoflop
    and envelope are plain least squares. weights: 'compute', or the column `weight` where there is one. Reported at
    `at` and at the budgets (FLOPs); without `at`, also at ten times the highest. With intervals comes the verdict of
    `judge`. Raises UserError for what cannot be fitted.
    """
    if law not in LAWS:
        raise unknown("law", law, LAWS)
    frame = _one_objective(read_runs(source), objective)
    frame.attrs["warnings"] += _mixtures(frame)
    places = _places(frame, at)
    if law != "isoflop" and (curve, axis) != ("parabola", "params"):
        raise UserError(f"{law} has no curve or axis: they are isoflop's")
    if law in laws.LAWS:
        how: dict[str, Any] = {"norm": loss, "delta": delta, "space": space, "under_tuned": under_tuned}
        result = _surface(frame, law, places, weights=weights, fixed=fixed, **how)
    else:
        _lines_have_none(law, fixed, under_tuned, weights, loss=loss, delta=delta, space=space)
        result = _isoflop(frame, places, curve, axis) if law == "isoflop" else _envelope(frame, places)
    remarks = tuple(frame.attrs["warnings"])
    if remarks:
        status = "warned" if result.status == "ok" else result.status
        result = replace(result, warnings=(*result.warnings, *remarks), status=status)
    if not bootstrap:
        return result
    return judge(add_intervals(result, replicates=bootstrap, seed=seed), seed=seed)


def fit_sweep(
    source: Runs, *, laws: Sequence[str] = ("isoflop", "chinchilla"), bootstrap: int = 4000, seed: int = 0
) -> dict[str, FitResult]:
    """Every law for every objective, as 'objective/law'. What cannot be fitted is a result with status
    'refused'.
    """
    frame = read_runs(source)
    names = _objectives(frame) or [""]
    fits = {}
    for name in names:
        for law in laws:
            key = f"{name}/{law}" if name else law
            fits[key] = _fit_or_refuse(frame, law, name, bootstrap, seed)
    return fits


def _fit_or_refuse(frame: pd.DataFrame, law: str, name: str, bootstrap: int, seed: int) -> FitResult:
    try:
        return fit_runs(frame, law=law, objective=name or None, bootstrap=bootstrap, seed=seed)
    except UserError as error:
        rows = frame[frame["objective"] == name] if name else frame
        nan = float("nan")
        return FitResult(
            law=law,
            loss="",
            space="",
            delta=nan,
            n=len(rows),
            status="refused",
            warnings=(str(error),),
            label=name,
        )


def _objectives(frame: pd.DataFrame) -> list[str]:
    return sorted(frame["objective"].dropna().astype(str).unique()) if "objective" in frame else []


def _one_objective(frame: pd.DataFrame, objective: str | None) -> pd.DataFrame:
    names = _objectives(frame)
    if objective is not None and objective not in names:
        raise unknown("objective", objective, names)
    if objective is None and len(names) > 1:
        raise UserError(f"the runs have several objectives ({text.listed(names)}): choose one with objective=")
    chosen = frame if objective is None else frame[frame["objective"] == objective].reset_index(drop=True)
    chosen.attrs = {"warnings": list(frame.attrs["warnings"])}
    return chosen


def _mixtures(frame: pd.DataFrame) -> list[str]:
    """One fit, one convention; other things that differ are said."""
    if "convention" in frame and frame["convention"].nunique() > 1:
        names = text.listed(sorted(frame["convention"].astype(str).unique()))
        raise UserError(f"the runs count FLOPs in several conventions ({names}): fit one at a time")
    mixed = [
        name for name in ("data", "data_hash", "schedule", "estimator") if name in frame and frame[name].nunique() > 1
    ]
    return [f"the runs differ in {text.listed(mixed)}: one law for all of them mixes those effects in"] if mixed else []


def _places(frame: pd.DataFrame, at: Sequence[float]) -> list[float]:
    for value in at:
        if not 0 < value < float("inf"):
            raise UserError(f"at is {value}: give compute in FLOPs, above 0")
    spent = frame["flops"] if "flops" in frame else 6.0 * frame["params"] * frame["tokens"]
    budgets = frame["budget"].dropna() if "budget" in frame else spent
    levels = sorted(budgets.unique().tolist()) or [float(spent.max())]
    own = levels if len(levels) <= FEW_BUDGETS else levels[-1:]
    return sorted({*own, *(map(float, at) if at else [10.0 * levels[-1]])})


def _named(frame: pd.DataFrame) -> tuple[str | None, str]:
    """Convention and objective, where the rows say them."""
    first = {name: frame[name].dropna().astype(str) for name in ("convention", "objective") if name in frame}
    said = {name: values.iloc[0] for name, values in first.items() if len(values)}
    return said.get("convention"), said.get("objective", "")


def _lines_have_none(
    law: str, fixed: Mapping[str, float] | None, under_tuned: float, weights: str | None, **norm: Any
) -> None:
    """Refuse what only surfaces have, rather than pass over it."""
    odd = [name for name, value in norm.items() if value != NORM[name]]
    odd += ["fixed parameters"] if fixed else []
    odd += ["under_tuned"] if under_tuned != 1.0 else []
    odd += ["weights from compute"] if weights is not None else []
    if odd:
        raise UserError(f"{law} has no {odd[0]}: only surfaces do ({', '.join(laws.LAWS)})")


def _surface(
    frame: pd.DataFrame,
    law: str,
    at: Sequence[float],
    *,
    weights: str | None,
    fixed: Mapping[str, float] | None,
    **how: Any,
) -> FitResult:
    convention, label = _named(frame)
    whole = "budget" in frame and frame["budget"].notna().all()
    return fit_surface(
        frame["params"],
        frame["tokens"],
        frame["loss"],
        law=law,
        fixed=fixed,
        flops=frame.get("flops"),
        budget=frame["budget"] if whole else None,
        weights=frame.get("weight") if weights is None else weights,
        unique_tokens=frame.get("unique_tokens") if law == "data-constrained" else None,
        loss_se=_known(frame, "loss_se"),
        loss_se_own=_known(frame, "loss_se_own"),
        cluster=_clusters(frame),
        convention=convention,
        at=at,
        label=label,
        **how,
    )


def _known(frame: pd.DataFrame, name: str) -> pd.Series[float] | None:
    """A column that every row has, else None."""
    return frame[name] if name in frame and frame[name].notna().all() else None


def _clusters(frame: pd.DataFrame) -> pd.Series[str] | None:
    """What shares noise: branches of one trunk, and the points of one run."""
    if "run_id" not in frame:
        return None
    own = frame["run_id"].astype(str)
    return own if "parent" not in frame else frame["parent"].fillna(own).astype(str)


def _isoflop(frame: pd.DataFrame, at: Sequence[float], curve: str, axis: str) -> FitResult:
    convention, label = _named(frame)
    frame = _with_budget(frame)
    return fit_isoflop(
        frame["params"],
        frame["tokens"],
        frame["loss"],
        frame["budget"],
        curve=curve,
        axis=axis,
        flops=frame.get("flops"),
        weights=frame.get("weight"),
        loss_se=_known(frame, "loss_se"),
        loss_se_own=_known(frame, "loss_se_own"),
        convention=convention,
        at=at,
        label=label,
    )


def _with_budget(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with a budget; without that column, equal FLOPs are one, if they are equal."""
    if "budget" not in frame:
        if "flops" not in frame:
            raise UserError("isoFLOP curves need a column 'budget' (or 'flops' with exactly equal values per budget)")
        groups = frame["flops"].value_counts()
        if groups.max() < 2 or len(groups) > len(frame) / 3:
            raise UserError(
                f"isoFLOP curves need a column 'budget': {len(groups)} distinct flops in {len(frame)} rows "
                "are no groups"
            )
        return frame.assign(budget=frame["flops"])
    known = frame["budget"].notna()
    if not known.any():
        raise UserError("isoFLOP curves need a budget, and no row has one")
    if not known.all():
        frame.attrs["warnings"].append(f"{int((~known).sum())} rows without a budget are in no isoFLOP curve")
    return frame[known]


def _envelope(frame: pd.DataFrame, at: Sequence[float]) -> FitResult:
    convention, label = _named(frame)
    if "weight" in frame:
        frame.attrs["warnings"].append(
            "an envelope knows no weights: runs of weight 0 are left out, others count alike"
        )
        frame = frame[frame["weight"] > 0]
    return fit_envelope(
        frame["params"],
        frame["tokens"],
        frame["loss"],
        flops=frame.get("flops"),
        run_id=frame["run_id"].astype(str) if "run_id" in frame else None,
        schedule=frame["schedule"].astype(str).tolist() if "schedule" in frame else None,
        convention=convention,
        at=at,
        label=label,
    )


def predict_runs(
    source: Runs, *, at: Sequence[float], freeze: Path | None = None, **how: Any
) -> tuple[FitResult, dict[str, Any] | None]:
    """`fit_runs` at C = `at`; with `freeze`, also what was written to that new file (see `frozen.freeze`)."""
    from dlm.fit import frozen

    result = fit_runs(source, at=at, **how)
    written = None if freeze is None else frozen.freeze(result, at, freeze)
    return result, written


def score_runs(path: Path, source: Runs) -> Score:
    """Grade the frozen predictions in `path` by the finished runs of `source` of the same objective."""
    from dlm.fit import frozen

    frame = read_runs(source)
    label = frozen.load(path)["label"]
    if label and "objective" in frame:
        frame = _one_objective(frame, label)
    convention, _ = _named(frame)
    points = as_points(frame["params"], frame["tokens"], frame["loss"], flops=frame.get("flops"), convention=convention)
    return frozen.score(path, points)


def compare_runs(
    source: Runs,
    other: Runs | None = None,
    *,
    first: str | None = None,
    second: str | None = None,
    law: str = "chinchilla",
    bootstrap: int = 4000,
    seed: int = 0,
    losses: Sequence[float] | None = None,
    level: float = 0.95,
    **how: Any,
) -> Multiplier:
    """The compute multiplier, at equal loss, of the runs of `other` against those of `source` (see `compare`).

    Without `other`, of two objectives of `source`: those named `first` and `second`, or the only two it has. With it,
    they choose the objective of either file. `how` goes to `fit_runs`. Raises UserError for what cannot be compared.
    """
    names = (first, second) if other is not None else _two_objectives(read_runs(source), first, second)
    tables = (source, source if other is None else other)
    fits = []
    for k, (table, name) in enumerate(zip(tables, names, strict=True)):
        frame = read_runs(table)
        spent = frame["flops"] if "flops" in frame else 6.0 * frame["params"] * frame["tokens"]
        options = {"at": [float(spent.max())], **how}  # nothing beyond the budgets is asked for
        fits.append(fit_runs(table, law=law, objective=name, bootstrap=bootstrap, seed=seed + k, **options))
    labels = _labels(tables, fits)
    one, two = (replace(fit, label=label) for fit, label in zip(fits, labels, strict=True))
    return compare(one, two, losses=losses, level=level)


def _two_objectives(frame: pd.DataFrame, first: str | None, second: str | None) -> tuple[str, str]:
    names = _objectives(frame)
    if first is not None and second is not None:
        return first, second
    rest = [name for name in names if name not in (first, second)]
    if first is None and second is None and len(rest) == 2:
        return rest[0], rest[1]
    if (first is None) != (second is None) and len(rest) == 1:
        return (first, rest[0]) if first is not None else (rest[0], str(second))
    has = f"its objectives are {text.listed(names)}" if names else "it has no column objective"
    raise UserError(
        f"one table of runs holds a comparison where it has two objectives, and {has}: name two, or a second CSV"
    )


def _labels(tables: Sequence[Runs], fits: Sequence[FitResult]) -> list[str]:
    """The objectives; where they are the same, the files' names, or those of the folders that they are in."""
    choices = [[fit.label for fit in fits]]
    if all(not isinstance(table, pd.DataFrame) for table in tables):
        paths = [Path(str(table)).resolve() for table in tables]
        choices += [[path.stem for path in paths], [path.parent.name for path in paths]]
    return next((names for names in choices if len(set(names)) == len(names)), choices[0])
