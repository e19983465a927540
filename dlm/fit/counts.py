"""Find the ways to count N and C in a table of runs, from its columns and from model sizes that dlm knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dlm.core.errors import UserError, shown
from dlm.core.flops import CONVENTIONS
from dlm.core.objectives import OBJECTIVES
from dlm.core.shape import ModelShape, ladder
from dlm.fit.budgets import TOLERANCE
from dlm.fit.points import SIX_ND_TOLERANCE, Array
from dlm.fit.rows import check_convention, spent_flops

if TYPE_CHECKING:
    import pandas as pd

# The columns that give each count of N; the first of them is the one to add to a table. In scaling-dllms, whose table
# has params_published_non_embed, the published N leaves out the input embedding but not the output head.
SIZE_COLUMNS = {
    "blocks": ("params",),
    "with_head": ("params_with_head", "params_published_non_embed"),
    "with_embeddings": ("params_total",),
}
SIX_ND = {"6n": "blocks", "6n_head": "with_head", "6n_total": "with_embeddings"}  # C = 6 N D, by the count of N
GIVEN = "as given"  # the count of `flops` if it is none that dlm knows


@dataclass(frozen=True, kw_only=True, eq=False)
class Count:
    """One way to count N or C, and where its numbers come from."""

    values: Array  # (n,), one for each run
    source: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """All counts of N and of C that a table of runs allows, by name."""

    size: Mapping[str, Count]
    compute: Mapping[str, Count]
    own: str  # the count of C that budgets and `flops` are in

    @property
    def are_several(self) -> bool:
        """Whether N or C can be counted in more than one way."""
        return len(self.size) > 1 or len(self.compute) > 1

    def is_proportional(self, size: str, compute: str, tokens: Array) -> bool:
        """Whether C = k N D under this count of N and this count of C."""
        ratio = self.compute[compute].values / (self.size[size].values * tokens)
        return _spread(ratio) <= 1 + SIX_ND_TOLERANCE


def counts_of(frame: pd.DataFrame) -> Counts:
    """Find the counts of N and C that the columns of a table allow, or its sizes, where dlm knows their shapes.

    Raises:
        UserError: If a column holds something else than numbers above 0, or if `flops` are counted in several ways.
    """
    sizes = _sizes(frame)
    compute: dict[str, Count] = {
        name: count for name in CONVENTIONS if (count := _column(frame, f"flops_{name}")) is not None
    }
    tokens = frame["tokens"].to_numpy(dtype=np.float64)
    for name, size in SIX_ND.items():
        if size in sizes and name not in compute:
            compute[name] = Count(values=6.0 * sizes[size].values * tokens, source=f"6 N D, N {size}")
    own, spent = _own(frame, compute)
    compute = {**compute, own: spent}
    order = [*CONVENTIONS[:1], "6n_head", *CONVENTIONS[1:], GIVEN]
    return Counts(size=sizes, compute={name: compute[name] for name in order if name in compute}, own=own)


def _sizes(frame: pd.DataFrame) -> dict[str, Count]:
    """The counts of N. A count in `params` that equals another column is that other count, and not N of the blocks."""
    found = {}
    for name, columns in SIZE_COLUMNS.items():
        count = next((count for column in columns if (count := _column(frame, column)) is not None), None)
        if count is not None:
            found[name] = count
    if any(name != "blocks" and _is_same(count, found["blocks"]) for name, count in found.items()):
        del found["blocks"]
    if "blocks" in found and len(found) < len(SIZE_COLUMNS):
        found = {**_of_shapes(frame, found), **found}
    return {name: found[name] for name in SIZE_COLUMNS if name in found}


def _is_same(one: Count, other: Count) -> bool:
    return bool(np.array_equal(one.values, other.values))


def _of_shapes(frame: pd.DataFrame, found: Mapping[str, Count]) -> dict[str, Count]:
    """N with the head, and with all embeddings, if every N is exactly that of a model size that dlm knows."""
    known = {shape.num_params: shape for shape in ladder()}
    shapes = [known.get(int(size)) if size == int(size) else None for size in found["blocks"].values.tolist()]
    if any(shape is None for shape in shapes):
        return {}
    sizes: list[ModelShape] = [shape for shape in shapes if shape is not None]
    names = frame["objective"].tolist() if "objective" in frame else [None] * len(sizes)
    causal = [name in OBJECTIVES and OBJECTIVES[name].causal for name in names]
    totals = [shape.num_params_total(causal=is_causal) for shape, is_causal in zip(sizes, causal, strict=True)]
    if "with_embeddings" in found:  # runs may have another vocabulary than the size in configs/model
        totals = found["with_embeddings"].values.astype(int).tolist()
    # The embedding has one row per entry of the vocabulary, and one for the mask token; the head has no mask token.
    heads = [
        (total - shape.num_params) // shape.n_embd // 2 * shape.n_embd
        for shape, total in zip(sizes, totals, strict=True)
    ]
    with_head = np.asarray(found["blocks"].values + np.array(heads), dtype=np.float64)
    return {
        "with_head": Count(values=with_head, source="shapes of the sizes"),
        "with_embeddings": Count(values=np.asarray(totals, dtype=np.float64), source="shapes of the sizes"),
    }


def _own(frame: pd.DataFrame, compute: Mapping[str, Count]) -> tuple[str, Count]:
    """The name of the count that `flops` are in, and these FLOPs.

    The column `convention` names it. If dlm does not know this name, it is the count that differs from `flops` by a
    constant factor only, to within the tolerance by which FLOPs make up one budget.
    """
    check_convention(frame)
    said = frame["convention"].dropna().astype(str).unique().tolist() if "convention" in frame else []
    spent = np.array(spent_flops(frame).tolist(), dtype=np.float64)
    count = Count(values=spent, source="column flops" if "flops" in frame else "6 x params x tokens")
    if said and said[0] in CONVENTIONS:
        return said[0], count
    spread = {name: _spread(spent / other.values) for name, other in compute.items()}
    nearest = min(spread, key=spread.__getitem__, default=GIVEN)
    if spread.get(nearest, float("inf")) <= (1 + TOLERANCE) ** 2:
        return nearest, count
    return GIVEN, Count(values=spent, source=f"column flops ({said[0]})" if said else count.source)


def _spread(ratio: Array) -> float:
    return float(ratio.max() / ratio.min())


def _column(frame: pd.DataFrame, name: str) -> Count | None:
    """A column with a number above 0 for every run; None if it is absent, or empty for some runs."""
    if name not in frame or frame[name].isna().any():
        return None
    values = np.array([_number(value, name) for value in frame[name].tolist()], dtype=np.float64)
    return Count(values=values, source=f"column {name}")


def _number(value: object, name: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number < float("inf"):
        raise UserError(f"{name} is {shown(value)} in one row: it must be a number above 0, or leave the column out")
    return number
