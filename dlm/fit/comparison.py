"""comparison: several FitResults -> one table of a, b, N*, D*, L* at one C, and how far they disagree.
Called by notebooks; two laws at equal loss are in multiplier.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.optimum import optima
from dlm.fit.points import NAN, Interval
from dlm.fit.result import FitResult

HEADS = ("method", "a", "b", "N*", "D*", "L*", "status")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method's answer at the common C."""

    name: str
    a: float
    b: float
    N: float
    D: float
    L: float
    ci: Mapping[str, Interval]
    status: str


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Methods side by side at `flops`; `spread` is the largest N* over the smallest among those that
    answered.
    """

    flops: float
    rows: tuple[Row, ...]
    spread: float

    def report(self) -> str:
        """The table as text."""
        cells = [HEADS, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[k]) for line in cells) for k in range(len(HEADS))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([f"best use of {text.flops(self.flops)} FLOPs", *lines, self.verdict()])

    def verdict(self) -> str:
        """How far the methods disagree, in words."""
        if not np.isfinite(self.spread):
            return "fewer than two methods give an answer: nothing to set side by side"
        return f"the methods' best sizes differ by a factor of {self.spread:.2f}"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in HEADS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in _cells(row)) + "</tr>" for row in self.rows
        )
        return f"<table><tr>{head}</tr>{body}</table><p>{self.verdict()}</p>"


def side_by_side(results: Iterable[FitResult] | Mapping[str, FitResult], *, at: float | None = None) -> SideBySide:
    """Set the methods side by side at `at` FLOPs, by default the highest C of the points."""
    named = dict(results) if isinstance(results, Mapping) else {_name(r): r for r in results}
    tops = [float(r.points.flops.max()) for r in named.values() if r.points is not None]
    if not tops:
        raise UserError("nothing to set side by side: give at least one fitted result")
    flops = max(tops) if at is None else float(at)
    rows = tuple(_row(name, result, flops) for name, result in named.items())
    sizes = [row.N for row in rows if np.isfinite(row.N)]
    return SideBySide(flops=flops, rows=rows, spread=max(sizes) / min(sizes) if len(sizes) > 1 else NAN)


def _name(result: FitResult) -> str:
    kind = f"{result.law} ({result.loss}, {result.space})" if result.surface is not None else result.law
    return f"{result.label} {kind}".strip()


def _row(name: str, result: FitResult, flops: float) -> Row:
    share, known = result.allocation, optima(result, [flops]).get(flops)
    n, d, loss = (known.N, known.D, known.L) if known else (NAN, NAN, NAN)
    ci = {k: v for k, v in result.ci.items() if k in ("a", "b")} | (dict(known.ci) if known else {})
    return Row(name=name, a=share.a, b=share.b, N=n, D=d, L=loss, ci=ci, status=result.status)


def _cells(row: Row) -> tuple[str, ...]:
    def shown(key: str, style: str) -> str:
        value = getattr(row, key)
        ends = f" ({text.interval(row.ci[key], style)})" if key in row.ci else ""
        return (text.count(value) if style == "count" else text.number(value)) + ends

    return (
        row.name,
        *(shown(k, "number") for k in "ab"),
        *(shown(k, "count") for k in "ND"),
        shown("L", "number"),
        row.status,
    )
