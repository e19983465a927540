"""Find the runs that would settle what the fits of a sweep leave open, their cost here, and the command for them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlm.cli.targets import Sweep
from dlm.core import text
from dlm.core.configs import choices
from dlm.core.errors import UserError
from dlm.core.shape import load_shape
from dlm.plan.definition import SweepSpec, with_settings
from dlm.plan.grid import make_plan

if TYPE_CHECKING:
    import pandas as pd

    from dlm.fit.fitted import Minimum
    from dlm.fit.result import FitResult
    from dlm.plan.cells import Cell

SMALLER, LARGER = "smaller", "larger"
FEWEST_BUDGETS = 2  # a line through minima needs two
ROOM_BELOW, ROOM_ABOVE = 0.99, 1.01  # a wider window of tokens per parameter includes the rounded numbers
NEXT_BUDGET = 3.0  # a missing budget is this factor below the lowest one


def advice(sweep: Sweep, runs: pd.DataFrame, fits: Mapping[str, FitResult]) -> dict[str, list[tuple[str, str]]]:
    """Return what would settle the open questions of each objective, by its name: (a sentence, a command or '').

    Args:
        sweep: The sweep.
        runs: The rows of its runs.csv.
        fits: The fits of its runs.
    """
    labels = dict.fromkeys(fit.label for fit in fits.values())
    return {label: _of_objective(sweep, runs, [fit for fit in fits.values() if fit.label == label]) for label in labels}


def _of_objective(sweep: Sweep, runs: pd.DataFrame, fits: Sequence[FitResult]) -> list[tuple[str, str]]:
    from dlm.fit.proof import best_size

    spec, label = sweep.plan.spec, fits[0].label
    own = runs[runs["role"].isna() & (runs["objective"] == label)]
    unusable = [minimum for fit in fits for minimum in fit.minima if not minimum.usable]
    found = [_for_budget(sweep, own, minimum) for minimum in unusable]
    if len(spec.budgets) < FEWEST_BUDGETS:
        lower = [spec.budgets[0] / NEXT_BUDGET, *spec.budgets]
        budgets = ",".join(f"{budget:.12g}" for budget in lower)
        lead = "One budget gives no law. A lower one would give a line"
        found.append(_suggested(sweep, own, lead, [f"budgets=[{budgets}]"]))
    why = best_size(fits, max(spec.budgets))[1]
    if why and not found:
        seed = max([*spec.seeds, *(cell.seed for cell in sweep.plan.cells)]) + 1
        seeds = ",".join(str(one) for one in (*spec.seeds, seed))
        lead = f"The runs do not determine the best size ({why}). Another run of every cell would lower the noise"
        found.append(_suggested(sweep, own, lead, [f"seeds=[{seeds}]"]))
    return found


def _for_budget(sweep: Sweep, runs: pd.DataFrame, minimum: Minimum) -> tuple[str, str]:
    """Return the sizes that would enclose the minimum of a budget whose runs do not enclose it."""
    own = runs[runs["budget"] == minimum.budget]
    names = _next_sizes(sweep.plan.spec, own, minimum.reason)
    lead = f"{text.flops(minimum.budget)} FLOPs: {minimum.why}."
    if not names:
        return f"{lead} configs/model holds no further size with this vocabulary: add a file there.", ""
    settings = _settings(sweep.plan.spec, minimum.budget, names)
    if settings is None:
        return f"{lead} {text.listed(names)} cannot be trained at this budget.", ""
    return _suggested(sweep, runs, f"{lead} {text.listed(names)} would show where the minimum lies", settings)


def _next_sizes(spec: SweepSpec, runs: pd.DataFrame, reason: str) -> list[str]:
    """Return the names of the next sizes on the sides of a budget's runs where its minimum may lie.

    They are models of the definition that the budget lacks, or sizes of configs/model if it has none on that side.
    """
    vocabulary = load_shape(spec.models[0]).vocab_size
    shapes = sorted(
        (shape.num_params, name) for name in choices("model") if (shape := load_shape(name)).vocab_size == vocabulary
    )
    averaged = runs.groupby("params")["loss"].mean()
    means = dict(zip(averaged.index.tolist(), averaged.tolist(), strict=True))
    tried = sorted(means)
    is_low = min(tried, key=means.__getitem__) <= tried[len(tried) // 2]
    sides = [SMALLER if is_low else LARGER] if reason in ("edge", "outside_grid") else [SMALLER, LARGER]
    below = [name for size, name in shapes if size < tried[0]]
    above = [name for size, name in shapes if size > tried[-1]]
    own_below, own_above = ([name for name in names if name in spec.models] for names in (below, above))
    return [
        *((own_below or below)[-1:] if SMALLER in sides else []),
        *((own_above or above)[:1] if LARGER in sides else []),
    ]


def _settings(spec: SweepSpec, budget: float, names: Sequence[str]) -> list[str] | None:
    """Return the settings with which the definition also trains these sizes at a budget; None if nothing does."""
    models = sorted({*spec.models, *names}, key=lambda name: load_shape(name).num_params)
    settings = [f"models=[{','.join(models)}]"]
    window = _wider_window(spec, settings, budget, names)
    all_sizes = ["sizes_per_budget=null"]
    for more in ([], window, all_sizes, [*window, *all_sizes]):
        planned = _planned(spec, [*settings, *more])
        there = {cell.groups["model"] for cell in planned if cell.budget_flops == budget}
        if there >= {*names}:
            return [*settings, *more]
    return None


def _wider_window(spec: SweepSpec, settings: Sequence[str], budget: float, names: Sequence[str]) -> list[str]:
    """Return the setting of tokens_per_param that just admits these sizes at a budget; [] if there is no such limit."""
    if spec.tokens_per_param is None:
        return []
    free = _planned(spec, [*settings, "tokens_per_param=null", "sizes_per_budget=null"])
    own = [cell for cell in free if cell.budget_flops == budget and cell.groups["model"] in names]
    ratios = [cell.tokens_per_param for cell in own]
    low = min([spec.tokens_per_param[0], *(ROOM_BELOW * ratio for ratio in ratios)])
    high = max([spec.tokens_per_param[1], *(ROOM_ABOVE * ratio for ratio in ratios)])
    return [f"tokens_per_param=[{low:.4g},{high:.4g}]"]


def _planned(spec: SweepSpec, settings: Iterable[str]) -> tuple[Cell, ...]:
    try:
        return make_plan(with_settings(spec, settings)).cells
    except UserError:  # no cell is left, or a size cannot be trained at all
        return ()


def _suggested(sweep: Sweep, runs: pd.DataFrame, lead: str, settings: Sequence[str]) -> tuple[str, str]:
    """Return a sentence with the cost of the cells that the settings add, and the command that adds them."""
    known = {cell.cell_id for cell in sweep.plan.cells}
    added = [cell for cell in _planned(sweep.plan.spec, settings) if cell.cell_id not in known]
    words = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
    flops = text.flops(sum(cell.budget_flops for cell in added))
    price = f"{len(added)} more run{'' if len(added) == 1 else 's'}, {flops} FLOPs{_cost(added, runs)}"
    return f"{lead}: {price}.", f"dlm sweep {shlex.quote(str(sweep.folder))} {words}"


def _cost(cells: Sequence[Cell], runs: pd.DataFrame) -> str:
    """State what cells cost at the speed of the run that is nearest in size; '' if the runs do not tell."""
    timed = runs[runs["tokens_per_sec"].notna()]
    if timed.empty:
        return ""
    seconds = gpu_hours = 0.0
    for cell in cells:
        run: Any = timed.loc[(timed["params"] / cell.num_params - 1).abs().sort_values().index[0]]
        more = cell.flops["full_masked_head"] / run["flops_full_masked_head"]
        seconds += run["tokens"] / run["tokens_per_sec"] * more
        gpu_hours += (run["gpu_hours"] or 0.0) * more
    return (
        f", about {gpu_hours:,.3g} GPU-hours" if gpu_hours else f", about {text.duration(seconds)} of one process here"
    )
