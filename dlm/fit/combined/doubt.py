"""Find top budgets whose losses are higher than the runs below them predict.

Most faults of training raise the loss: a learning rate that does not suit large models, runs that diverged, repeated
data. If the top budgets have such a fault, the law follows them, and its interval does not hold the loss of well-tuned
runs. The runs below predict that loss. So where the top budgets lie clearly above this prediction, the interval covers
both answers. Losses below the prediction are no such sign: then the lower runs or the form of the law are at fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from dlm.core.errors import UserError
from dlm.fit.combined.fit import SMALL, TOLD, combine
from dlm.fit.combined.origins import divisions
from dlm.fit.fitted import Doubt, Fitted
from dlm.fit.optimum import LEVEL, as_rows, own_optimum
from dlm.fit.points import Array, Points
from dlm.fit.result import FitResult

CLEAR = 1.645  # standard errors; sound runs exceed it in one case of twenty
MOST_DRAWS, LEAST_DRAWS = 200, 100  # samples to which a law of the lower runs is refitted
MOST_ROWS = 200_000  # rows that are resampled for it: more runs are resampled less often


def lower_laws(result: FitResult) -> Iterator[tuple[int, FitResult, Points]]:
    """How many budgets are above, the combined law of the runs below, without draws, and the runs above.

    The top budget is above, and then the top two are. There is none for a law that was fitted without hold-outs.
    """
    assert result.points is not None
    if not result.holdout:
        return
    for many, kept in enumerate(islice(divisions(result.points), TOLD), 1):
        try:
            yield many, combine(result.points.take(kept), result.how, result.fixed), result.points.take(~kept)
        except UserError:  # too few runs are left for a law, so they predict nothing
            continue


def may_be_doubted(lower: Fitted, above: Points) -> bool:
    """Whether the runs above would be in doubt if the noise of these runs were all that there is."""
    excess = float(_excess(lower, above, as_rows(lower.surface, lower.params))[0])
    return _is_clear(excess, _noise(lower, above))


def num_draws(lower: Fitted) -> int:
    """To how many samples a law of the lower runs is refitted."""
    return min(MOST_DRAWS, max(LEAST_DRAWS, MOST_ROWS // lower.n))


def doubts(many: int, lower: Fitted, above: Points) -> list[Doubt]:
    """The doubt of the top `many` budgets, in view of a law of the lower runs with draws; empty if there is none."""
    assert lower.surface is not None and lower.points is not None and lower.draws is not None
    if not np.isfinite(own_optimum(lower, lower.points.top_flops, LEVEL).ci["L"]).all():
        return []
    excess = float(_excess(lower, above, as_rows(lower.surface, lower.params))[0])
    error = float(np.hypot(_noise(lower, above), np.nanstd(_excess(lower, above, lower.draws))))
    if not _is_clear(excess, error):
        return []
    return [Doubt(lower=lower, num_budgets=many, start=float(above.flops.min()), excess=excess, error=error)]


def _is_clear(excess: float, error: float) -> bool:
    """Whether an excess is more than noise, and more than the forms of laws are off by in any case."""
    return excess > max(CLEAR * error, SMALL)


def _excess(lower: Fitted, above: Points, rows: Array) -> Array:
    """The mean log of measured over predicted loss of the runs above, under each row of parameters, (R,)."""
    assert lower.surface is not None
    many = np.ones((len(rows), 1))
    predicted = lower.surface.predict(rows, many * np.log(above.params), many * np.log(above.tokens))
    return np.asarray(np.log(above.loss / predicted).mean(axis=1))


def _noise(lower: Fitted, above: Points) -> float:
    """The standard error of the mean log loss of the runs above that their own noise causes."""
    return float(lower.noise.residual / np.sqrt(above.num_clusters))
