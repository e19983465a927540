"""Find the curves over epochs among runs of repeated data, and weigh their points.

A curve holds the points of one size N and one number of unique tokens U: checkpoints of one run, or separate runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dlm.fit.points import Array, Mask, Points

TAIL = 0.4  # weight of a point beyond PAST times the best epochs of its curve, relative to one below
PAST = 2.0
RISE = 2e-3  # a curve has turned if its last log loss is this much above its lowest
SAMPLED = 12  # places at which a curve of many points is sampled,
MOST_SAMPLED = 600  # and those of all curves together
MOST_BANDS = 8  # sizes, or numbers of unique tokens, are held out in at most this many groups

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """The mean log loss of one (N, U) at each number of epochs."""

    params: float  # N
    unique: float  # U
    log_epochs: Array  # rising, (m,)
    log_loss: Array  # (m,)
    rows: Labels  # the points of the curve
    place: Labels  # the position in `log_epochs` of each of `rows`

    @property
    def best(self) -> float:
        """The log of the best epochs: the vertex of the parabola through the lowest loss and its neighbours."""
        low = int(self.log_loss.argmin())
        if not 0 < low < len(self.log_loss) - 1:
            return float(self.log_epochs[low])
        x, y = self.log_epochs[low - 1 : low + 2] - self.log_epochs[low], self.log_loss[low - 1 : low + 2]
        curved, slope = np.polyfit(x, y, 2)[:2]
        shift = -slope / (2.0 * curved) if curved > 0 else 0.0
        return float(self.log_epochs[low] + np.clip(shift, x[0], x[2]))

    @property
    def below(self) -> Mask:
        """Which of `log_epochs` lie below PAST times the best epochs."""
        return np.asarray(self.log_epochs <= self.best + np.log(PAST) + 1e-9)

    @property
    def turns(self) -> bool:
        """Whether the loss rises again after the best epochs."""
        return self.rise > RISE

    @property
    def rise(self) -> float:
        """How far the log loss at the last epochs lies above the lowest."""
        return float(self.log_loss[-1] - self.log_loss.min())

    @property
    def shares(self) -> Array:
        """The distance of each number of epochs from its neighbours in logs: the middle gap, but at most log 2."""
        most = np.log(2.0)
        if len(self.log_epochs) == 1:
            return np.full(1, most)
        gaps = np.diff(self.log_epochs)
        return np.asarray(np.minimum((np.append(gaps[0], gaps) + np.append(gaps, gaps[-1])) / 2.0, most))

    def excess(self, log_epochs: float) -> float:
        """The relative excess of the loss at these epochs over the lowest, interpolated within the measured epochs."""
        inside = float(np.clip(log_epochs, self.log_epochs[0], self.log_epochs[-1]))
        found = float(np.interp(inside, self.log_epochs, self.log_loss))
        return float(np.expm1(found - self.log_loss.min()))


def labels(points: Points) -> Labels:
    """The number of the curve of each point, (n,)."""
    assert points.unique is not None, "fit_surface checks that they are given"
    keys = np.stack([points.params, points.unique], axis=1)
    return np.unique(keys, axis=0, return_inverse=True)[1].astype(np.int64).ravel()


def curves(points: Points) -> Iterator[Curve]:
    """The curves, in the order of their labels."""
    assert points.unique is not None, "fit_surface checks that they are given"
    place = labels(points)
    for label in range(int(place.max()) + 1):
        rows = np.flatnonzero(place == label)
        log_epochs = np.log(points.tokens[rows] / points.unique[rows])
        steps, at = np.unique(log_epochs.round(6), return_inverse=True)
        sums = np.bincount(at, weights=np.log(points.loss[rows]))
        yield Curve(
            params=float(points.params[rows[0]]),
            unique=float(points.unique[rows[0]]),
            log_epochs=np.asarray(steps, dtype=np.float64),
            log_loss=sums / np.bincount(at),
            rows=rows,
            place=at.astype(np.int64).ravel(),
        )


def sampled(points: Points) -> tuple[Array, Array]:
    """Some places on every curve: log N, log U and log e (m, 3), and the mean log loss there (m,)."""
    own = list(curves(points))
    own = own[:: -(-len(own) // MOST_SAMPLED)]  # of more curves, every second, third, ...
    most = min(SAMPLED, MOST_SAMPLED // len(own))
    places, losses = [], []
    for curve in own:
        log_e = curve.log_epochs
        if len(log_e) > most:
            log_e = np.linspace(log_e[0], log_e[-1], most)
        losses.append(np.interp(log_e, curve.log_epochs, curve.log_loss))
        places.append(np.stack(np.broadcast_arrays(np.log(curve.params), np.log(curve.unique), log_e), axis=1))
    return np.concatenate(places), np.concatenate(losses)


def weighed(points: Points) -> Points:
    """The points with the weights of the objective of repeated data, and each curve as a cluster if none are given.

    The weight of a point is its share of the log of the epochs, at most a doubling, so that many close checkpoints
    count no more than a few. Beyond twice the best epochs of its curve, it is multiplied by TAIL: no one trains there,
    but how steeply the loss rises tells where the rise begins.
    """
    weight = np.empty(len(points))
    for curve in curves(points):
        share = curve.shares * np.where(curve.below, 1.0, TAIL)
        weight[curve.rows] = share[curve.place]
    weight = points.weight * weight / weight.mean()
    if points.num_clusters < len(points):
        return replace(points, weight=weight)
    return replace(points, weight=weight, cluster=labels(points))


def bands(values: Array, curve_of: Labels) -> list[Mask]:
    """Divide the points by `values` (n,), such as N, into at most MOST_BANDS groups of about equally many curves."""
    own = np.array([values[curve_of == k][0] for k in range(int(curve_of.max()) + 1)])
    distinct = np.unique(own)
    if len(distinct) > MOST_BANDS:
        distinct = np.unique(np.quantile(own, np.arange(MOST_BANDS) / MOST_BANDS, method="lower"))
    place = np.searchsorted(distinct, values, side="right")
    return [np.asarray(place == k) for k in np.unique(place).tolist()]
