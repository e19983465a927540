"""Where the marks along an axis stand, and how the values at them are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dlm.core import text
from dlm.report.chart import Axis

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # even marks stand at multiples of these, times a power of ten
MULTIPLES = ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))  # of the powers of ten on a logarithmic axis, from close to wide
DECADE = 5.0  # a logarithmic axis that spans a smaller factor has even marks
CLOCK = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


def positions(low: float, high: float, axis: Axis, *, most: int = 8) -> list[float]:
    """Return at most about ``most`` values between ``low`` and ``high`` at which the axis has marks with labels."""
    low, high = min(low, high), max(low, high)
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        return [low] if math.isfinite(low) else []
    if axis.is_log and low > 0 and high / low > DECADE:
        return _powers(low, high, most)
    step = _step((high - low) / most, axis)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _powers(low: float, high: float, most: int) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in MULTIPLES:
        values = [multiple * 10.0**exponent for exponent in exponents for multiple in multiples]
        inside = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


def _step(least: float, axis: Axis) -> float:
    """Return the smallest pleasant distance of marks that is at least ``least``."""
    if axis.kind == "duration" and least <= CLOCK[-1]:
        return float(next((step for step in CLOCK if step >= least), CLOCK[-1]))
    power = 10.0 ** math.floor(math.log10(least))
    return next(multiple * power for multiple in STEPS if multiple * power >= least * (1 - 1e-9))


def labels(values: Sequence[float], axis: Axis) -> list[str]:
    """Write the values at the marks of an axis, with as many digits as tell them apart."""
    if axis.kind == "number" and all(abs(value) < 1e4 for value in values):
        decimals = max((len(f"{value:.6g}".partition(".")[2]) for value in values), default=0)
        if all("e" not in f"{value:.6g}" for value in values):
            return [f"{value:.{decimals}f}" for value in values]
    for digits in (3, 4, 5, 6):
        said = [shown(value, axis, digits=digits) for value in values]
        if len(set(said)) == len(said):
            break
    return said


def shown(value: float, axis: Axis, *, digits: int = 3) -> str:
    """Write a value of the axis, as over its points."""
    if axis.kind == "count":
        return text.count(value, digits=digits)
    if axis.kind == "flops":
        return text.flops(value, digits=digits)
    if axis.kind == "duration":
        return "0" if value == 0 else text.duration(value)
    if axis.kind == "percent":
        return f"{100 * value:.{digits}g} %"
    return text.number(value) if abs(value) < 1e4 or not np.isfinite(value) else f"{value:,.0f}"
