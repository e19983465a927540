"""Draw a fitted law with matplotlib. The figures of the report are drawn in dlm/report/figures.py."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dlm.core.errors import UserError
from dlm.core.names import printable
from dlm.fit.fitted import Fitted, Optimum
from dlm.fit.optimum import optima
from dlm.fit.points import UNBOUNDED

PLACES = 40  # values of C at which the law is drawn
FURTHER = 10.0  # multiple of the highest C up to which the law is drawn
LINE, BAND = "#3f6fb5", "#b9cbe6"


def draw(result: Fitted) -> Figure:
    """Draw the loss of every run with L*(C), and the best size N*(C), with 95 % intervals as bands.

    L* is not drawn where it or its interval is withheld.

    Raises:
        UserError: If there is no law to draw.
    """
    if result.points is None or not result.params:
        raise UserError(f"nothing to draw: {result.warnings[0] if result.warnings else 'there is no law'}")
    points, top = result.points, result.points.top_flops
    compute = np.geomspace(points.flops.min(), FURTHER * top, PLACES)
    best = optima(result, compute.tolist())
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = left.scatter(points.flops, points.loss, s=14, c=points.params, cmap="viridis", norm="log")
    figure.colorbar(runs, ax=left, label="parameters N")
    for axes, key, name in ((left, "L", "loss, nats/token"), (right, "N", "best size N*, parameters")):
        _curve(axes, best, key)
        axes.axvspan(top, compute[-1], color="#000000", alpha=0.05, lw=0)
        axes.set(xscale="log", xlabel="compute C, FLOPs", ylabel=name)
    right.set_yscale("log")
    title = printable(f"{result.label} {result.law}, {result.n} points".strip())
    left.set_title(title, fontsize="medium", parse_math=False, usetex=False)  # a label may hold $ and \\
    right.set_title("grey: beyond the runs", fontsize="medium")
    return figure


def _curve(axes: Axes, best: dict[float, Optimum], key: str) -> None:
    shown = {c: o for c, o in best.items() if key != "L" or not o.withheld}
    axes.plot(list(shown), [getattr(o, key) for o in shown.values()], color=LINE)
    ends = np.array([o.ci.get(key, UNBOUNDED) for o in shown.values()]).reshape(-1, 2)
    axes.fill_between(list(shown), ends[:, 0], ends[:, 1], color=BAND, alpha=0.6, lw=0)
