"""Show fitted learning rates and batches as text, as JSON and as a recipe that a plan can use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dlm.core import text
from dlm.fit.fitted import plain
from dlm.fit.hparams.cells import AXES
from dlm.fit.hparams.powers import TERMS, Power
from dlm.fit.layout import text_table, within
from dlm.fit.points import Array, Interval

FORMAT = "dlm-recipe-1"
WORDS = {"lr": "learning rate", "batch": "batch"}
KEYS = {"lr": "lr", "batch": "batch_tokens"}  # the keys of a recipe


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The runs of one size and number of tokens, and the best settings by their parabola."""

    params: float
    tokens: float
    num_runs: int
    tried: Mapping[str, Interval]  # the lowest and the highest value of each axis
    best: Mapping[str, float]  # learning rate, and tokens of a batch
    reason: str = ""  # why the cell enters no law: its best value lies outside those tried; empty if it does enter
    next: str = ""  # what to run so that it can enter

    @property
    def usable(self) -> bool:
        """Whether the best settings lie within those tried."""
        return not self.reason


@dataclass(frozen=True, kw_only=True, eq=False)
class Hparams:
    """lr*(N, D) and B*(D) as power laws, and how much loss a run loses that does not follow them."""

    objective: str
    optimizer: str | None
    powers: Mapping[str, Power]  # of 'lr', 'batch' or both
    curvature: Array  # H, second derivatives of log loss over the logs of the fitted settings, (k, k)
    curvatures: Array = field(repr=False)  # the same of every draw, (R, k, k)
    noise: float  # standard deviation of log loss between runs
    cells: tuple[Cell, ...]
    num_runs: int  # runs of the usable cells
    source: str
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def used(self) -> tuple[Cell, ...]:
        """The cells that the laws rest on."""
        return tuple(cell for cell in self.cells if cell.usable)

    @property
    def range(self) -> dict[str, Interval]:
        """The sizes and tokens of the cells that the laws rest on."""
        values = {name: [getattr(cell, name) for cell in self.used] for name in ("params", "tokens")}
        return {name: (min(found), max(found)) for name, found in values.items()}

    @property
    def axes(self) -> list[int]:
        """The columns of the settings (`dlm.fit.hparams.cells.AXES`) that were fitted."""
        return [place for place, name in enumerate(AXES) if name in self.powers]

    def excess(self, log_n: Array, log_d: Array, settings: Array) -> Array:
        """The log of the loss of each run over that of the best settings, (n,). `settings` are logs, (n, 2)."""
        best = np.stack([power.logs(log_n, log_d) for power in self.powers.values()], axis=1)
        off = settings[:, self.axes] - best
        return np.asarray(0.5 * np.einsum("ni,ij,nj->n", off, self.curvature, off))

    def excesses(self, log_n: Array, log_d: Array, settings: Array) -> Array:
        """The same of every draw that has a minimum, (R, n)."""
        best = np.stack([power.drawn(log_n, log_d) for power in self.powers.values()], axis=2)
        off = settings[None][:, :, self.axes] - best
        found: Array = 0.5 * np.einsum("rni,rij,rnj->rn", off, self.curvatures, off)
        return found[np.isfinite(found).all(axis=1)]

    def cost_of_two(self) -> dict[str, float]:
        """The share of the loss that a factor of two in each setting costs."""
        return {
            name: float(np.expm1(0.5 * self.curvature[k, k] * np.log(2.0) ** 2)) for k, name in enumerate(self.powers)
        }

    def recipe(self) -> dict[str, Any]:
        """The content of a recipe file, which a plan reads (docs/tuning.md)."""
        laws = {
            KEYS[name]: {term: getattr(self.powers[name], term) for term in TERMS} if name in self.powers else None
            for name in AXES
        }
        return {
            "format": FORMAT,
            "objective": self.objective or None,
            **laws,
            "range": {name: list(ends) for name, ends in self.range.items()},
            "runs": self.num_runs,
            "source": self.source,
            "optimizer": self.optimizer,
        }

    def to_dict(self) -> dict[str, Any]:
        """The object that `dlm hparams --json` prints. A number that is not known is None."""
        laws = {name: {**_shown(power), "cost_of_two": self.cost_of_two()[name]} for name, power in self.powers.items()}
        values = {
            "objective": self.objective,
            "laws": laws,
            "curvature": self.curvature.tolist(),
            "noise": self.noise,
            "cells": [vars(cell) for cell in self.cells],
            "warnings": self.warnings,
            "notes": self.notes,
            "recipe": self.recipe(),
        }
        return {key: plain(value) for key, value in values.items()}

    def report(self, *, width: int | None = None) -> str:
        """The result as a page of text, whose table fits a terminal of ``width`` columns."""
        label = f" of {self.objective}" if self.objective else ""
        rows = [f"best settings{label}: {text.counted(self.num_runs, 'run')} in {text.counted(len(self.used), 'cell')}"]
        rows += [line for name, power in self.powers.items() for line in self._lines(name, power)]
        rows += [f"  noise: {self.noise:.2%} of the loss between runs"] if np.isfinite(self.noise) else []
        ranges = self.range
        sizes, tokens = (text.interval(ranges[name], "count") for name in ("params", "tokens"))
        rows.append(f"  range: N {sizes}, D {tokens}")
        rows += [f"  {line}" for line in text_table(self._table(), within(width))]
        rows += [f"  warning: {warning}" for warning in self.warnings]
        rows += [f"  note: {note}" for note in self.notes]
        return "\n".join(rows)

    def _lines(self, name: str, power: Power) -> list[str]:
        unit = " tokens" if name == "batch" else ""
        law = f"  best {WORDS[name]} = {np.exp(power.log):.4g} N^{power.params:.4g} D^{power.tokens:.4g}{unit}"
        exponents = [term for term in TERMS[1:] if getattr(power, term)]
        ends = [f"    exponent of {'N' if t == 'params' else 'D'}: {text.interval(power.ci.get(t))}" for t in exponents]
        scatter = f", cells scatter by a factor of {np.exp(power.scatter):.2f}" if power.scatter else ""
        return [
            law,
            *ends,
            f"    a factor of two from the best costs {self.cost_of_two()[name]:.2%} of the loss{scatter}",
        ]

    def _table(self) -> list[tuple[str, ...]]:
        names = list(self.powers)
        heads = (
            "N",
            "D",
            "runs",
            *(f"{WORDS[name]} tried" for name in names),
            *(f"best {WORDS[name]}" for name in names),
        )
        return [heads, *(self._row(cell, names) for cell in self.cells)]

    def _row(self, cell: Cell, names: list[str]) -> tuple[str, ...]:
        tried = (f"{shown(name, cell.tried[name][0])} to {shown(name, cell.tried[name][1])}" for name in names)
        best = [shown(name, cell.best[name]) if cell.usable else "outside" for name in names]
        return (text.count(cell.params), text.count(cell.tokens), str(cell.num_runs), *tried, *best)


def shown(name: str, value: float) -> str:
    """A setting as text."""
    return text.count(value) if name == "batch" else text.number(value, digits=3)


def _shown(power: Power) -> dict[str, Any]:
    return {
        **{term: getattr(power, term) for term in TERMS},
        "ci": power.ci,
        "scatter": power.scatter,
        "free": power.free,
    }
