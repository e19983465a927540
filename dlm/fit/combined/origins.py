"""Predict the top budgets from the runs below them, as often as the runs permit (rolling-origin hold-outs).

An origin is a division of the runs into those below a budget, to which a law is fitted, and the others, which it
predicts. This is the only check of an extrapolation that the runs themselves allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dlm.core.errors import UserError
from dlm.fit.budgets import are_groups
from dlm.fit.combined.error import FAR, GROWTH, NEAR, PRIOR_DOF, PRIOR_SCALE, WORTH, FormError
from dlm.fit.combined.origin import Origin
from dlm.fit.engine.search import solve
from dlm.fit.fitted import Fitted
from dlm.fit.optimum import as_rows
from dlm.fit.points import Array, Mask, Points

MOST_ORIGINS = 3  # the top one, two and three budgets are held out; predictions from lower budgets tell less
LEAST_LEVELS = 2  # a law is fitted to this many budgets or more
SPARE = 2  # runs that a refit needs beyond one for each parameter
SAME_LEVEL = 2.0  # runs without budgets form a level if their C differ by less than this factor


def levels_of(points: Points) -> Array:
    """The level of each run, (n,): its budget; without budgets, the lowest C of the runs within a factor of two."""
    if points.budget is not None and are_groups(points.budget):
        return points.budget
    level, start = np.empty(len(points)), 0.0
    for k in np.argsort(points.flops):
        start = points.flops[k] if points.flops[k] > SAME_LEVEL * start else start
        level[k] = start
    return level


def origins(points: Points, parts: Mapping[str, Fitted]) -> list[Origin]:
    """Hold out the top levels and predict them under every part; the origin with the most runs kept comes first.

    Args:
        points: The runs, with their own weights.
        parts: Fits of all runs, by name. A refit starts from the parameters of the fit.
    """
    found = []
    for kept in divisions(points):
        spent = points.flops[~kept]
        errors = dict(_errors(points, kept, parts))
        if errors:
            distance = np.log10(spent / points.flops[kept].max())
            origin = Origin(start=float(spent.min()), level=levels_of(points)[~kept], distance=distance, errors=errors)
            found.append(origin)
    return found


def error_of(points: Points, held: Sequence[Origin], weights: Mapping[str, float]) -> FormError:
    """Estimate the error of the weighted geometric mean of the parts from what it misses at each origin."""
    levels = [origin.by_level(origin.of(weights)) for origin in held]
    squares = [float(np.mean((error / np.maximum(distance, FAR) ** GROWTH) ** 2)) for distance, error in levels]
    dof = PRIOR_DOF + WORTH * len(squares)
    scale = float(np.sqrt((PRIOR_DOF * PRIOR_SCALE**2 + WORTH * sum(squares)) / dof))
    product = points.params * points.tokens
    ends = {"most": float(product.max()), "least": float(product.min())}
    return FormError(scale=scale, dof=dof, growth=GROWTH, near=NEAR, **ends)


def divisions(points: Points) -> Iterator[Mask]:
    """Which runs are kept, (n,), at each origin: those below the top one, two and three levels."""
    level = levels_of(points)
    levels = np.unique(level)
    for k in range(1, min(MOST_ORIGINS, len(levels) - LEAST_LEVELS) + 1):
        yield level < levels[-k]


def _errors(points: Points, kept: Mask, parts: Mapping[str, Fitted]) -> Iterator[tuple[str, Array]]:
    """The name and the log errors of every part that can be fitted to the runs that are kept."""
    held = points.take(~kept)
    log_n, log_d = np.log(held.params)[None], np.log(held.tokens)[None]
    for name, part in parts.items():
        law = part.fitted_law
        assert part.points is not None
        if np.count_nonzero(kept) < len(law.params) + SPARE:
            continue
        known = np.array([[row[key] for key in law.params] for row in (part.params, *part.rivals)])
        try:
            params = solve(part.points.take(kept), law, part.how, part.fixed, begin=known).params
        except UserError:  # the part does not describe the lower budgets alone, so it predicts nothing from them
            continue
        error = np.log(law.predict(as_rows(law, params), log_n, log_d)[0] / held.loss)
        if np.isfinite(error).all():
            yield name, error
