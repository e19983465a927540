"""What a file of frozen predictions holds: the check of its types, and the forms of a law as plain data.

The hash of the file does not make this check needless, because anyone can compute it anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlm.core.errors import UserError
from dlm.core.typed import typed
from dlm.fit.combined.error import FormError
from dlm.fit.fitted import Fitted, Noise
from dlm.fit.laws import LAWS
from dlm.fit.laws.combined import Combined
from dlm.fit.laws.law import Surface
from dlm.fit.optimum import as_rows

KEPT = 400  # draws of each form that the file holds


@dataclass(frozen=True, kw_only=True)
class _Part:
    law: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class _Form:
    law: str
    row: tuple[float | None, ...]
    fixed: Mapping[str, float] | None = None
    dof: float | None
    draws: tuple[tuple[float | None, ...], ...]
    parts: Mapping[str, _Part] | None = None


@dataclass(frozen=True, kw_only=True)
class _Lower(_Form):
    """The law of the runs below top budgets that are in doubt."""

    error: FormError


@dataclass(frozen=True, kw_only=True)
class _Runs:
    n: int
    top: float
    table: Mapping[str, tuple[Any, ...]] | None = None
    cells: tuple[str, ...] | None = None  # format 1


@dataclass(frozen=True, kw_only=True)
class _Intervals:
    N: tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class _Best:
    ci: _Intervals
    withheld: str


@dataclass(frozen=True, kw_only=True)
class _Content:
    """The content of the file, as far as it is read again."""

    format: int
    made: str
    sha256: str
    convention: str
    label: str | None
    level: float
    runs: _Runs
    forms: tuple[_Form, ...]
    missed: float | None
    error: FormError | None = None
    lower: tuple[_Lower, ...] = ()  # earlier versions did not write it
    residual: float
    predictions: Mapping[str, _Best]


def check_content(content: Mapping[str, Any], path: Path) -> None:
    """Raise UserError, which names the first wrong value, if no predictions can be made from the content of a file."""
    try:
        said = typed(_Content, content)
        for form in (*content["forms"], *content.get("lower", ())):
            form_from_dict(form, content)
        for flops in said.predictions:
            float(flops)
        _check_runs(said)
    except (ValueError, KeyError, IndexError) as error:
        words = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path} is no file of frozen predictions ({words}): restore it, for example from version control"
        ) from error


def _check_runs(said: _Content) -> None:
    """Raise ValueError unless the file names the runs, and its level is that of an interval."""
    table = said.runs.table
    if not 0 < said.level < 1:
        raise ValueError(f"level is {said.level}, and must be above 0 and below 1")
    if not said.forms:
        raise ValueError("forms is empty")
    if said.format == 1:
        typed(tuple[str, ...], said.runs.cells, "runs.cells")
        return
    if table is None or not {"params", "tokens", "loss"} <= table.keys():
        raise ValueError("runs.table has not all of params, tokens and loss")
    if len({len(column) for column in table.values()}) > 1 or not table["loss"]:
        raise ValueError("the columns of runs.table are empty or differ in their lengths")
    numbers = [*map(float, (*table["params"], *table["tokens"])), *typed(tuple[float, ...], table["loss"], "runs.loss")]
    if not all(number > 0 for number in numbers):
        raise ValueError("a number of runs.table is not above 0")
    for name, column in table.items():
        if name != "loss":
            typed(tuple[str, ...], column, f"runs.table.{name}")


def form_to_dict(form: Fitted) -> dict[str, Any]:
    """A form and its first `KEPT` draws as plain data. Failed draws stay, so that too many withhold an interval."""
    assert form.surface is not None and form.draws is not None
    draws = [[float(f"{v:.10g}") for v in row] for row in form.draws[:KEPT].tolist()]
    row = as_rows(form.surface, form.params)[0].tolist()
    content = {"law": form.law, "row": row, "fixed": form.fixed, "dof": form.dof, "draws": draws}
    if isinstance(form.surface, Combined):
        parts = form.surface.parts.items()
        content["parts"] = {name: {"law": law.name, "weight": form.surface.weights[name]} for name, law in parts}
    return content


def form_from_dict(content: Mapping[str, Any], frozen: Mapping[str, Any]) -> Fitted:
    law: Surface
    if "parts" in content:
        parts = content["parts"].items()
        laws, weights = {k: LAWS[part["law"]]() for k, part in parts}, {k: part["weight"] for k, part in parts}
        law = Combined(laws, weights)
    else:
        law = LAWS[content["law"]]()
    return Fitted(
        law=law.name,
        n=frozen["runs"]["n"],
        params=dict(zip(law.params, content["row"], strict=True)),
        fixed=content.get("fixed", {}),  # earlier versions did not write it
        surface=law,
        draws=np.array(content["draws"], dtype=np.float64),
        dof=content["dof"],
        noise=Noise(residual=frozen["residual"]),
    )
