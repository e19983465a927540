"""frozen: predictions that are written down before the runs exist, and their grades afterwards. Called by cli.

The file holds what is needed to predict any (N, D): the forms with a share of their draws, dated and hashed, so that
nobody can say afterwards that it was known all along.
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
from dlm.fit.fitted import plain
from dlm.fit.laws import LAWS
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.optimum import optima
from dlm.fit.points import Array, Points
from dlm.fit.predict import Form, at_places, forms_of
from dlm.fit.result import FitResult

FORMAT = 1


KEPT = 400  # draws of each form in the file


SAME = 0.1  # runs within this share of a frozen C count as runs at it


LEAST_SIZES = 3  # for the best of them to say something of N*


def freeze(result: FitResult, at: Sequence[float], path: Path, *, level: float = 0.95) -> dict[str, Any]:
    """Write the predictions at each C (FLOPs) to `path` and return what was written.

    Raises UserError where the law is no surface with intervals, or where the file exists: it is never overwritten.
    """
    if result.surface is None or result.draws is None or result.points is None:
        raise UserError(f"{result.law} gives no prediction: freeze a surface ({', '.join(LAWS)}) with its bootstrap")
    if isinstance(result.surface, DataConstrained):
        raise UserError("data-constrained predictions need the unique tokens of each run: not frozen yet")
    if path.exists():
        raise UserError(f"{path} exists: frozen predictions are never overwritten, give another name")
    forms = forms_of(result)
    content: dict[str, Any] = {
        "format": FORMAT,
        "dlm": version("dlm"),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": {"n": result.n, "top": float(result.points.flops.max()), "cells": _cells(result.points)},
        "convention": result.points.convention,
        "label": result.label,
        "law": result.law,
        "level": level,
        "forms": [{"law": f.law.name, "row": f.row[0].tolist(), "dof": f.dof, "draws": _kept(f.draws)} for f in forms],
        "missed": None if result.verdict is None else result.verdict.missed,
        "residual": result.noise.residual,
        "verdict": None if result.verdict is None else result.verdict.sentence(),
        "predictions": {f"{c:.12g}": vars(best) for c, best in optima(result, at, level=level).items()},
    }
    content = plain(content)
    content["sha256"] = _hash(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another name") from error
    return content


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """New runs against what was predicted of them."""

    made: str
    sha256: str
    level: float
    rows: tuple[dict[str, Any], ...]  # one a new run: params, tokens, loss, predicted, error, low, high, inside
    sizes: tuple[dict[str, Any], ...]  # one a frozen C that was run: N of the best run, its neighbours, low, high
    known: int  # runs of the table that the predictions were made from

    @property
    def inside(self) -> int:
        """New runs inside their interval."""
        return sum(row["inside"] for row in self.rows)

    def sentence(self) -> str:
        """The grade in words."""
        if not self.rows:
            return f"no new run: all {self.known} were there when the predictions were made ({self.made})"
        errors = np.array([row["error"] for row in self.rows])
        said = f"{self.inside} of {len(self.rows)} new runs lie inside their {self.level:.0%} interval"
        return f"{said}; the law was off by {errors.mean():+.2%} in the mean, {np.sqrt((errors**2).mean()):.2%} rms"

    def report(self) -> str:
        """The grade, every new run, and every size."""
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
        """Everything, for `--json`."""
        return {**plain(vars(self)), "inside": self.inside, "sentence": self.sentence()}


def _of_size(s: dict[str, Any]) -> str:
    between, said = text.interval(s["between"], "count"), text.interval((s["low"], s["high"]), "count")
    best = f"the best of {s['runs']} runs has {text.count(s['N'])} parameters, so N* lies within {between}"
    return f"  at {text.flops(s['flops'])} FLOPs {best}: predicted {said}{'' if s['inside'] else ': outside'}"


def score(path: Path, points: Points) -> Score:
    """Grade the frozen predictions in `path` by the points that were not among those they were made from.

    Raises UserError for a file that is missing, of another format, or changed since it was written, and for runs that
    count FLOPs otherwise.
    """
    frozen = load(path)
    known = set(frozen["runs"]["cells"])
    new = np.array([cell not in known for cell in _cells(points)], dtype=bool)
    if points.convention != frozen["convention"] and "as given" not in (points.convention, frozen["convention"]):
        raise UserError(f"the runs count FLOPs as {points.convention}, the predictions as {frozen['convention']}")
    held = points.take(new)
    rows: list[dict[str, Any]] = []
    if len(held):
        missed = np.nan if frozen["missed"] is None else frozen["missed"]
        seen = at_places(
            [_form(f) for f in frozen["forms"]], missed, frozen["residual"], frozen["runs"]["n"],
            held.params, held.tokens, frozen["level"],
        )  # fmt: skip
        columns = (held.params, held.tokens, held.loss, seen.loss, *seen.pi.T)
        for n, d, loss, predicted, low, high in zip(*(c.tolist() for c in columns), strict=True):
            rows.append(
                {"params": n, "tokens": d, "loss": loss, "predicted": predicted, "error": predicted / loss - 1,
                 "low": low, "high": high, "inside": low <= loss <= high}
            )  # fmt: skip
    return Score(
        made=frozen["made"],
        sha256=frozen["sha256"],
        level=frozen["level"],
        rows=tuple(rows),
        sizes=tuple(_sizes(frozen, held)),
        known=int((~new).sum()),
    )


def load(path: Path) -> dict[str, Any]:
    """The file, checked."""
    if not path.is_file():
        raise UserError(f"no file {path}: `dlm predict RUNS.csv --at C --freeze FILE` writes one")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no file of frozen predictions: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        said = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"{path} is no file of frozen predictions of format {FORMAT} (it says {said})")
    if content.get("sha256") != _hash(content):
        raise UserError(f"{path} has been changed since it was written: its hash does not fit, so nothing is graded")
    return content


def _sizes(frozen: dict[str, Any], held: Points) -> list[dict[str, Any]]:
    found = []
    for c, best in frozen["predictions"].items():
        near = held.take(np.abs(held.flops / float(c) - 1) < SAME)
        if len(np.unique(near.params)) < LEAST_SIZES:
            continue
        sizes, n = np.unique(near.params), float(near.params[near.loss.argmin()])
        place = int(np.searchsorted(sizes, n))
        # The best of the sizes that were run says that N* lies between its neighbours, and no more.
        ends = float(sizes[max(place - 1, 0)]), float(sizes[min(place + 1, len(sizes) - 1)])
        low, high = best["ci"]["N"]
        inside = low is not None and high is not None and ends[0] <= high and low <= ends[1]
        found.append(
            {"flops": float(c), "runs": len(near), "N": n, "between": ends, "low": low, "high": high, "inside": inside}
        )
    return found


def _form(content: dict[str, Any]) -> Form:
    draws = np.array(content["draws"], dtype=np.float64)
    return Form(law=LAWS[content["law"]](), row=np.array([content["row"]]), draws=draws, dof=content["dof"])


def _kept(draws: Array) -> list[list[float]]:
    """Draws that failed stay as they are, so that too many of them withhold the interval here too."""
    return [[float(f"{v:.10g}") for v in row] for row in draws[:KEPT].tolist()]


def _cells(points: Points) -> list[str]:
    """A short hash of each run, so that a table that has grown tells its new runs."""
    rows = zip(points.params.tolist(), points.tokens.tolist(), points.loss.tolist(), strict=True)
    return [hashlib.sha256(f"{n:.9g},{d:.9g},{loss:.9g}".encode()).hexdigest()[:12] for n, d, loss in rows]


def _hash(content: dict[str, Any]) -> str:
    said = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
