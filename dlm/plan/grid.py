"""Make the plan of a sweep: every combination in the definition becomes a cell, or is dropped with a reason.

A plan holds only decisions, so the same definition and the same data give the same bytes on any machine. The module
cost estimates the cost of the cells, which is stored in estimate.json next to the plan.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlm.core import text
from dlm.core.checks import NAMES, check_keys, check_values
from dlm.core.configs import choices, load_base, load_choice, merge, nest
from dlm.core.data_only import check_rule
from dlm.core.errors import UserError, unknown
from dlm.core.identity import canonical_json, cell_id
from dlm.core.paths import configs_dir
from dlm.core.power_recipe import PowerRecipe
from dlm.core.recipe import MIN_STEPS, Recipe, derive, fill
from dlm.core.replaced_keys import instead_of
from dlm.data.manifest import DataSet, read_data, unique_of
from dlm.plan.cells import TUNE, Cell, Plan, Point
from dlm.plan.data_sets import DataSets, resolved
from dlm.plan.definition import FITTED, SEED_STEP, SweepSpec
from dlm.plan.recipes import check_cells, devices_of, followed, load_recipe
from dlm.plan.selection import at_ends, thin
from dlm.plan.trunks import share_trunks
from dlm.plan.tuning import tuning_points
from dlm.record.wandb import check_names

# The groups that determine the result of a run. The other groups do not enter the identity of a cell.
DECIDING = ("model", "data", "objective", "optimizer", "scheduler")


DEFAULT_GROUPS = {"data": "stdlib", "optimizer": "adamw", "scheduler": "cosine", "trainer": "cpu"}

OTHER_GROUPS = {"trainer": "cpu", "callbacks": "default", "logger": "wandb"}

# Config keys that follow from another key of the definition.
OWN_KEYS = {
    "seed": "seeds",
    "training.budget": "budgets",
    "training.convention": "convention",
    "training.steps": "budgets",
}


def make_plan(spec: SweepSpec, *, read: Callable[[Mapping[str, Any]], DataSet | None] = read_data) -> Plan:
    """Plan a sweep.

    Args:
        spec: The definition.
        read: Returns the data set of a resolved ``data`` node, or None if it is not prepared. It may prepare the data.

    Raises:
        UserError: The definition names something that does not exist or cannot be trained, or all cells are dropped.
    """
    groups = {**DEFAULT_GROUPS, **spec.groups}
    _check_number(spec)
    _check_definition(spec, groups)
    points = list(_points(spec))
    # What is checked depends neither on the budget nor on the seed, so one point per combination of the rest is enough.
    distinct = {canonical_json([point.groups, _given(point)]): point for point in points}
    for point in distinct.values():
        _check_keys(point)
    recipe, data = load_recipe(spec), DataSets(read)
    # Tuning cells vary the recipe of the configuration if the fitted one is to come from them.
    own = None if spec.recipe == FITTED else recipe
    cells, dropped = _grid(spec, points, own, data)
    tuning = [] if spec.tune is None else _tuning_cells(spec, cells, data)
    if spec.recipe == FITTED:
        cells, dropped = ([], dropped) if recipe is None else _grid(spec, points, recipe, data)
    if recipe is not None:
        check_cells(spec, recipe, cells)
    cells += tuning
    _check_wandb(spec.name, cells)
    if spec.branches:
        cells = list(with_shared_trunks(cells))
    name, times = Counter(cell.cell_id for cell in cells).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"the definition names {name} {times} times: remove repeated values of models, vary or seeds "
            f"(and seeds that are {SEED_STEP} apart, if there are replicates)"
        )
    return Plan(
        spec=spec,
        convention=spec.convention,
        data=groups["data"],
        data_hash=data.hash,
        cells=tuple(cells),
        dropped=tuple(dropped),
        recipe=recipe,
    )


def _grid(
    spec: SweepSpec, points: Sequence[Point], recipe: PowerRecipe | None, data: DataSets
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Return the cells of the grid under a recipe, and the rows of ``Plan.dropped``."""
    cells, dropped = [], []
    for point in points:
        cell = recipe_cell(spec, point, recipe, data.of)
        if isinstance(cell, Cell):
            cells.append(cell)
        else:
            dropped.append(point.dropped(cell))
    cells, thinned = thin(spec, cells)
    dropped += thinned
    cells, dropped = at_ends(spec, cells, dropped)
    if not cells:
        first = dropped[0]
        raise UserError(
            f"no cell is left of {len(dropped)} (the first, {first['model']} at {text.flops(first['budget_flops'])}: "
            f"{first['reason']}): change budgets, models, tokens_per_param or max_epochs"
        )
    return cells, dropped


