"""N*, D* and L* against compute: the minima, and the line and band of each method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dlm.core import text
from dlm.fit.fitted import Minimum, Optimum
from dlm.fit.laws import LAW_NAMES
from dlm.fit.optimum import optima
from dlm.fit.points import UNBOUNDED, Array
from dlm.fit.result import FitResult
from dlm.report.chart import Axis, Chart, Panel, Series, Zone
from dlm.report.look import FAINT, LAW_COLOURS
from dlm.report.published import Published

BAND_POINTS = 14  # number of values of C at which lines and bands are computed
BEYOND = 1.05  # lines that end within this multiple of the highest budget do not leave the runs
PANELS = {
    "N": "best size N*, parameters",
    "D": "best training length D*, tokens",
    "L": "loss L* there, nats/token",
}
MINIMA = "isoFLOP minima"
SENTENCE = (
    "Two ways to read the same runs: straight lines through the minima, and the combined law of all runs, whose N* is "
    "the mean of that of its surface and that of these lines. A band is a 95 % interval."
)
ALONE = "The best use of each compute by the one law that these runs support. A band is a 95 % interval."


def allocation_chart(
    fits: Iterable[FitResult], *, published: Sequence[Published] = (), notes: Sequence[str] = ()
) -> Chart | None:
    """Describe N*, D* and L* against C. The area beyond the highest budget of the runs is grey.

    Args:
        fits: The fits of one objective, or of several.
        published: Laws of other studies that count N and C as these runs do.
        notes: Sentences to add below the figure.

    Returns:
        The chart; None if no fit has a point or an optimum.
    """
    drawn = [fit for fit in fits if fit.points is not None]
    budgets = [c for fit in drawn if fit.points is not None for c in fit.points.budgets().tolist()]
    levels = [*budgets, *(c for fit in drawn for c in fit.at)]
    if not levels:
        return None
    compute = np.union1d(np.geomspace(min(levels), max(levels), BAND_POINTS), levels)  # a law may end at a level
    lines = [(fit, list(optima(fit, compute).items())) for fit in drawn]
    if not any(line for _, line in lines) and not any(fit.usable for fit in drawn):
        return None
    is_beyond = compute[-1] > BEYOND * max(budgets)
    zones = [Zone(start=max(budgets), end=float(compute[-1]), label="beyond the runs")] if is_beyond else []
    panels = [
        Panel(
            title=title,
            x=Axis(title="compute C, FLOPs", kind="flops", is_log=True),
            y=Axis(title="", kind="number" if key == "L" else "count", is_log=key != "L"),
            series=[
                *(one for law in published for one in _published(law, key, compute)),
                *(one for fit, line in lines for one in _law(fit, key, line)),
            ],
            zones=zones,
        )
        for key, title in PANELS.items()
    ]
    title = "How the best size and the best number of tokens grow"
    sentence = SENTENCE if sum(bool(line) for _, line in lines) > 1 else ALONE
    return Chart(name="allocation", title=title, sentence=sentence, panels=panels, notes=notes)


def _law(fit: FitResult, key: str, line: Sequence[tuple[float, Optimum]]) -> list[Series]:
    """Return N, D or L (``key``) of one method: the line with its band, and the minima with their intervals."""
    found, name = [], LAW_NAMES[fit.law]
    if line:
        values, ends = _values((best for _, best in line), key)
        found.append(
            Series(
                x=[float(c) for c, _ in line],
                y=values.tolist(),
                low=ends[:, 0].tolist(),
                high=ends[:, 1].tolist(),
                mark="line",
                dash="solid" if fit.law == "combined" else "dash",
                name=name,
                group=name,
                colour=LAW_COLOURS[fit.law],
                hover=[_said(name, best, key) for _, best in line],
            )
        )
    if fit.usable:
        values, ends = _values(fit.usable, key)
        found.append(
            Series(
                x=[minimum.budget for minimum in fit.usable],
                y=values.tolist(),
                low=ends[:, 0].tolist(),
                high=ends[:, 1].tolist(),
                name=MINIMA if fit.law == "isoflop" else "",
                group=MINIMA if fit.law == "isoflop" else name,
                colour=LAW_COLOURS[fit.law],
                shape="D",
                is_outlined=True,
                hover=[_said("minimum", minimum, key) for minimum in fit.usable],
            )
        )
    return found


def _said(name: str, best: Optimum | Minimum, key: str) -> str:
    if key not in best.ci:
        return name
    return f"{name}, 95 % interval {text.interval(best.ci[key], 'number' if key == 'L' else 'count')}"


def _values(best: Iterable[Optimum | Minimum], key: str) -> tuple[Array, Array]:
    """Return N, D or L of n optima, (n,), and the ends of their intervals, (n, 2), NaN without an interval."""
    pairs = [(getattr(one, key), one.ci.get(key, UNBOUNDED)) for one in best]
    ends = np.array([ends for _, ends in pairs], dtype=float)
    return np.array([value for value, _ in pairs]), np.where(np.isfinite(ends), ends, np.nan)


def _published(law: Published, key: str, compute: Array) -> list[Series]:
    values = law.values(key, compute)
    if values is None:
        return []
    return [
        Series(
            x=compute.tolist(), y=values.tolist(), mark="line", dash="dot", colour=FAINT, name=law.name,
            group=law.name, hover=[f"{law.name}, {law.source}"] * len(compute),
        )
    ]  # fmt: skip
