"""The tuning cells of a sweep: learning rate and batch varied at one size of the lowest and the highest budget."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dlm.core import text
from dlm.core.errors import UserError, unknown
from dlm.core.identity import canonical_json
from dlm.core.power_recipe import DIGITS
from dlm.plan.cells import TUNE, Cell, Plan, Point
from dlm.plan.definition import FITTED, SEED_STEP, SweepSpec
from dlm.plan.recipes import batch_keys

BESIDE = ("seed", "data.micro_batch_size")  # config keys in which variants of a cell may differ too
VARIED = {"lr": "optimizer.lr", "batch": "data.batch_size"}  # key of `tune` -> the config key that it varies


def tuning_points(spec: SweepSpec, cells: Sequence[Cell], micro_of: Callable[[Cell], int | None]) -> list[Point]:
    """Return the tuning cells of a definition, all objectives together.

    Args:
        spec: The definition, which has ``tune``.
        cells: The cells of its grid under the recipe that is varied.
        micro_of: Returns the micro-batch that the config of a cell sets; None if it sets none.

    Raises:
        UserError: ``vary`` has a key that ``tune`` varies, a size is not planned at its budget, or a batch cannot be
            divided as ``tune.batch`` asks.
    """
    assert spec.tune is not None
    for name, key in VARIED.items():
        if key in spec.vary and len(getattr(spec.tune, name)) > 1:
            raise UserError(f"tune.{name} and vary.{key} vary the same key: remove one of them")
    found = []
    for objective in spec.objectives:
        own = [cell for cell in cells if cell.groups["objective"] == objective and _is_first(spec, cell)]
        centres = _centres(spec, own)
        variants = [_variants(spec, centre, micro_of(centre)) for centre in centres]
        is_fitted = spec.recipe == FITTED  # then the grid has another recipe, and the centre is a tuning cell too
        found += [
            _point(centre, keys, centre.seed)
            for centre, own_variants in zip(centres, variants, strict=True)
            for keys in own_variants
            if keys or is_fitted
        ]
        replicated = _replicated(centres, variants)[: spec.tune.replicates]
        found += [_point(centre, keys, _further_seed(spec, centre)) for centre, keys in replicated]
    return found


def _is_first(spec: SweepSpec, cell: Cell) -> bool:
    """Whether a cell has the first seed, and the first value of every key that the definition varies."""
    values = {**cell.groups, **cell.overrides}
    return cell.seed == spec.seeds[0] and all(values[key] == listed[0] for key, listed in spec.vary.items())


def _centres(spec: SweepSpec, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells to vary, one for each budget of ``tune.at``, with the lowest budget first.

    At each budget it is the cell of the size that ``tune.models`` names, or else of the size nearest to the middle of
    the sizes of the budget in log N, because a sweep places its sizes around the optimum that it expects.
    """
    tune = spec.tune
    assert tune is not None
    budgets = sorted({cell.budget_flops for cell in cells})
    if not budgets:
        return []
    named = dict(zip(tune.at, tune.models or [None] * len(tune.at), strict=True))
    ends = {"lowest": budgets[0], "highest": budgets[-1]}
    centres: dict[str, Cell] = {}
    for end in sorted(named, key=lambda end: ends[end]):
        sizes = {cell.model: cell for cell in cells if cell.budget_flops == ends[end]}
        name = named[end]
        if name is not None and name not in sizes:
            raise unknown(f"size in tune.models at {text.flops(ends[end])}", name, sizes)
        middle = math.sqrt(math.prod(fold(cell.num_params for cell in sizes.values()) for fold in (min, max)))
        nearest = min(sizes.values(), key=lambda cell: abs(math.log(cell.num_params / middle)))
        centre = nearest if name is None else sizes[name]
        centres.setdefault(centre.cell_id, centre)
    return list(centres.values())


def _variants(spec: SweepSpec, centre: Cell, micro: int | None) -> list[dict[str, Any]]:
    """Return the keys that each variant of a cell changes: none for the cell itself, which is the first."""
    tune = spec.tune
    assert tune is not None
    rates, batches = sorted(set(tune.lr)), sorted(set(tune.batch))
    by_batch = {factor: _batch(spec, centre, micro, factor) for factor in batches}
    taken = {centre.global_batch_size: 1.0}
    for factor, keys in by_batch.items():
        batch = keys.get("data.batch_size", centre.global_batch_size)
        if taken.setdefault(batch, factor) != factor:
            raise UserError(
                f"tune.batch: {factor:g} and {taken[batch]:g} times the {centre.global_batch_size} sequences of "
                f"{centre.model} at {text.flops(centre.budget_flops)} both give {batch}, because a batch divides over "
                "the devices: change tune.batch, data.batch_size or data.micro_batch_size"
            )
    pairs = sorted(((rate, batch) for rate in rates for batch in batches), key=lambda pair: pair != (1.0, 1.0))
    return [{**_rate(centre, rate), **by_batch[batch]} for rate, batch in pairs]


def _rate(centre: Cell, factor: float) -> dict[str, Any]:
    return {} if factor == 1 else {"optimizer.lr": float(f"{factor * centre.learning_rate:.{DIGITS}g}")}


