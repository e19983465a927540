"""Fit a law with the loss that its runs leave on the table, because their rate and batch were not the best ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.hparams.cells import SLACK, runs_of
from dlm.fit.hparams.fit import fit_frame
from dlm.fit.hparams.result import WORDS, Hparams
from dlm.fit.points import Array, Mask
from dlm.fit.result import FitResult

if TYPE_CHECKING:
    import pandas as pd

TUNE = "tune"  # the role of a run that varies the recipe, and enters no law
FLAGGED = 0.005  # share of the loss from which a run is named as off the frontier
FAR = 10.0  # sizes and tokens beyond the tuned ones by a larger factor get no term
DRAWS = 6  # of the term, to which the law is fitted again, to find how much the term's own error moves a
MOST_NAMED = 3
INSIDE = 1.05  # runs outside the tuned sizes and tokens by a smaller factor get no warning


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """The runs of a law, and the log of the loss of each over that of the best rate and batch."""

    runs: pd.DataFrame  # without tuning runs, losses as measured
    excess: Array  # (n,)
    draws: Array  # the same for draws of the laws of rate and batch, (R, n)
    hparams: Hparams
    num_tuning: int

    def without(self, excess: Array) -> pd.DataFrame:
        """The runs with the losses that they would have without this excess; `measured_loss` keeps those measured."""
        found = self.runs.assign(measured_loss=self.runs["loss"], loss=self.runs["loss"] * np.exp(-excess))
        found.attrs = {name: list(lines) for name, lines in self.runs.attrs.items()}
        return found

    @property
    def meaning(self) -> str:
        """What the losses without their excess are, in words."""
        settings = " and ".join(WORDS[name] for name in self.hparams.powers)
        return f"the losses are those at the best {settings}, by {text.counted(self.num_tuning, 'tuning run')}"

    def fit(self, fit: Callable[..., FitResult], bootstrap: int) -> FitResult:
        """Fit the law to the runs without their excess, and again with it, to say what the term does to a and b."""
        result = fit(self.without(self.excess), bootstrap=bootstrap)
        measured = fit(self.runs, bootstrap=0, conventions=False)
        drawn = [fit(self.without(excess), bootstrap=0, conventions=False).allocation for excess in self.draws[:DRAWS]]
        exponents = {
            name: {
                "with": getattr(result.allocation, name),
                "without": getattr(measured.allocation, name),
                "error": float(np.std([getattr(one, name) for one in drawn])) if len(drawn) > 1 else float("nan"),
            }
            for name in ("a", "b")
        }
        flagged = self._flagged()
        tuning = {
            "tuned": True,
            "sentence": self._sentence(exponents["a"], flagged),
            **exponents,
            "excess": {
                "median": float(np.median(np.expm1(self.excess))),
                "largest": float(np.expm1(self.excess.max())),
            },
            "flagged": flagged,
            "num_tuning": self.num_tuning,
            "hparams": self.hparams.to_dict(),
        }
        return replace(result, tuning=tuning)

    def _flagged(self) -> list[dict[str, Any]]:
        """The runs off the frontier, those with the largest excess first."""
        share = np.expm1(self.excess)
        order = [int(place) for place in np.argsort(-share, kind="stable") if share[place] >= FLAGGED]
        rows = self.runs[["params", "tokens"]].to_numpy(dtype=np.float64)
        names = self.runs["run_id"].astype(str).tolist() if "run_id" in self.runs else [None] * len(rows)
        return [
            {"run_id": names[i], "params": float(rows[i, 0]), "tokens": float(rows[i, 1]), "excess": float(share[i])}
            for i in order
        ]

    def _sentence(self, a: dict[str, float], flagged: list[dict[str, Any]]) -> str:
        said = [
            self.meaning,
            f"a is {text.number(a['with'], digits=3)} with this term and {text.number(a['without'], digits=3)} without",
        ]
        if np.isfinite(a["error"]):
            said.append(f"the error of the term moves a by {a['error']:.2g}, which its interval does not hold")
        if "lr" in self.hparams.powers and self.hparams.powers["lr"].free < 2:
            said.append(
                "these cells do not show how the best rate changes with size at one budget, which moves a most: tune "
                "a second size at a budget"
            )
        if flagged:
            named = ", ".join(f"{_name(run)} {run['excess']:.2%}" for run in flagged[:MOST_NAMED])
            more = " ..." if len(flagged) > MOST_NAMED else ""
            said.append(f"{text.counted(len(flagged), 'run')} off the frontier by {FLAGGED:.1%} or more: {named}{more}")
        else:
            said.append(f"no run is off the frontier by {FLAGGED:.1%} of its loss")
        return "; ".join(said)


def _name(run: dict[str, Any]) -> str:
    return run["run_id"] or f"N {text.count(run['params'])}, D {text.count(run['tokens'])}"


def term_of(frame: pd.DataFrame) -> tuple[pd.DataFrame, Term | None]:
    """Take the tuning runs out of a table of one objective.

    Returns:
        (the runs of the law: those that are no tuning runs, and tuning runs with the settings of such a run; the term,
        or None if there are no tuning runs, or if they do not show the best settings of the law's runs, which a warning
        of the table then says).

    Raises:
        UserError: If there are tuning runs only.
    """
    is_tuning = (frame["role"] == TUNE).to_numpy() if "role" in frame else np.zeros(len(frame), dtype=bool)
    if not is_tuning.any():
        return frame, None
    if is_tuning.all():
        raise UserError(
            f"all runs are tuning runs (role is '{TUNE}'), and no law is fitted to them: add the other runs"
        )
    try:
        law = _rows(frame, ~is_tuning | _on_recipe(frame, is_tuning))
        hparams = fit_frame(frame, "these runs")
        law.attrs["warnings"] += [*hparams.warnings, *_beyond(law, hparams)]
    except UserError as error:
        law = _rows(frame, ~is_tuning)
        law.attrs["warnings"].append(f"the tuning runs do not show what other runs leave on the table: {error}")
        return law, None
    runs = runs_of(law)
    where = (runs.log_n, runs.log_d, runs.settings)
    excess, draws = hparams.excess(*where), hparams.excesses(*where)
    return law, Term(runs=law, excess=excess, draws=draws, hparams=hparams, num_tuning=int(is_tuning.sum()))


def at_best(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs of the law as `term_of` finds them, without their excess; a warning of the table says so."""
    law, term = term_of(frame)
    if term is None:
        return law
    found = term.without(term.excess)
    found.attrs["warnings"].append(term.meaning)
    return found


