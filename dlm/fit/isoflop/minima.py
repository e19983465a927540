"""minima: the runs of one budget -> the minimum of the loss over log N or log D, or a typed refusal.
Called by isoflop.
"""

from __future__ import annotations

import numpy as np

from dlm.core import text
from dlm.fit.fitted import Minimum
from dlm.fit.isoflop import curves
from dlm.fit.points import NAN, Array, Points

AXES = ("params", "tokens")


REASONS = ("too_few_points", "not_convex", "outside_grid", "edge")


_WORDS = {  # what is compared, its smallest and largest, and what would lie beyond them
    "params": ("sizes", "size", "smallest", "largest", "smaller ones", "larger ones"),
    "tokens": ("training lengths", "training length", "shortest", "longest", "shorter ones", "longer ones"),
}


_NAMES = {"parabola": "a parabola", "cubic": "a cubic", "akima": "an Akima curve"}


def along(points: Points, axis: str) -> Array:
    """log N or log D of the points, (n,): what the curves run over."""
    return np.log(points.params if axis == "params" else points.tokens)


def mean_losses(points: Points, curve: str, axis: str) -> tuple[Array, Array]:
    """The sizes of one budget, log and rising (m,), and the mean loss of each in the curve's space (1, m)."""
    loss = np.log(points.loss) if curves.SPACE[curve] == "log" else points.loss
    return curves.averaged(along(points, axis), loss[None], points.weight[None])[:2]


def minimum(points: Points, *, curve: str, axis: str) -> Minimum:
    """The lowest point of one budget's curve: N (or D, with axis 'tokens') and L; the other is the caller's."""
    assert points.budget is not None
    budget = float(points.budget[0])
    x, (sizes, means) = along(points, axis), mean_losses(points, curve, axis)
    head, least = f"budget {text.flops(budget)}", curves.LEAST_SIZES[curve]
    if len(sizes) < least:
        detail = f"{head}: {len(sizes)} {_WORDS[axis][0]}, and {_NAMES[curve]} needs {least} or more"
        return Minimum(budget=budget, num_points=len(points), reason="too_few_points", detail=detail)
    centre = float(sizes.mean())
    place, lowest, coefficients = _lowest(curve, x - centre, sizes - centre, means, points)
    reason, detail = _refusal(head, curve, axis, sizes, means[0], centre + place)
    best = NAN if reason else float(np.exp(centre + place))
    if curve == "cubic" and not reason:  # about its minimum, so that c2 is the curvature there, as of a parabola
        centre, coefficients = centre + place, curves.moved(coefficients[None], place)[0]
    return Minimum(
        budget=budget,
        num_points=len(points),
        reason=reason,
        detail=detail,
        N=best if axis == "params" else NAN,
        D=best if axis == "tokens" else NAN,
        L=NAN if reason else float(np.exp(lowest)) if curves.SPACE[curve] == "log" else lowest,
        centre=centre,
        coefficients=tuple(coefficients.tolist()),
    )


def _lowest(curve: str, z: Array, sizes: Array, means: Array, points: Points) -> tuple[float, float, Array]:
    """Place and loss of the lowest point, and the polynomial (for Akima the least-squares parabola)."""
    found = curves.polynomial(z, points.loss[None], points.weight[None], curves.DEGREE.get(curve, 2))
    place, lowest = curves.akima(sizes, means) if curve == "akima" else curves.turning(found)
    return float(place[0]), float(lowest[0]), found[0]


def _refusal(head: str, curve: str, axis: str, sizes: Array, means: Array, place: float) -> tuple[str, str]:
    """('', '') for an interior minimum, else one of REASONS and a sentence."""
    many, one, *_ = _WORDS[axis]
    ends = np.exp(sizes[[0, -1]])
    span = f"{text.count(ends[0])} to {text.count(ends[1])}"
    if not np.isfinite(place):
        return "not_convex", f"{head}: the loss does not curve upwards over {span}, so it has no minimum there"
    side, more = _side(axis, sizes, place if curve == "akima" else float(sizes[means.argmin()]))
    if side:
        return "edge", f"{head}: the lowest loss is at the {side} {one} tried ({span}): {more} are needed to bracket it"
    if not sizes[0] < place < sizes[-1]:
        there = text.count(float(np.exp(np.clip(place, -700, 700))))
        return "outside_grid", f"{head}: the {curve}'s minimum ({there}) lies outside the {many} tried ({span})"
    return "", ""


def _side(axis: str, sizes: Array, lowest: float) -> tuple[str, str]:
    _, _, first, last, before, after = _WORDS[axis]
    if lowest <= sizes[0]:
        return first, before
    return (last, after) if lowest >= sizes[-1] else ("", "")