def _batch(spec: SweepSpec, centre: Cell, micro: int | None, factor: float) -> dict[str, Any]:
    if factor == 1:
        return {}
    point = Point(centre.groups, centre.overrides)
    return batch_keys(spec, point, micro, factor * centre.global_batch_size)


def _replicated(
    centres: Sequence[Cell], variants: Sequence[Sequence[dict[str, Any]]]
) -> list[tuple[Cell, dict[str, Any]]]:
    """Return the cells in the order in which they get a second seed.

    First come the centres, whose runs of two seeds show the noise at each budget, then the others, the lowest budget
    first, because its runs vary most and cost least.
    """
    first = [(centre, own[0]) for centre, own in zip(centres, variants, strict=True)]
    return first + [(centre, keys) for centre, own in zip(centres, variants, strict=True) for keys in own[1:]]


def _further_seed(spec: SweepSpec, centre: Cell) -> int:
    """Return the first seed s + 1000 k of a cell that the rules of ``replicates`` do not give it."""
    known = {*spec.seeds_at(centre.budget_flops)}
    seed = centre.seed + SEED_STEP
    while seed in known:
        seed += SEED_STEP
    return seed


def _point(centre: Cell, keys: Mapping[str, Any], seed: int) -> Point:
    return Point(centre.groups, {**centre.overrides, **keys, "seed": seed})


def tuning_lines(plan: Plan) -> list[str]:
    """Say what the tuning cells of a plan are and cost, or that the recipe is not tuned."""
    spec = plan.spec
    cells = [cell for cell in plan.grid if cell.role == TUNE]
    if spec.tune is None and not cells:
        is_tuned = (plan.recipe is not None and plan.recipe.runs is not None) or {*VARIED.values()} & {*spec.vary}
        return [] if is_tuned else ["untuned: these exponents describe this recipe; `tune: true` adds tuning cells"]
    places = list(dict.fromkeys(f"{cell.model} at {text.flops(cell.budget_flops)}" for cell in cells))
    flops = sum(cell.budget_flops * cell.own_share for cell in cells)
    share = flops / sum(cell.budget_flops * cell.own_share for cell in plan.grid)
    lines = [
        f"tuning: {text.counted(len(cells), 'cell')} vary learning rate and batch ({text.listed(places)}), "
        f"{share:.0%} of the FLOPs"
    ]
    for name in VARIED if spec.tune is not None else ():
        factors = getattr(spec.tune, name)
        if len({*factors}) > 1 and not min(factors) < 1 < max(factors):
            side = "below" if min(factors) == 1 else "above"
            lines.append(
                f"tune.{name} has no factor {side} 1: if the best value lies there, the cells do not enclose it"
            )
    if plan.waits_for_recipe:
        lines.append("the other cells follow when the recipe is fitted to these")
    return lines


def tuning_sets(plan: Plan) -> list[list[Cell]]:
    """Return sets of cells that differ in learning rate, batch and seed only: tuning cells with those of the grid."""
    sets: dict[str, list[Cell]] = defaultdict(list)
    for cell in plan.grid:
        if cell.role == TUNE or plan.spec.recipe != FITTED:  # under a fitted recipe, the grid is no variant of these
            others = {key: value for key, value in cell.overrides.items() if key not in (*VARIED.values(), *BESIDE)}
            sets[canonical_json([cell.groups, others])].append(cell)
    return [cells for cells in sets.values() if any(cell.role == TUNE for cell in cells)]


def one_sided(spec: SweepSpec, cells: Sequence[Cell], losses: Mapping[str, float]) -> list[tuple[str, str]]:
    """Find out whether tuning cells all lie on one side of the best.

    Args:
        spec: The definition.
        cells: One of the ``tuning_sets`` of its plan.
        losses: The losses of the cells that are done, by cell id.

    Returns:
        For the learning rate and the batch, if the lowest loss is at an end of them: (a sentence, the setting of the
        definition that adds cells beyond this end). Nothing is returned before all cells are done.
    """
    if spec.tune is None or not all(cell.cell_id in losses for cell in cells):
        return []
    best, found = min(cells, key=lambda cell: losses[cell.cell_id]), []
    place = f"{best.model} at {text.flops(best.budget_flops)}"
    for name, words, value_of in (("lr", "learning rate", _rate_of), ("batch", "batch", _batch_of)):
        factors = sorted({*getattr(spec.tune, name)})
        values = sorted({value_of(cell) for cell in cells})
        if len(factors) < 2 or len(values) < 2 or values[0] < value_of(best) < values[-1]:
            continue
        is_low = value_of(best) == values[0]
        further = factors[0] ** 2 / factors[1] if is_low else factors[-1] ** 2 / factors[-2]
        end, side = ("lowest", "below") if is_low else ("highest", "above")
        asked = [further, *factors] if is_low else [*factors, further]
        value = f"{value_of(best):.4g}"
        sentence = f"{place}: the lowest loss is at the {end} {words} ({value}), so the best one may lie {side} it"
        found.append((sentence, f"tune.{name}=[{','.join(f'{factor:.6g}' for factor in asked)}]"))
    return found


def _rate_of(cell: Cell) -> float:
    return cell.learning_rate


def _batch_of(cell: Cell) -> float:
    return float(cell.global_batch_size)
