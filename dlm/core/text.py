"""Format numbers, time spans and lists for human readers: 33k, 3e11, 12 min, 'a, b and c'."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
DURATION_UNITS_SEC = ((365.25 * 86400, "years"), (86400.0, "days"), (3600.0, "h"), (60.0, "min"))


def count(value: float, *, digits: int = 3) -> str:
    """Format a number of parameters or tokens with its unit: 33000 -> '33k', 1.2e6 -> '1.2M'."""
    if not math.isfinite(value):
        return "not known"
    value = float(f"{value:.{digits}g}")
    for size, unit in UNITS:
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:g}"


def flops(value: float, *, digits: int = 3) -> str:
    """Format training compute in FLOPs, as in ids and tables: 3e11 -> '3e11', 1.25e16 -> '1.25e16'."""
    if not math.isfinite(value):
        return "not known"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def duration(seconds: float | None) -> str:
    """Format a time span: '40 s', '12 min', '3.5 h', '12 days', '1.4 years'; '-' when it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    for unit_sec, unit in DURATION_UNITS_SEC:
        if seconds >= 2 * unit_sec:
            value = seconds / unit_sec
            return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds:.0f} s"


def number(value: float, *, digits: int = 4) -> str:
    """Format a fitted number with ``digits`` significant digits: 0.347310 -> '0.3473'."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "not known"


def interval(ends: Sequence[float] | None, show: str = "number") -> str:
    """Format an interval as 'low to high'; ``show`` names the format of its ends (``number`` or ``count``)."""
    if ends is None or not all(math.isfinite(end) for end in ends):
        return "no interval"
    style = count if show == "count" else number
    return f"{style(ends[0])} to {style(ends[1])}"


def counted(number: int, noun: str) -> str:
    """Format a number of things: '1 cell', '12 cells'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(items: Sequence[str]) -> str:
    """Join items into a phrase: 'a', 'a and b', 'a, b and c'."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
