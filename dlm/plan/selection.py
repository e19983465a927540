"""Choose the cells of a plan: which sizes of a budget stay, and which of its cells are trained with further seeds."""

from __future__ import annotations

from typing import Any

from dlm.core.identity import canonical_json
from dlm.plan.cells import Cell, Point
from dlm.plan.definition import SweepSpec


def at_ends(
    spec: SweepSpec, cells: list[Cell], dropped: list[dict[str, Any]]
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Remove the runs that the rules grant to the ends of a budget only, wherever a size is no end."""

    def curve(cell: Cell) -> str:
        keys = {key: value for key, value in cell.overrides.items() if key != "seed"}
        return canonical_json([cell.budget_flops, {**cell.groups, "model": ""}, keys])

    sizes: dict[str, list[int]] = {}
    for cell in cells:
        sizes.setdefault(curve(cell), []).append(cell.num_params)

    def is_planned(cell: Cell) -> bool:
        own = sizes[curve(cell)]
        return cell.seed in spec.seeds_at(cell.budget_flops, is_end=cell.num_params in (min(own), max(own)))

    rows = [row for row in dropped if row["seed"] in spec.seeds_at(row["budget_flops"], is_end=False)]
    return [cell for cell in cells if is_planned(cell)], rows


def thin(spec: SweepSpec, cells: list[Cell]) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Keep ``sizes_per_budget`` of the model sizes at each budget, evenly spread over the sorted sizes.

    Returns:
        The cells that are kept, and the rows of ``Plan.dropped`` for the others.
    """
    if spec.sizes_per_budget is None:
        return cells, []
    kept: set[tuple[float, str]] = set()
    for budget in spec.budgets:
        sizes = sorted({(cell.num_params, cell.model) for cell in cells if cell.budget_flops == budget})
        count = min(spec.sizes_per_budget, len(sizes))
        places = {round(place * (len(sizes) - 1) / max(count - 1, 1)) for place in range(count)}
        kept |= {(budget, sizes[place][1]) for place in places}
    reason = f"not among the sizes_per_budget {spec.sizes_per_budget} of its budget"
    out = [cell for cell in cells if (cell.budget_flops, cell.model) not in kept]
    dropped = [Point(cell.groups, cell.overrides).dropped(reason) for cell in out]
    return [cell for cell in cells if (cell.budget_flops, cell.model) in kept], dropped