def _rows(frame: pd.DataFrame, keep: Mask) -> pd.DataFrame:
    """The rows where `keep`, (n,), is true, as runs of the law, with their own lists of warnings and notes."""
    rows = frame[keep].assign(role=None).reset_index(drop=True)
    rows.attrs = {name: list(lines) for name, lines in frame.attrs.items()}
    return rows


def _on_recipe(frame: pd.DataFrame, is_tuning: Mask) -> Mask:
    """Whether each run has the cell and the settings of a run that is no tuning run, (n,)."""
    runs = runs_of(frame)
    settings = np.round(np.nan_to_num(runs.settings) / SLACK)
    keys = [*zip(runs.cell.tolist(), *settings.T.tolist(), strict=True)]
    own = {key for key, tuning in zip(keys, is_tuning, strict=True) if not tuning}
    return np.array([key in own for key in keys], dtype=bool)


def _beyond(law: pd.DataFrame, hparams: Hparams) -> list[str]:
    """Warnings about runs of the law outside the sizes and tokens that were tuned; a UserError if far outside."""
    found = []
    for name, (low, high) in hparams.range.items():
        values = law[name]
        far = max(low / values.min(), values.max() / high)
        ends, tuned = (text.interval(pair, "count") for pair in ((values.min(), values.max()), (low, high)))
        if far > FAR:
            raise UserError(
                f"the runs of the law have {name} of {ends}, up to {far:.3g} times outside those tuned ({tuned}), and "
                f"no law of the rate is used beyond {FAR:g} times: tune at the lowest and at the highest budget"
            )
        if far > INSIDE:
            found.append(
                f"the tuned {name} are {tuned}, and those of the law {ends}: the best settings are extrapolated"
            )
    return found
