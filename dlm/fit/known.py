"""Recognise the runs that a prediction was made from in a table that has grown since.

A run is recognised by what was trained and on what, not by its loss: a loss may change in its last digits when it is
evaluated again, or when a table is written with fewer digits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlm.fit.points import Mask, Points

# The columns that two runs share if they differ in chance alone. A bare table may have params and tokens only.
SETTINGS = (
    "objective",
    "model",
    "params",
    "tokens",
    "global_batch_size",
    "learning_rate",
    "weight_decay",
    "dropout",
    "schedule",
    "data_hash",
    "unique_tokens",
)
IDENTITY = (*SETTINGS, "seed")  # the columns that tell runs apart
SAME_LOSS = 1e-5  # rounding to float32 and the order of additions change a loss by a smaller share

RunTable = Mapping[str, Sequence[Any]]  # columns of IDENTITY as text, and 'loss' as numbers, a value for each run


@dataclass(frozen=True, kw_only=True, eq=False)
class Match:
    """The runs of a table compared with the runs that a prediction was made from."""

    new: Mask  # the runs of the table that are not among the known runs, (n,)
    lost: int  # number of known runs that the table lacks
    changes: tuple[float, ...] = ()  # the relative changes of the losses of known runs, where above SAME_LOSS

    def note(self) -> str:
        """A sentence on known runs whose loss has changed; empty if there are none."""
        if not self.changes:
            return ""
        count, most = len(self.changes), 100 * max(self.changes, key=abs)
        runs = "1 known run has" if count == 1 else f"{count} known runs have"
        return f"{runs} another loss than when the predictions were made (by up to {most:+.2g}%): not graded"


def as_text(value: Any, name: str) -> str:
    """A value of a column of IDENTITY as text, equal for numbers that agree to nine digits."""
    if isinstance(value, str):
        return value
    # Seeds are often longer than nine digits, and no table rounds them.
    return f"{value:.15g}" if name == "seed" else f"{value:.9g}"


def of_points(points: Points) -> RunTable:
    """The table of runs that are known by N and D alone."""
    texts = {name: [as_text(v, name) for v in getattr(points, name).tolist()] for name in ("params", "tokens")}
    return {**texts, "loss": points.loss.tolist()}


def hash_of(runs: RunTable) -> str:
    """The SHA-256 of a table of runs, which names the runs that a prediction was made from."""
    return hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()


def match(known: RunTable, runs: RunTable) -> Match:
    """Find the known runs in `runs`, by the columns of IDENTITY that both tables have.

    Where rows agree in all these columns, as replicates without a seed do, each known run stands for one row: the row
    with the nearest loss. The other rows are new.
    """
    columns = [name for name in IDENTITY if name in known and name in runs]
    groups: dict[tuple[str, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, table in enumerate((known, runs)):
        for row, key in enumerate(zip(*(table[name] for name in columns), strict=True)):
            groups[key][side].append(row)
    pairs = [pair for group in groups.values() for pair in _nearest(known["loss"], runs["loss"], *group)]
    new = np.ones(len(runs["loss"]), dtype=bool)
    new[[after for _, after in pairs]] = False
    changes = [runs["loss"][after] / known["loss"][before] - 1 for before, after in pairs]
    large = tuple(change for change in changes if abs(change) > SAME_LOSS)
    return Match(new=new, lost=len(known["loss"]) - len(pairs), changes=large)


def _nearest(
    before: Sequence[float], after: Sequence[float], rows: Sequence[int], others: Sequence[int]
) -> list[tuple[int, int]]:
    """Pair rows of two tables, each at most once, those with the nearest losses first."""
    found, taken = dict[int, int](), set[int]()
    for _, i, j in sorted((abs(math.log(after[j] / before[i])), i, j) for i in rows for j in others):
        if i not in found and j not in taken:
            found[i] = j
            taken.add(j)
    return list(found.items())


def match_hashes(known: Sequence[str], runs: RunTable) -> Match:
    """Find the runs that a file of format 1 knows, which holds hashes of N, D and the loss to nine digits."""
    texts = zip(runs["params"], runs["tokens"], (f"{loss:.9g}" for loss in runs["loss"]), strict=True)
    hashes = [hashlib.sha256(",".join(row).encode()).hexdigest()[:12] for row in texts]
    there = set(known)
    return Match(new=np.array([one not in there for one in hashes], dtype=bool), lost=len(there - set(hashes)))
