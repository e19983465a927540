"""Show exponents of several sets of runs side by side, and the parts of their spread, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlm.core.table import laid_out
from dlm.fit.fitted import plain
from dlm.fit.spread import Cell, Part, shares

PARTS = {
    "convention": "how N and C are counted",
    "form": "form of the law",
    "noise": "noise of one set",
    "rest": "rest, between the sets",
}


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """One set of runs: its name, and what it allows."""

    label: str
    num_runs: int
    size: Mapping[str, str]  # the source of each count of N
    compute: Mapping[str, str]  # the source of each count of C
    own: str  # the count of C that its budgets are in
    noise: float  # standard deviation of its losses, as a share
    missing: tuple[str, ...]  # the forms that it does not support, and why
    warnings: tuple[str, ...]  # about its runs


@dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """Exponents of several sets under every count and form, and the parts of their spread."""

    sets: Sequence[SetFacts]
    exponents: Mapping[str, Sequence[Mapping[Cell, tuple[float, float]]]]  # 'a' and 'b': value and noise, by set
    common: Sequence[Cell]  # the cells that all sets allow
    parts: Mapping[str, Mapping[str, Part]]  # by 'a' and 'b', then by part

    def cells(self) -> list[Cell]:
        """All cells that any set allows, those of all sets first."""
        every = dict.fromkeys(cell for cells in self.exponents["a"] for cell in cells)
        return [*self.common, *(cell for cell in every if cell not in self.common)]

    def meaning(self) -> list[str]:
        """What the split tells, and what it cannot tell."""
        free, rest = len(self.sets) - 1, self.parts["a"]["rest"]
        counted = self.parts["a"]["convention"].sets
        convention = f"the part of the counts is from the {counted} of {len(self.sets)} sets that allow several counts"
        if not counted:
            convention = "no set allows several counts of N or C, so the part of the counts is not known"
        many = "1 degree" if free == 1 else f"{free} degrees"
        return [
            convention,
            f"the rest has {many} of freedom: for a its standard deviation is {_number(rest.ci[0])} to "
            f"{_number(rest.ci[1])} (95 %)",
            "the rest holds all else in which the sets differ (data, objective, architecture, recipe, range of C), and "
            "the split cannot tell which of these it is",
        ]

    def to_dict(self) -> dict[str, Any]:
        """The object that `dlm reconcile --json` prints."""
        return {
            "sets": [plain(vars(one)) for one in self.sets],
            "cells": [self._cell(cell) for cell in self.cells()],
            "parts": {name: {key: self._part(parts, key) for key in PARTS} for name, parts in self.parts.items()},
            "meaning": self.meaning(),
        }

    def _cell(self, cell: Cell) -> dict[str, Any]:
        rows = {
            name: [plain(found[cell][0]) if cell in found else None for found in sets]
            for name, sets in self.exponents.items()
        }
        noise = {
            f"{name}_sd": [plain(found[cell][1]) if cell in found else None for found in sets]
            for name, sets in self.exponents.items()
        }
        return {**vars(cell), "common": cell in self.common, **rows, **noise}

    @staticmethod
    def _part(parts: Mapping[str, Part], name: str) -> dict[str, Any]:
        part, found = parts[name], {"variance": parts[name].variance, "sd": parts[name].sd}
        more = {"ci": part.ci} if name == "rest" else {}
        known: dict[str, Any] = plain({**found, "share": shares(parts).get(name, float("nan")), **more})
        return {**known, "sets": part.sets}

    def report(self, *, width: int | None = None) -> str:
        """The result as a page of text, whose tables fit a terminal of ``width`` columns."""
        lines = [f"reconcile: {len(self.sets)} sets"]
        for place, one in enumerate(self.sets, start=1):
            lines.append(f"  [{place}] {one.label}: {one.num_runs} runs, budgets in {one.own}, noise {one.noise:.2%}")
            lines += [f"      {line}" for line in (*one.missing, *one.warnings)]
        for name in self.exponents:
            lines += ["", *self._table(name, width)]
        lines += ["", *self._parts_table(width), *self.meaning()]
        return "\n".join(lines)

    def _table(self, name: str, width: int | None) -> list[str]:
        """One row per cell and one column per set; a star marks the cells that all sets allow."""
        sets = self.exponents[name]
        names = (f" {name}: N", "C ", "form ")
        rows = [[*names, *(f"[{place}]" for place in range(1, len(sets) + 1)), "sd"]]
        for cell in self.cells():
            values = [found[cell][0] if cell in found else float("nan") for found in sets]
            known = [value for value in values if np.isfinite(value)]
            spread = float(np.std(known, ddof=1)) if len(known) > 1 else float("nan")
            mark = "*" if cell in self.common else " "
            rows.append([f"{mark}{cell.N}", cell.C, cell.by, *(_number(value) for value in (*values, spread))])
        return list(laid_out(rows, width, left=names, gap=1).lines)

    def _parts_table(self, width: int | None) -> list[str]:
        rows = [["spread of the exponents", "  a: sd", "share", "  b: sd", "share"]]
        for key, words in PARTS.items():
            cells = []
            for parts in self.parts.values():
                share = shares(parts).get(key, float("nan"))
                cells += [_number(parts[key].sd), f"{share:.0%}" if np.isfinite(share) else "-"]
            rows.append([words, *cells])
        return list(laid_out(rows, width, left=rows[0][:1]).lines)


def _number(value: float) -> str:
    """'.537', without the leading zero; '-' if it is not known."""
    return f"{value:.3f}".replace("0.", ".", 1) if np.isfinite(value) and abs(value) < 1 else _long(value)


def _long(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "-"
