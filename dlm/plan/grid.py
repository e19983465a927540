"""Make the plan of a sweep: every combination in the definition becomes a cell, or is dropped with a reason.

A plan holds only decisions, so the same definition and the same data give the same bytes on any machine. The module
cost estimates the cost of the cells, which is stored in estimate.json next to the plan.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.core import paths, text
from dlm.core.checks import check_keys, check_values
from dlm.core.configs import choices, load_base, load_choice, merge, nest
from dlm.core.data_only import check_rule
from dlm.core.errors import UserError, unknown
from dlm.core.identity import canonical_json, cell_id, content_hash
from dlm.core.paths import configs_dir
from dlm.core.recipe import MIN_STEPS, Recipe, derive, fill
from dlm.core.replaced_keys import instead_of
from dlm.data.manifest import DataSet, read_data, unique_of
from dlm.plan.cells import Cell, Plan
from dlm.plan.definition import SEED_STEP, SweepSpec
from dlm.plan.trunks import share_trunks
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
    distinct = {canonical_json([point.groups, point.given]): point for point in points}
    for point in distinct.values():
        _check_keys(point)
    found: dict[str, DataSet | None] = {}
    cells, dropped = [], []
    for point in points:
        config = cell_config(point.groups, point.overrides)
        node = _in_place(config["data"])
        key = canonical_json({name: node.get(name) for name in ("data_dir", "sources")})
        if key not in found:
            found[key] = read(node)
        cell = cell_at(spec, point, config, found[key])
        if isinstance(cell, Cell):
            cells.append(cell)
        else:
            dropped.append(point.dropped(cell))
    cells, thinned = _thin(spec, cells)
    dropped += thinned
    cells, dropped = _at_ends(spec, cells, dropped)
    if not cells:
        first = dropped[0]
        raise UserError(
            f"no cell is left of {len(dropped)} (the first, {first['model']} at {text.flops(first['budget_flops'])}: "
            f"{first['reason']}): change budgets, models, tokens_per_param or max_epochs"
        )
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
        data_hash=_hash_of_all(list(found.values())),
        cells=tuple(cells),
        dropped=tuple(dropped),
    )


def with_shared_trunks(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Return the cells with their trunks (``share_trunks``)."""
    return share_trunks(cells, [cell_config(cell.groups, cell.overrides) for cell in cells])


def _check_number(spec: SweepSpec) -> None:
    """Raise UserError for a definition with more combinations than ``max_cells``, before any of them is made."""
    number = spec.num_combinations()
    if number > spec.max_cells:
        lists = {"budgets": spec.budgets, "models": spec.models, "objectives": spec.objectives, "seeds": spec.seeds}
        sizes = {key: len(values) for key, values in {**lists, **spec.vary}.items() if len(values) > 1}
        longest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:4] + (["replicates"] if spec.replicates else [])
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


@dataclass(frozen=True)
class Point:
    """The choices of a cell's groups, and the config keys that the cell sets."""

    groups: Mapping[str, str]
    overrides: Mapping[str, Any]

    @property
    def given(self) -> dict[str, Any]:
        """The config keys that stand under set or vary of the definition."""
        return {key: value for key, value in self.overrides.items() if key not in OWN_KEYS}

    def dropped(self, reason: str) -> dict[str, Any]:
        """Return the row of ``Plan.dropped`` for this combination."""
        return {
            "model": self.groups["model"],
            "objective": self.groups["objective"],
            "seed": self.overrides["seed"],
            "budget_flops": self.overrides["training.budget"],
            "reason": reason,
        }


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
    groups = {"model": model, "objective": objective, **DEFAULT_GROUPS, **spec.groups, **chosen}
    return Point(groups, {**spec.set, **keys, **fixed})


def cell_config(groups: Mapping[str, str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a cell's config that determines its result, as Hydra composes it and ``fill`` completes it.

    Args:
        groups: Group -> choice.
        overrides: Dotted config key -> value.
    """
    composed = _composed(configs_dir(), *(groups[group] for group in DECIDING))
    deciding = {key: value for key, value in overrides.items() if key.split(".")[0] not in OTHER_GROUPS}
    trainer = {"precision": overrides.get("trainer.precision", "auto")}
    return fill({**merge(composed, nest(deciding)), "trainer": trainer})


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
    return dict(_in_place(cell_config(groups, overrides)["data"]))


def _in_place(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_place(item) for key, item in value.items()}
    return value.replace("${paths.data_dir}", str(paths.data_dir())) if isinstance(value, str) else value


def _hash_of_all(found: Sequence[DataSet | None]) -> str | None:
    """Return the hash of the data sets that the cells use, or None while any of them is not prepared.

    A single data set keeps its own hash.
    """
    hashes = [data.hash for data in found if data is not None]
    if len(hashes) < len(found):
        return None
    return hashes[0] if len(hashes) == 1 else content_hash(sorted(hashes))[:16]


def cell_at(spec: SweepSpec, point: Point, config: Mapping[str, Any], data: DataSet | None) -> Cell | str:
    """Return the cell of a point, or the reason why the point is dropped.

    Args:
        spec: The definition.
        point: The choices and the keys of the cell.
        config: Its config, as ``cell_config`` returns it.
        data: Its data set; None if it is not prepared.
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
    devices = point.overrides.get("trainer.devices")
    if isinstance(devices, int):
        devices *= point.overrides.get("trainer.num_nodes") or spec.hardware.nodes
    else:
        devices = spec.hardware.gpus_per_node * spec.hardware.nodes
    if batch_size % max(devices, 1):
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


def _at_ends(
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


def _thin(spec: SweepSpec, cells: list[Cell]) -> tuple[list[Cell], list[dict[str, Any]]]:
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