def _tuning_cells(spec: SweepSpec, cells: Sequence[Cell], data: DataSets) -> list[Cell]:
    """Return the tuning cells around cells of the grid; ``tokens_per_param`` limits them no more than a proof run."""

    def micro_of(cell: Cell) -> int | None:
        micro: int | None = cell_config(cell.groups, cell.overrides)["data"].get("micro_batch_size")
        return micro

    anywhere, found = spec.model_copy(update={"tokens_per_param": None}), []
    for one in tuning_points(spec, cells, micro_of):
        config = cell_config(one.groups, one.overrides)
        cell = cell_at(anywhere, one, config, data.of(config), role=TUNE)
        if not isinstance(cell, Cell):
            place = f"{one.groups['model']} at {text.flops(one.overrides['training.budget'])}"
            raise UserError(f"the tuning cell {place} cannot be trained ({cell}): change tune.batch or tune.models")
        found.append(cell)
    return found


def with_shared_trunks(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Return the cells with their trunks (``share_trunks``)."""
    return share_trunks(cells, [cell_config(cell.groups, cell.overrides) for cell in cells])


def _check_number(spec: SweepSpec) -> None:
    """Raise UserError for a definition with more combinations than ``max_cells``, before any of them is made."""
    number = spec.num_combinations()
    if number > spec.max_cells:
        lists = {"budgets": spec.budgets, "models": spec.models, "objectives": spec.objectives, "seeds": spec.seeds}
        sizes = {key: len(values) for key, values in {**lists, **spec.vary}.items() if len(values) > 1}
        longest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:4] + [
            name for name, is_given in (("replicates", spec.replicates), ("tune", spec.tune)) if is_given
        ]
        raise UserError(
            f"the definition has {number:,} combinations of values, and max_cells is {spec.max_cells:,}: shorten "
            f"{', '.join(longest)}, or raise max_cells"
        )


def _check_definition(spec: SweepSpec, groups: Mapping[str, str]) -> None:
    """Raise UserError for a choice that no group has, and for a config key that another key of the definition gives."""
    for key in (*spec.set, *spec.vary):
        if key in OWN_KEYS:
            raise UserError(f"{key} cannot be set in a sweep: it follows from {OWN_KEYS[key]} of the definition")
    for group in groups:
        if group not in DEFAULT_GROUPS | OTHER_GROUPS:
            raise unknown("group in groups", group, DEFAULT_GROUPS | OTHER_GROUPS)
    for rule in spec.launcher:
        check_rule(rule.set, "")
    varied = [(group, choice) for group in DEFAULT_GROUPS for choice in spec.vary.get(group, ())]
    for group, choice in (*groups.items(), *varied):
        if choice not in choices(group):
            raise unknown(group, choice, choices(group))


def _given(point: Point) -> dict[str, Any]:
    """Return the config keys of a point that stand under set or vary of the definition."""
    return {key: value for key, value in point.overrides.items() if key not in OWN_KEYS}


def _points(spec: SweepSpec) -> Iterator[Point]:
    """Yield every combination of the values in a definition."""
    combinations = [dict(zip(spec.vary, values, strict=True)) for values in itertools.product(*spec.vary.values())]
    seeds = {budget: spec.seeds_at(budget) for budget in spec.budgets}
    longest = max(seeds.values(), key=lambda each: len(each))
    for objective, varied, seed, budget, model in itertools.product(
        spec.objectives, combinations, longest, spec.budgets, spec.models
    ):
        if seed in seeds[budget]:
            yield point_of(spec, model=model, objective=objective, varied=varied, seed=seed, budget=budget)


def point_of(
    spec: SweepSpec, *, model: str, objective: str, varied: Mapping[str, Any], seed: int, budget: float
) -> Point:
    """Return one combination of values of a definition; ``varied`` has one value for each key of ``vary``."""
    chosen = {key: value for key, value in varied.items() if key in DEFAULT_GROUPS}
    keys = {key: value for key, value in varied.items() if key not in DEFAULT_GROUPS}
    fixed = {"seed": seed, "training.budget": budget, "training.convention": spec.convention}
    named = {"recipe": spec.recipe} if spec.recipe in NAMES["recipe"] else {}
    groups = {"model": model, "objective": objective, **DEFAULT_GROUPS, **spec.groups, **chosen}
    return Point(groups, {**spec.set, **keys, **fixed, **named})


def cell_config(groups: Mapping[str, str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a cell's config that determines its result, as Hydra composes it and ``fill`` completes it.

    Args:
        groups: Group -> choice.
        overrides: Dotted config key -> value.
    """
    return fill(_unfilled(groups, overrides))


def _unfilled(groups: Mapping[str, str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of ``cell_config`` before ``fill``."""
    composed = _composed(configs_dir(), *(groups[group] for group in DECIDING))
    deciding = {key: value for key, value in overrides.items() if key.split(".")[0] not in OTHER_GROUPS}
    trainer = {"precision": overrides.get("trainer.precision", "auto")}
    return {**merge(composed, nest(deciding)), "trainer": trainer}


@functools.lru_cache(maxsize=4096)
def _composed(configs: Path, *chosen: str) -> dict[str, Any]:
    """Load the chosen files of the groups DECIDING from ``configs``. Callers must not modify the cached result."""
    return load_base() | {group: load_choice(group, choice) for group, choice in zip(DECIDING, chosen, strict=True)}


def _check_keys(point: Point) -> None:
    """Raise UserError for a key of a group file or of the definition that cells do not read or must not set."""
    chosen = {**OTHER_GROUPS, **point.groups}
    config = load_base() | {group: load_choice(group, choice) for group, choice in chosen.items()}
    for key, value in point.overrides.items():
        if key in chosen and isinstance(value, Mapping):
            raise UserError(
                f"{key} is a group: set each of its keys by its full name, such as {key}.{next(iter(value), 'KEY')}"
            )
        if key in chosen:
            raise UserError(f"{key} is a group: choose it under groups: or vary: of the sweep definition")
        if not _can_be_set(config, key):
            keys = [f"{group}.{name}" for group, node in config.items() if isinstance(node, dict) for name in node]
            where = {"listed_in": "the folder configs/"}
            raise instead_of(key) or unknown("config key in the sweep definition", key, keys, **where)
    complete = merge(config, nest(point.overrides))
    check_keys(complete)
    check_values(complete)


def _check_wandb(sweep: str, cells: Sequence[Cell]) -> None:
    """Raise UserError if W&B would refuse the id or a name of a cell's run."""
    for cell in cells:
        logger = load_choice("logger", cell.groups.get("logger", OTHER_GROUPS["logger"]))
        own = {key.removeprefix("logger."): value for key, value in cell.overrides.items() if key.startswith("logger.")}
        check_names({**logger, **own} if logger else None, sweep=sweep, cell_id=cell.cell_id)


def _can_be_set(config: Mapping[str, Any], key: str) -> bool:
    """Return whether the group of the dotted ``key`` exists and every parent of the key is a group, not a value."""
    group, *names = key.split(".")
    node = config.get(group)
    for name in names[:-1]:
        node = node.get(name, {}) if isinstance(node, Mapping) else None
    return group in config and (not names or isinstance(node, Mapping))


def data_node(groups: Mapping[str, str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``data`` node of a cell, with ``${paths.data_dir}`` resolved as Hydra does."""
    return resolved(cell_config(groups, overrides)["data"])


def recipe_cell(
    spec: SweepSpec,
    point: Point,
    recipe: PowerRecipe | None,
    data_of: Callable[[Mapping[str, Any]], DataSet | None],
    *,
    limits: SweepSpec | None = None,
) -> Cell | str:
    """Return the cell of a point with the values that a recipe gives it, or the reason why the point is dropped.

    Args:
        spec: The definition.
        point: The choices and the keys of the cell.
        recipe: The laws of the recipe that the cell follows; None: as configured.
        data_of: Returns the data set of a config; None if it is not prepared.
        limits: The definition whose limits decide whether the point is dropped, if it is another one.
    """
    target = None
    if recipe is not None:
        point, target = followed(spec, recipe, point, _unfilled(point.groups, point.overrides))
    config = cell_config(point.groups, point.overrides)
    return cell_at(limits or spec, point, config, data_of(config), batch_target_tokens=target)


def cell_at(
    spec: SweepSpec, point: Point, config: Mapping[str, Any], data: DataSet | None, **others: Any
) -> Cell | str:
    """Return the cell of a point, or the reason why the point is dropped.

    Args:
        spec: The definition.
        point: The choices and the keys of the cell.
        config: Its config, as ``cell_config`` returns it.
        data: Its data set; None if it is not prepared.
        others: Fields of the cell that do not follow from these.
    """
    recipe = derive(config)
    if data is not None and data.vocab_size != recipe.shape.vocab_size:
        raise UserError(
            f"model {recipe.shape.name} has vocab_size {recipe.shape.vocab_size}, the data "
            f"{point.groups['data']} have {data.vocab_size}: change models or groups.data"
        )
    epochs = None if data is None else data.epochs(recipe.tokens, unique=unique_of(config["data"]))
    _check_divides(spec, point, recipe.global_batch_size)
    reason = _refusal(spec, recipe, epochs)
    if reason is not None:
        return reason
    assert recipe.budget_flops is not None and recipe.budget_error_pct is not None
    return described(
        config,
        recipe,
        cell_id=cell_id(config, steps=recipe.steps, data_hash=None if data is None else data.hash),
        budget_flops=recipe.budget_flops,
        budget_error_pct=recipe.budget_error_pct,
        epochs=epochs,
        groups=point.groups,
        overrides=point.overrides,
        **others,
    )


def described(config: Mapping[str, Any], recipe: Recipe, **others: Any) -> Cell:
    """Return the cell that a config and its recipe describe; ``others`` are the fields that do not follow from them."""
    return Cell(
        model=recipe.shape.name,
        objective=config["objective"]["name"],
        seed=config["seed"],
        num_params=recipe.shape.num_params,
        num_params_total=recipe.shape.num_params_total(causal=recipe.causal),
        convention=recipe.convention,
        tokens=recipe.tokens,
        steps=recipe.steps,
        warmup_steps=recipe.warmup_steps,
        global_batch_size=recipe.global_batch_size,
        block_size=recipe.block_size,
        learning_rate=config["optimizer"]["lr"],
        schedule=config["scheduler"]["name"],
        flops={str(name): value for name, value in recipe.flops.items()},
        tokens_per_param=recipe.tokens / recipe.shape.num_params,
        **others,
    )


def _check_divides(spec: SweepSpec, point: Point, batch_size: int) -> None:
    """Raise UserError for a batch that cannot be divided evenly over the devices of a cell."""
    devices = devices_of(spec, point.overrides)
    if batch_size % devices:
        raise UserError(
            f"data.batch_size {batch_size} of {point.groups['model']} does not divide evenly over {devices} devices: "
            "change data.batch_size, or the devices (hardware.gpus_per_node and hardware.nodes of the definition, "
            "trainer.devices)"
        )


def _refusal(spec: SweepSpec, recipe: Recipe, epochs: float | None) -> str | None:
    """Return the reason why the definition drops a cell with this recipe, or None if it keeps the cell."""
    ratio = recipe.tokens / recipe.shape.num_params
    if recipe.steps < MIN_STEPS:
        return f"{recipe.steps} steps of {recipe.tokens_per_step} tokens, fewer than {MIN_STEPS}"
    if spec.tokens_per_param and not spec.tokens_per_param[0] <= ratio <= spec.tokens_per_param[1]:
        low, high = spec.tokens_per_param
        return f"{ratio:.3g} tokens per parameter, outside tokens_per_param {low:g} to {high:g}"
    if epochs is not None and epochs > spec.max_epochs:
        return f"{epochs:.2f} epochs of the data, above max_epochs {spec.max_epochs:g}"
    return None
