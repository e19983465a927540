"""Refit one form of the law to runs whose N is counted in another way, and find a and b under each count of C."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError
from dlm.fit import optimum
from dlm.fit.engine import newton
from dlm.fit.engine.newton import Norm
from dlm.fit.isoflop import curves
from dlm.fit.isoflop.fit import fit_groups, lines
from dlm.fit.isoflop.minima import along
from dlm.fit.points import Array, Cost, Points, cost_of
from dlm.fit.result import FitResult
from dlm.fit.surface import resample
from dlm.fit.surface.fit import fit_points, law_of, with_two_budgets

Places = npt.NDArray[np.intp]

AXES = ("params", "tokens")  # the vertex of an isoFLOP curve is taken over log N for a, and over log D for b


@dataclass(frozen=True, kw_only=True, eq=False)
class SurfaceRefit:
    """A surface fitted to the runs, and the costs of a token under each count of C."""

    result: FitResult
    costs: Mapping[str, tuple[Cost, tuple[float, float]]]  # cost, and range of C over which slopes are taken

    def exponents(self) -> dict[str, Array]:
        """a and b, (2,), by the count of C."""
        rows = optimum.as_rows(self.result.surface, self.result.params)
        return {name: found[0] for name, found in self._exponents(rows).items()}

    @property
    def noise(self) -> float:
        """The standard deviation of the residuals, as a share of the loss."""
        return self.result.noise.residual

    def redrawn(self, errors: Array) -> dict[str, Array]:
        """a and b, (R, 2), by the count of C, of refits to the fitted loss times exp(errors); `errors` is (R, n)."""
        points = self.result.points
        assert points is not None
        problem, thetas = resample.known(self.result)
        fitted = newton.predict(problem, thetas[:1])[0]  # of the log loss
        rows = resample.refit(self.result, fitted + errors, points.weight[None])
        return self._exponents(rows)

    def _exponents(self, rows: Array) -> dict[str, Array]:
        with np.errstate(all="ignore"):
            return {
                name: optimum.exponents(self.result.surface, rows, span, cost)
                for name, (cost, span) in self.costs.items()
            }


@dataclass(frozen=True, kw_only=True, eq=False)
class CurveRefit:
    """IsoFLOP curves over log N and over log D. They exist for the count of C that the budgets are in only."""

    own: str  # this count
    fits: Mapping[str, FitResult]  # by axis
    grouped: Places = field(repr=False)  # the places of the runs that have a budget among all runs

    def exponents(self) -> dict[str, Array]:
        """a and b, (2,), by the count of C."""
        return {self.own: np.array([self.fits["params"].params["a"], self.fits["tokens"].params["b"]])}

    @property
    def noise(self) -> float:
        """The standard deviation of the residuals about the curves over log N, as a share of the loss."""
        result = self.fits["params"]
        squares, free = 0.0, 0
        for inside, x, fitted in _fitted(result):
            assert result.points is not None
            squares += float(np.sum((result.points.loss[inside] / fitted - 1) ** 2))
            free += len(x) - 3
        return float(np.sqrt(squares / free)) if free > 0 else float("nan")

    def redrawn(self, errors: Array) -> dict[str, Array]:
        """a and b, (R, 2), by the count of C, of refits to the fitted loss times exp(errors); `errors` is (R, n)."""
        slopes = [_slopes(self.fits[axis], errors[:, self.grouped]) for axis in AXES]
        return {self.own: np.stack(slopes, axis=1)}


Refit = SurfaceRefit | CurveRefit


def refit_surface(
    points: Points, law: str, compute: Mapping[str, Array], how: Norm, fixed: Mapping[str, float]
) -> SurfaceRefit:
    """Fit a surface to checked points. Raises UserError if they do not support it.

    Args:
        points: The runs, with N counted in one way.
        law: The name of the surface.
        compute: C of each run, (n,), under each count.
        how: How residuals count.
        fixed: Parameters that are held fixed.
    """
    found = fit_points(with_two_budgets(points), law_of(law, points, how, fixed), how, fixed, holdout=False)
    counted = {name: replace(points, flops=flops) for name, flops in compute.items()}
    return SurfaceRefit(
        result=found, costs={name: (cost_of(own), optimum.span_of(own)) for name, own in counted.items()}
    )


def refit_curves(points: Points, own: str, *, curve: str = "parabola") -> CurveRefit:
    """Fit isoFLOP curves to the points that have a budget. Raises UserError if too few have an interior minimum.

    Args:
        points: The runs, with N counted in one way; the budget of a run in no curve is NaN.
        own: The count of C that the budgets are in.
        curve: As in `fit_isoflop`.
    """
    assert points.budget is not None
    inside = np.isfinite(points.budget)
    fits = {axis: fit_groups(points.take(inside), curve=curve, axis=axis) for axis in AXES}
    for found in fits.values():
        if not found.params:
            raise UserError(found.warnings[0])
    return CurveRefit(own=own, fits=fits, grouped=np.flatnonzero(inside))


def _fitted(result: FitResult) -> list[tuple[Places, Array, Array]]:
    """For each usable minimum: the places of its points, their centred places on the axis, and their fitted losses."""
    assert result.points is not None and result.points.budget is not None
    found = []
    for minimum in result.usable:
        inside = np.flatnonzero(result.points.budget == minimum.budget)
        x = along(result.points.at_budget(minimum.budget), result.axis)
        loss = curves.value(np.array([minimum.coefficients]), (x - minimum.centre)[None])[0]
        found.append((inside, x - x.mean(), loss))
    return found


def _slopes(result: FitResult, errors: Array) -> Array:
    """The exponent of the axis, (R,), in lines through the minima of redrawn parabolas; NaN where a minimum is lost."""
    assert result.points is not None
    logs = []
    for inside, z, fitted in _fitted(result):
        loss = fitted * np.exp(errors[:, inside])
        found = curves.polynomial(z, loss, result.points.weight[inside][None], 2)
        place = curves.turning(found)[0]
        middle = along(result.points, result.axis)[inside].mean()
        logs.append(np.where((place > z.min()) & (place < z.max()), middle + place, np.nan))
    budgets = np.array([minimum.budget for minimum in result.usable])
    table = np.stack(logs, axis=1)[:, :, None].repeat(3, axis=2)
    return lines(budgets, table)[:, 1]
