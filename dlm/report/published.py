"""Published laws of the best size, with how they count N and C, to be drawn beside the runs that count alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.counts import counts_of
from dlm.fit.points import Array
from dlm.report.words import SIZES

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Published:
    """A Chinchilla surface of another study: L = E + A/N^alpha + B/D^beta with C = 6 N D."""

    name: str
    source: str
    size: str  # its count of N, as in ``dlm.fit.counts.SIZE_COLUMNS``
    compute: str  # its count of C, as in ``dlm.fit.counts.SIX_ND``
    A: float
    B: float
    alpha: float
    beta: float

    def values(self, key: str, compute: Array) -> Array | None:
        """Return N* or D* at values of C; None for the loss, which depends on the text and its tokens."""
        if key == "L":
            return None
        ratio = self.alpha * self.A / (self.beta * self.B)
        power = 1 / (self.alpha + self.beta)
        size: Array = ratio**power * (compute / 6) ** (self.beta * power)
        return size if key == "N" else compute / (6 * size)


PUBLISHED = (
    Published(
        name="Chinchilla, text",
        source="Hoffmann et al. as refitted by Besiroglu et al., arXiv 2404.10102",
        size="with_embeddings",
        compute="6n_total",
        A=482.01,
        B=2085.43,
        alpha=0.3478,
        beta=0.3658,
    ),
)


def beside(runs: pd.DataFrame) -> tuple[Sequence[Published], list[str]]:
    """Return the published laws that count N and C as these runs do, and a note on those that do not."""
    try:
        counts = counts_of(runs)
    except UserError as error:
        return (), [f"No published law is drawn, because it is not known how these runs count N and C: {error}."]
    size = "blocks" if "blocks" in counts.size else next(iter(counts.size), "")
    drawn = tuple(law for law in PUBLISHED if (law.size, law.compute) == (size, counts.own))
    others = [f"{law.name} ({law.source}) counts {SIZES[law.size]} as N and C by {law.compute}" for law in PUBLISHED]
    if drawn:
        return drawn, [f"The dotted grey line is a law of another study, {law.source}." for law in drawn]
    here = f"these runs count {SIZES.get(size, size)} as N and C by {counts.own}"
    return (), [f"No published law is drawn, because {text.listed(others)}, and {here}."]
