"""Share trunks among the cells of a sweep, for a definition with ``branches: true``.

Of the cells that differ only in their budget, the longest is the trunk. The shorter ones are branches: each starts from
the checkpoint that the trunk saves at the last step at which the learning rates of both are still equal. Order of data
and noise depend on the seed and the number of the sample only, so a branch ends with the same losses as it would from
nothing, and has the same id.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dlm.core.errors import UserError
from dlm.core.identity import content_hash, identity
from dlm.core.recipe import derive
from dlm.plan.cells import Cell

MOST_WARMUP = 0.1  # the longest warm-up, as a share of the steps of any cell


def share_trunks(cells: Sequence[Cell], configs: Sequence[Mapping[str, Any]]) -> tuple[Cell, ...]:
    """Set ``parent`` and ``branch_step`` of every cell that can branch off a longer cell.

    Args:
        cells: The cells of a plan.
        configs: The config of each cell, as ``grid.cell_config`` returns it.

    Raises:
        UserError: A cell has a schedule other than wsd, or a warm-up that depends on its length or is too long.
    """
    _check(cells, configs)
    families: dict[str, list[int]] = {}
    for place, config in enumerate(configs):
        families.setdefault(_family(config), []).append(place)
    shared = [dataclasses.replace(cell, parent=None, branch_step=None) for cell in cells]
    for places in families.values():
        trunk = max(places, key=lambda place: (cells[place].steps, cells[place].budget_flops))
        for place in places:
            step = derive(configs[place]).rates.last_held()
            if place != trunk and step > 0:
                shared[place] = dataclasses.replace(shared[place], parent=cells[trunk].cell_id, branch_step=step)
    return tuple(shared)


def _family(config: Mapping[str, Any]) -> str:
    """Return a hash of everything in the config of a cell except its budget."""
    data = {key: config["data"].get(key) for key in ("data_dir", "sources")}  # their hash may not be known yet
    return content_hash({**identity(config, steps=0, data_hash=None), "training": None, "of": data})


def _check(cells: Sequence[Cell], configs: Sequence[Mapping[str, Any]]) -> None:
    for cell, config in zip(cells, configs, strict=True):
        if cell.schedule != "wsd":
            raise UserError(
                f"branches: true needs the schedule wsd, and {cell.cell_id} has {cell.schedule}: set groups.scheduler "
                "to wsd, or branches to false"
            )
        if config["scheduler"].get("warmup_tokens_per_param") is None:
            raise UserError(
                "branches: true needs a warm-up that does not depend on the length of a cell: set "
                "scheduler.warmup_tokens_per_param (tokens of warm-up per parameter) in the definition"
            )
    cell = min(cells, key=_longest_warmup)
    if cell.warmup_steps > MOST_WARMUP * cell.steps:
        digit = 10.0 ** (math.floor(math.log10(_longest_warmup(cell))) - 2)
        raise UserError(
            f"the warm-up of {cell.cell_id} takes {cell.warmup_steps} of its {cell.steps} steps, more than "
            f"{MOST_WARMUP:.0%}: lower scheduler.warmup_tokens_per_param to "
            f"{math.floor(_longest_warmup(cell) / digit) * digit:g}, or drop the cell (budgets, models, "
            "tokens_per_param)"
        )


def _longest_warmup(cell: Cell) -> float:
    """Return the longest warm-up that a cell may have, in tokens per parameter."""
    return math.floor(MOST_WARMUP * cell.steps) * cell.global_batch_size * cell.block_size / cell.num_params


def kept_steps(cells: Sequence[Cell]) -> dict[str, list[int]]:
    """Return the steps at which each trunk keeps a checkpoint: cell id -> steps, ascending."""
    steps: dict[str, set[int]] = {}
    for cell in cells:
        if cell.parent is not None and cell.branch_step is not None:
            steps.setdefault(cell.parent, set()).add(cell.branch_step)
    return {name: sorted(found) for name, found in steps.items()}
