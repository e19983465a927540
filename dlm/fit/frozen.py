"""Write predictions down before the runs exist, and grade them afterwards.

The file holds all that is needed to predict the loss at any N and D: the forms of the law, each with some of its draws.
It is dated and hashed, to show afterwards that the predictions were made before the outcome was known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.core.files import write_atomic
from dlm.fit.fitted import Fitted, Noise, plain
from dlm.fit.laws import LAWS
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.optimum import as_rows, optima
from dlm.fit.points import NAN, Points
from dlm.fit.predict import forms_of, missed_by, predict_from

FORMAT = 1
KEPT = 400  # draws of each form that the file holds
SAME = 0.1  # a run whose C differs from a frozen C by a smaller share counts as a run at that C
LEAST_SIZES = 3  # with fewer sizes, the best size does not bound N*


def freeze(result: Fitted, at: Sequence[float], path: Path, *, level: float = 0.95) -> dict[str, Any]:
    """Write the predictions at each C (FLOPs) to `path`, and return the content of this file.

    Raises:
        UserError: If the law is data-constrained or not a surface with draws, if the file exists (it is never
            overwritten), or if it cannot be written.
    """
    if result.surface is None or result.draws is None or result.points is None:
        raise UserError(f"{result.law} gives no prediction: freeze a surface ({', '.join(LAWS)}) with its bootstrap")
    if isinstance(result.surface, DataConstrained):
        raise UserError("data-constrained predictions need the unique tokens of each run: not frozen yet")
    if path.exists():
        raise UserError(f"{path} exists: frozen predictions are never overwritten, give another name")
    content: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "dlm": version("dlm"),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "runs": {"n": result.n, "top": result.points.top_flops, "cells": _cells(result.points)},
            "convention": result.points.convention,
            "label": result.label,
            "law": result.law,
            "level": level,
            "forms": [_form_to_dict(form) for form in forms_of(result)],
            "missed": missed_by(result),
            "residual": result.noise.residual,
            "verdict": None if result.verdict is None else result.verdict.sentence(),
            "predictions": {f"{c:.12g}": vars(best) for c, best in optima(result, at, level=level).items()},
        }
    )
    content["sha256"] = _hash(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another name") from error
    return content


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """New runs compared with their predictions."""

    made: str  # when the predictions were made
    sha256: str  # hash of the predictions
    level: float
    rows: tuple[dict[str, Any], ...]  # per new run: params, tokens, loss, predicted, error, low, high, inside
    sizes: tuple[dict[str, Any], ...]  # per frozen C that was run: N of the best run, between, low, high, inside
    known: int  # number of runs in the table that the predictions were made from

    @property
    def inside(self) -> int:
        """The number of new runs that lie inside their intervals."""
        return sum(row["inside"] for row in self.rows)

    def sentence(self) -> str:
        """A summary of the grades in words."""
        if not self.rows:
            return f"no new run: all {self.known} were there when the predictions were made ({self.made})"
        errors = np.array([row["error"] for row in self.rows])
        said = f"{self.inside} of {len(self.rows)} new runs lie inside their {self.level:.0%} interval"
        return f"{said}; the law was off by {errors.mean():+.2%} in the mean, {np.sqrt((errors**2).mean()):.2%} rms"

    def report(self) -> str:
        """The summary, every new run and every best size, as text."""
        lines = [f"predictions of {self.made} ({self.sha256[:12]}): {self.sentence()}"]
        lines += [
            f"  N {text.count(r['params'])}, D {text.count(r['tokens'])}: {r['loss']:.4g}, predicted "
            f"{r['predicted']:.4g} ({r['low']:.4g} to {r['high']:.4g}), off by {r['error']:+.2%}"
            f"{'' if r['inside'] else ': outside'}"
            for r in self.rows
        ]
        lines += [_of_size(s) for s in self.sizes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The object that `dlm score --json` prints."""
        return {**plain(vars(self)), "inside": self.inside, "sentence": self.sentence()}


def _of_size(s: dict[str, Any]) -> str:
    between, said = text.interval(s["between"], "count"), text.interval((s["low"], s["high"]), "count")
    best = f"the best of {s['runs']} runs has {text.count(s['N'])} parameters, so N* lies within {between}"
    return f"  at {text.flops(s['flops'])} FLOPs {best}: predicted {said}{'' if s['inside'] else ': outside'}"


