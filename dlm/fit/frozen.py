"""Write predictions down before the runs exist, and grade them afterwards.

The file holds all that is needed to predict the loss at any N and D: the forms of the law, each with some of its draws.
It also holds a date and hashes, which show a change by mistake. They prove no date, because anyone can compute them
anew: for that, the file has to be published, or committed to a repository that others have.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from dlm.core import text
from dlm.core.errors import UserError
from dlm.core.files import write_atomic
from dlm.core.git import running_code
from dlm.core.json_text import parse_json
from dlm.fit import known
from dlm.fit.combined.error import FormError
from dlm.fit.fitted import Fitted, plain
from dlm.fit.frozen_content import check_content, form_from_dict, form_to_dict
from dlm.fit.isoflop.curves import polynomial, turning
from dlm.fit.laws import LAWS
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.epochs import Epochs
from dlm.fit.optimum import UNTESTED, UNTESTED_BELOW, optima
from dlm.fit.points import NAN, Points
from dlm.fit.predict import error_of, forms_of, lower_laws_of, missed_by, predict_from, too_high, too_low

FORMAT = 2
READ = (1, FORMAT)  # the formats that can be read; format 1 knows the runs by hashes that include the loss
SAME = 0.1  # a run whose C differs from a frozen C by a smaller share counts as a run at that C
LEAST_SIZES = 3  # with fewer sizes, the best size does not bound N*


def freeze(result: Fitted, at: Sequence[float], path: Path, *, level: float = 0.95) -> dict[str, Any]:
    """Write the predictions at each C (FLOPs) to `path`, and return the content of this file.

    Raises:
        UserError: If the law depends on unique tokens or is not a surface with draws, if the file exists (it is never
            overwritten), or if it cannot be written.
    """
    check_free(path)
    content = forecast(result, at, level=level)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another name") from error
    return content


def check_free(path: Path) -> None:
    """Raise a UserError if `path` exists: frozen predictions are never overwritten."""
    if path.exists():
        raise UserError(f"{path} exists: frozen predictions are never overwritten, give another name")


def forecast(result: Fitted, at: Sequence[float], *, level: float = 0.95) -> dict[str, Any]:
    """Return the predictions at each C (FLOPs) and all that is needed to predict any other run, dated and hashed.

    Raises:
        UserError: If the law depends on unique tokens or is not a surface with draws.
    """
    if result.surface is None or result.draws is None or result.points is None:
        raise UserError(f"{result.law} gives no prediction: freeze a surface ({', '.join(LAWS)}) with its bootstrap")
    if isinstance(result.surface, DataConstrained | Epochs):
        raise UserError(f"{result.law} predictions need the unique tokens of each run: not frozen yet")
    code, runs = running_code(), result.runs or known.of_points(result.points)
    content: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "dlm": version("dlm"),
            "git_sha": None if code is None else code.sha,
            "git_dirty": None if code is None else bool(code.changed),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "runs": {"n": result.n, "top": result.points.top_flops, "sha256": known.hash_of(runs), "table": runs},
            "convention": result.points.convention,
            "label": result.label,
            "law": result.law,
            "level": level,
            "forms": [form_to_dict(form) for form in forms_of(result)],
            "missed": missed_by(result),
            "error": None if (error := error_of(result)) is None else vars(error),
            "lower": [{**form_to_dict(law), "error": vars(own)} for law, own in lower_laws_of(result)],
            "residual": result.noise.residual,
            "verdict": None if result.verdict is None else result.verdict.sentence(),
            "predictions": {f"{c:.12g}": vars(best) for c, best in optima(result, at, level=level).items()},
        }
    )
    return extended(content)


def extended(content: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the content of a file of frozen predictions with further entries, hashed anew."""
    said = {**{key: value for key, value in content.items() if key != "sha256"}, **plain(more)}
    return {**said, "sha256": _hash(said)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """New runs compared with their predictions.

    `inside` of a run or a size is None if it has no interval, and `why` then says the reason, if it is known.
    """

    made: str  # when the predictions were made
    sha256: str  # hash of the predictions
    level: float
    rows: tuple[dict[str, Any], ...]  # per new run: params, tokens, loss, predicted, error, low, high, inside, z, why
    sizes: tuple[
        dict[str, Any], ...
    ]  # per frozen C that was run: N of the best run, vertex, between, low, high, inside, why
    known: int  # number of runs in the table that the predictions were made from
    notes: tuple[str, ...] = ()  # what a reader has to know of the known runs and of the table

    @property
    def inside(self) -> int:
        """The number of new runs that lie inside their intervals."""
        return sum(row["inside"] is True for row in self.rows)

    @property
    def no_interval(self) -> int:
        """The number of new runs without an interval, which lie neither inside nor outside."""
        return sum(row["inside"] is None for row in self.rows)

    def sentence(self) -> str:
        """A summary of the grades in words."""
        if not self.rows:
            return f"no new run: all {self.known} were there when the predictions were made ({self.made})"
        errors, without = np.array([row["error"] for row in self.rows]), self.no_interval
        graded = len(self.rows) - without
        said = [f"{self.inside} of {graded} new runs lie inside their {self.level:.0%} interval"] if graded else []
        said += [f"{without} new run{' has' if without == 1 else 's have'} no interval"] if without else []
        off = f"the law was off by {errors.mean():+.2%} in the mean, {np.sqrt((errors**2).mean()):.2%} rms"
        return "; ".join([*said, off])

    def report(self) -> str:
        """The summary, every new run and every best size, as text."""
        lines = [f"predictions of {self.made} ({self.sha256[:12]}): {self.sentence()}"]
        lines += [_of_run(r) for r in self.rows]
        lines += [_of_size(s) for s in self.sizes]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The object that `dlm score --json` prints."""
        counts = {"inside": self.inside, "no_interval": self.no_interval}
        return {**plain(vars(self)), **counts, "sentence": self.sentence()}


def _of_run(r: Mapping[str, Any]) -> str:
    ends = f"{r['low']:.4g} to {r['high']:.4g}"
    grade = f", z = {r['z']:+.2f}{'' if r['inside'] else ': outside'}"
    if r["inside"] is None:
        ends, grade = "no interval", _reason(r)
    return (
        f"  N {text.count(r['params'])}, D {text.count(r['tokens'])}: {r['loss']:.4g}, predicted "
        f"{r['predicted']:.4g} ({ends}), off by {r['error']:+.2%}{grade}"
    )


def _of_size(s: Mapping[str, Any]) -> str:
    between, said = text.interval(s["between"], "count"), text.interval((s["low"], s["high"]), "count")
    best = f"the best of {s['runs']} runs has {text.count(s['N'])} parameters, so N* lies within {between}"
    if s["vertex"] is not None:
        best += f" (a parabola through the runs has its minimum at {text.count(s['vertex'])})"
    grade = _reason(s) if s["inside"] is None else "" if s["inside"] else ": outside"
    return f"  at {text.flops(s['flops'])} FLOPs {best}: predicted {said}{grade}"


def _reason(graded: Mapping[str, Any]) -> str:
    return f": {graded['why']}" if graded["why"] else ""


def grade(frozen: Mapping[str, Any], points: Points, runs: known.RunTable) -> Score:
    """Grade frozen predictions (the content of a file) on the runs that they were not made from.

    Args:
        frozen: The content of a file of frozen predictions.
        points: The runs.
        runs: What tells these runs apart, row by row.

    Raises:
        UserError: For runs whose FLOPs are counted by another convention.
    """
    if points.convention != frozen["convention"] and "as given" not in (points.convention, frozen["convention"]):
        ours, theirs = points.convention, frozen["convention"]
        raise UserError(
            f"the runs count FLOPs as {ours}, the predictions as {theirs}: give runs that count as {theirs}"
        )
    found = matched(frozen, runs)
    held = points.take(found.new)
    notes = [found.note()] if found.note() else []
    if frozen["format"] == 1 and len(held):
        notes.append("this file has format 1: a run that it was made from counts as new if its loss was evaluated anew")
    return Score(
        made=frozen["made"],
        sha256=frozen["sha256"],
        level=frozen["level"],
        rows=tuple(_graded_runs(frozen, held)) if len(held) else (),
        sizes=tuple(_graded_sizes(frozen, held)),
        known=int((~found.new).sum()),
        notes=tuple(notes),
    )


def matched(frozen: Mapping[str, Any], runs: known.RunTable) -> known.Match:
    """Find the runs that the predictions were made from among `runs`."""
    if frozen["format"] == 1:
        return known.match_hashes(frozen["runs"]["cells"], runs)
    return known.match(frozen["runs"]["table"], runs)


def load(path: Path) -> dict[str, Any]:
    """Read a file of frozen predictions, or the proof.json of a sweep with one objective; check its format and hash."""
    if not path.is_file():
        raise UserError(f"no file {path}: `dlm predict RUNS.csv --at C --freeze FILE` writes one")
    try:
        content: dict[str, Any] = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no file of frozen predictions, as it is not valid JSON: {error}") from error
    if isinstance(content, dict) and "forecasts" in content:  # the proof.json of a sweep, with one for each objective
        forecasts = content["forecasts"]
        if not isinstance(forecasts, list) or not forecasts:
            raise UserError(f"{path} holds no forecast: give a file that `dlm predict --freeze` or a sweep wrote")
        content, *others = forecasts
        if others:
            raise UserError(f"{path} holds the forecasts of several objectives: `dlm report` grades each of them")
    return checked(content, path)


def checked(content: Any, path: Path) -> dict[str, Any]:
    """Return frozen predictions that were read from `path`, after a check of their format and hash."""
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is no file of frozen predictions: give one that `dlm predict --freeze` wrote")
    if content["format"] not in READ:
        can = text.listed([str(one) for one in READ])
        raise UserError(
            f"{path} has format {content['format']}, and this dlm ({version('dlm')}) reads formats {can}: use the dlm "
            f"that wrote it ({content.get('dlm', 'not named')}) or a later one"
        )
    if content.get("sha256") != _hash(content):
        raise UserError(
            f"{path} has been changed since it was written: its hash does not fit, so nothing is graded; restore it, "
            "for example from version control"
        )
    check_content(content, path)
    return dict(content)


def predicted(frozen: Mapping[str, Any], params: npt.ArrayLike, tokens: npt.ArrayLike) -> list[dict[str, float]]:
    """The frozen prediction of new runs: a dict per run with params, tokens, predicted, low and high.

    The interval from low to high is that of a run (`Prediction.pi`); NaN where `predict` gives none.

    Args:
        frozen: The content of a file of frozen predictions.
        params: N of each run, (m,).
        tokens: D of each run, (m,).
    """
    forms = [form_from_dict(form, frozen) for form in frozen["forms"]]
    missed = NAN if frozen["missed"] is None else frozen["missed"]
    error = FormError(**frozen["error"]) if frozen.get("error") else None
    below = frozen.get("lower", [])  # earlier versions did not write it
    lower = [(form_from_dict(law, frozen), FormError(**law["error"])) for law in below]
    seen = predict_from(forms, missed, params, tokens, frozen["level"], error=error, lower=lower)
    tested = np.array([not why for why in _why_untested(frozen, params, tokens)])
    ends = np.where(tested, seen.pi.T, NAN)
    columns = (np.asarray(params, dtype=np.float64), np.asarray(tokens, dtype=np.float64), seen.loss, *ends)
    names = ("params", "tokens", "predicted", "low", "high")
    return [dict(zip(names, row, strict=True)) for row in np.stack(columns, axis=1).tolist()]


def _graded_runs(frozen: Mapping[str, Any], held: Points) -> list[dict[str, Any]]:
    rows, unbounded = predicted(frozen, held.params, held.tokens), _why_none(frozen)
    reasons = _why_untested(frozen, held.params, held.tokens)
    return [
        {
            "params": row["params"],
            "tokens": row["tokens"],
            "loss": loss,
            **row,
            "error": row["predicted"] / loss - 1,
            "inside": _is_inside(row, loss, loss),
            "z": z_of(row, loss, frozen["level"]),
            "why": "" if _is_inside(row, loss, loss) is not None else untested or unbounded,
        }
        for row, loss, untested in zip(rows, held.loss.tolist(), reasons, strict=True)
    ]


def _is_inside(row: Mapping[str, float], low: float, high: float) -> bool | None:
    """Whether some number from `low` to `high` lies inside the interval of `row`; None if `row` has no interval."""
    if not math.isfinite(row["low"] + row["high"]):
        return None
    return low <= row["high"] and row["low"] <= high


def _why_none(frozen: Mapping[str, Any]) -> str:
    """Why the predictions have no interval: too many resampled fits of a form failed. Empty if none did."""
    for form in frozen["forms"]:
        fit = form_from_dict(form, frozen)
        assert fit.surface is not None and fit.draws is not None
        draws, failed = fit.draws, int(np.sum(~fit.surface.found(fit.draws)))
        if failed > (1 - frozen["level"]) / 2 * len(draws):
            return f"{failed} of {len(draws)} resampled fits of {form['law']} found no law"
    return ""


def _why_untested(frozen: Mapping[str, Any], params: npt.ArrayLike, tokens: npt.ArrayLike) -> list[str]:
    """Why each of m runs has no interval: it lies further from the fitted runs than any was tested. Empty if not."""
    table = frozen["runs"].get("table")
    if table is None:  # format 1 holds hashes of the runs, and their highest C
        least, most = 0.0, frozen["runs"]["top"] / 6
    else:
        product = np.array(table["params"], dtype=np.float64) * np.array(table["tokens"], dtype=np.float64)
        least, most = product.min(), product.max()
    high, low = too_high(params, tokens, most), too_low(params, tokens, least)
    return [UNTESTED if above else UNTESTED_BELOW if below else "" for above, below in zip(high, low, strict=True)]


def z_of(row: Mapping[str, float], loss: float, level: float) -> float:
    """How many standard deviations of a run its log loss lies above its prediction; NaN without an interval.

    The standard deviation is that of the interval of the run: the distance in log L from the prediction to the end of
    the interval on the side of the measured loss, over the normal quantile of `level` (1.96 for 95 %). So |z| is above
    that quantile exactly if the run lies outside its interval.
    """
    off = math.log(loss / row["predicted"])
    end = row["high"] if off > 0 else row["low"]
    return off / (abs(math.log(end / row["predicted"])) / NormalDist().inv_cdf((1 + level) / 2))


def _graded_sizes(frozen: Mapping[str, Any], held: Points) -> list[dict[str, Any]]:
    found = []
    for c, best in frozen["predictions"].items():
        near = held.take(np.abs(held.flops / float(c) - 1) < SAME)
        sizes = np.unique(near.params)
        if len(sizes) < LEAST_SIZES:
            continue
        n = float(near.params[near.loss.argmin()])
        place = int(np.searchsorted(sizes, n))
        # The best of the sizes that were run shows only that N* lies between the neighbours of this size.
        ends = float(sizes[max(place - 1, 0)]), float(sizes[min(place + 1, len(sizes) - 1)])
        # The file has null for an end that is not known.
        said = dict(zip(("low", "high"), (NAN if end is None else end for end in best["ci"]["N"]), strict=True))
        inside = _is_inside(said, *ends)
        between = {"N": n, "vertex": _vertex(near), "between": ends}
        why = "" if inside is not None else _why_none(frozen) or best["withheld"]
        found.append({"flops": float(c), "runs": len(near), **between, **said, "inside": inside, "why": why})
    return found


def _vertex(points: Points) -> float | None:
    """The size at the minimum of a parabola of the loss over log N; None if it has no minimum within the sizes."""
    x = np.log(points.params)
    place = turning(polynomial(x - x.mean(), points.loss[None], points.weight[None]))[0][0] + x.mean()
    return float(np.exp(place)) if x.min() < place < x.max() else None


def _hash(content: Mapping[str, Any]) -> str:
    said = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
