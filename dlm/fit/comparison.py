"""Set several fits side by side: a, b, N*, D* and L* of each at one C, and how far they disagree.

The compute that two laws need for equal loss is compared in `multiplier`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.fitted import Fitted
from dlm.fit.layout import escaped, html_block, html_table, text_table
from dlm.fit.optimum import optima
from dlm.fit.points import NAN, Interval

HEADS = ("method", "a", "b", "N*", "D*", "L*", "status")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The exponents and the optimum of one method at the common C."""

    name: str
    a: float
    b: float
    N: float
    D: float
    L: float
    ci: Mapping[str, Interval]
    status: str

    def cells(self) -> tuple[str, ...]:
        """The cells of the row as text, in the order of `HEADS`."""
        sizes = (f"{text.count(getattr(self, k))}{self._ends(k, 'count')}" for k in "ND")
        a, b, loss = (f"{text.number(getattr(self, k))}{self._ends(k, 'number')}" for k in "abL")
        return (self.name, a, b, *sizes, loss, self.status)

    def _ends(self, key: str, style: str) -> str:
        return f" ({text.interval(self.ci[key], style)})" if key in self.ci else ""


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """The optima of several methods at one C."""

    flops: float  # C, FLOPs
    rows: tuple[Row, ...]
    spread: float  # ratio of the largest to the smallest N*; NaN if fewer than two methods give an N*

    def report(self, *, width: int | None = None) -> str:
        """The table as text, which fits a terminal of ``width`` columns."""
        table = text_table([HEADS, *(row.cells() for row in self.rows)], width)
        return "\n".join([f"best use of {text.flops(self.flops)} FLOPs", *table, self.verdict()])

    def verdict(self) -> str:
        """How far the methods disagree, in words."""
        if not np.isfinite(self.spread):
            return "fewer than two methods give an answer: nothing to set side by side"
        return f"the methods' best sizes differ by a factor of {self.spread:.2f}"

    def _repr_html_(self) -> str:
        table = html_table([HEADS, *(row.cells() for row in self.rows)])
        return html_block(table, f"<p>{escaped(self.verdict())}</p>")


def side_by_side(results: Iterable[Fitted] | Mapping[str, Fitted], *, at: float | None = None) -> SideBySide:
    """Set fits side by side at one C.

    Args:
        results: The fits, or a mapping from names to fits.
        at: The common C in FLOPs; by default the highest C of the runs.

    Raises:
        UserError: If there is no fit with points.
    """
    named = dict(results) if isinstance(results, Mapping) else {_name(r): r for r in results}
    tops = [r.points.top_flops for r in named.values() if r.points is not None]
    if not tops:
        raise UserError("nothing to set side by side: give at least one fitted result")
    flops = max(tops) if at is None else float(at)
    rows = tuple(_row(name, result, flops) for name, result in named.items())
    sizes = [row.N for row in rows if np.isfinite(row.N)]
    return SideBySide(flops=flops, rows=rows, spread=max(sizes) / min(sizes) if len(sizes) > 1 else NAN)


def _name(result: Fitted) -> str:
    kind = f"{result.law} ({result.norm}, {result.how.space})" if result.surface is not None else result.law
    return f"{result.label} {kind}".strip()


def _row(name: str, result: Fitted, flops: float) -> Row:
    share, known = result.allocation, optima(result, [flops]).get(flops)
    n, d, loss = (known.N, known.D, known.L) if known else (NAN, NAN, NAN)
    ci = {k: v for k, v in result.ci.items() if k in ("a", "b")} | (dict(known.ci) if known else {})
    return Row(name=name, a=share.a, b=share.b, N=n, D=d, L=loss, ci=ci, status=result.status)