def score(path: Path, points: Points) -> Score:
    """Grade the frozen predictions in `path` on the runs that they were not made from.

    Raises:
        UserError: For a file that is missing, of another format, or changed since it was written, and for runs whose
            FLOPs are counted by another convention.
    """
    frozen = load(path)
    known = set(frozen["runs"]["cells"])
    new = np.array([cell not in known for cell in _cells(points)], dtype=bool)
    if points.convention != frozen["convention"] and "as given" not in (points.convention, frozen["convention"]):
        raise UserError(f"the runs count FLOPs as {points.convention}, the predictions as {frozen['convention']}")
    held = points.take(new)
    return Score(
        made=frozen["made"],
        sha256=frozen["sha256"],
        level=frozen["level"],
        rows=tuple(_graded_runs(frozen, held)) if len(held) else (),
        sizes=tuple(_graded_sizes(frozen, held)),
        known=int((~new).sum()),
    )


def load(path: Path) -> dict[str, Any]:
    """Read a file of frozen predictions, and check its format and hash."""
    if not path.is_file():
        raise UserError(f"no file {path}: `dlm predict RUNS.csv --at C --freeze FILE` writes one")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no file of frozen predictions: {error}") from error
    said = content.get("format") if isinstance(content, dict) else None
    if said != FORMAT:
        raise UserError(f"{path} is no file of frozen predictions of format {FORMAT} (it says {said})")
    if content.get("sha256") != _hash(content):
        raise UserError(f"{path} has been changed since it was written: its hash does not fit, so nothing is graded")
    return content


def _graded_runs(frozen: dict[str, Any], held: Points) -> list[dict[str, Any]]:
    forms = [_form_from_dict(form, frozen) for form in frozen["forms"]]
    missed = NAN if frozen["missed"] is None else frozen["missed"]
    seen = predict_from(forms, missed, held.params, held.tokens, frozen["level"])
    names = ("params", "tokens", "loss", "predicted", "low", "high")
    columns = (held.params, held.tokens, held.loss, seen.loss, *seen.pi.T)
    rows = [dict(zip(names, row, strict=True)) for row in np.stack(columns, axis=1).tolist()]
    return [
        {**row, "error": row["predicted"] / row["loss"] - 1, "inside": row["low"] <= row["loss"] <= row["high"]}
        for row in rows
    ]


def _graded_sizes(frozen: dict[str, Any], held: Points) -> list[dict[str, Any]]:
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
        low, high = best["ci"]["N"]
        inside = low is not None and high is not None and ends[0] <= high and low <= ends[1]
        found.append(
            {"flops": float(c), "runs": len(near), "N": n, "between": ends, "low": low, "high": high, "inside": inside}
        )
    return found


def _form_to_dict(form: Fitted) -> dict[str, Any]:
    """A form and its first `KEPT` draws as plain data. Failed draws stay, so that too many withhold an interval."""
    assert form.surface is not None and form.draws is not None
    draws = [[float(f"{v:.10g}") for v in row] for row in form.draws[:KEPT].tolist()]
    return {"law": form.law, "row": as_rows(form.surface, form.params)[0].tolist(), "dof": form.dof, "draws": draws}


def _form_from_dict(content: dict[str, Any], frozen: dict[str, Any]) -> Fitted:
    law = LAWS[content["law"]]()
    return Fitted(
        law=law.name,
        n=frozen["runs"]["n"],
        params=dict(zip(law.params, content["row"], strict=True)),
        surface=law,
        draws=np.array(content["draws"], dtype=np.float64),
        dof=content["dof"],
        noise=Noise(residual=frozen["residual"]),
    )


def _cells(points: Points) -> list[str]:
    """A short hash of each run, by which new runs are recognised in a table that has grown."""
    rows = zip(points.params.tolist(), points.tokens.tolist(), points.loss.tolist(), strict=True)
    return [hashlib.sha256(f"{n:.9g},{d:.9g},{loss:.9g}".encode()).hexdigest()[:12] for n, d, loss in rows]


def _hash(content: dict[str, Any]) -> str:
    said = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
