"""Apply the recipe that a definition names: learning rate and batch of a cell follow from its size and its length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlm.core import paths, text
from dlm.core.checks import NAMES, RANGES
from dlm.core.errors import UserError
from dlm.core.power_recipe import FARTHEST, POWER_LAW, PowerRecipe, read_recipe
from dlm.core.recipe import fill, size_and_length
from dlm.plan.cells import Cell, Point
from dlm.plan.definition import FITTED, SweepSpec

RECIPE_FILE = "recipe.json"  # of the folder of a sweep: the recipe that was fitted to its tuning cells
PUBLISHED = "power_law"  # the recipe of dlm.core.recipe that is given by laws with a range
KEYS = {"lr": "optimizer.lr", "batch_tokens": "data.batch_size"}  # a law of a recipe -> the config key that it gives
LARGEST_MULTIPLE = 8  # of the sequences of a device
HIGHEST_LR = 10.0  # a higher learning rate trains nothing


def recipe_path(spec: SweepSpec) -> Path | None:
    """Return the file of the recipe that a definition names; None if it names no file."""
    if spec.recipe is None or spec.recipe in NAMES["recipe"]:
        return None
    return paths.workdir() / spec.name / RECIPE_FILE if spec.recipe == FITTED else Path(spec.recipe)


def load_recipe(spec: SweepSpec) -> PowerRecipe | None:
    """Return the laws of the recipe that a definition names.

    They are None if the recipe has none, and if it will be fitted to tuning cells of the sweep that have yet to be
    trained.

    Raises:
        UserError: The file is missing or no recipe, or the recipe does not fit the definition.
    """
    path = recipe_path(spec)
    if path is None:
        return POWER_LAW if spec.recipe == PUBLISHED else None
    if spec.recipe == FITTED and not path.is_file():
        if spec.tune is not None:
            return None
        raise UserError(
            f"recipe is fitted, and {path} does not exist: fit it to runs with `dlm hparams RUNS.csv --out {path}`, or "
            "add tune: true, so that this sweep trains the cells to fit it to"
        )
    recipe = read_recipe(path)
    for objective in spec.objectives:
        if recipe.objective not in (None, objective):
            raise UserError(
                f"{path} is a recipe of {recipe.objective}, and the definition trains {objective}: set objectives to "
                f"[{recipe.objective}], or fit a recipe to runs of {objective}"
            )
    for law, key in KEYS.items():
        if getattr(recipe, law) is not None and (key in spec.vary or _is_set_twice(spec, key)):
            where, clear = ("vary", f"remove {key} from vary") if key in spec.vary else ("set", f"--set {key}=null")
            raise UserError(f"{where} gives {key}, and so does the recipe {path}: {clear}, or leave the recipe out")
    return recipe


def _is_set_twice(spec: SweepSpec, key: str) -> bool:
    """Whether `set` gives a key of the recipe too, unless that is for the tuning cells that the recipe is fitted to."""
    is_for_tuning = spec.recipe == FITTED and spec.tune is not None
    return spec.set.get(key) is not None and not is_for_tuning


def followed(
    spec: SweepSpec, recipe: PowerRecipe, point: Point, config: Mapping[str, Any]
) -> tuple[Point, float | None]:
    """Set the learning rate and the batch of a cell as a recipe gives them.

    Args:
        spec: The definition.
        recipe: The laws of its recipe.
        point: The choices and the keys of the cell.
        config: Its config before ``fill``.

    Returns:
        (the point with these keys, the tokens of a step before they are rounded to whole sequences). The tokens are
        None if the recipe does not give the batch.
    """
    place = size_and_length(config)
    is_published = spec.recipe == PUBLISHED  # its values are only for keys that are null, as ``fill`` has it
    keys: dict[str, Any] = {}
    if not is_published:
        _check_optimizer(spec, recipe, config)
        rate = recipe.learning_rate(*place)
        keys |= {} if rate is None else {"optimizer.lr": rate}
    if recipe.batch_tokens is None or (is_published and config["data"].get("batch_size") is not None):
        return Point(point.groups, {**point.overrides, **keys}), None
    target = recipe.batch_tokens.at(*place)
    if is_published:
        sequences = float(fill(config)["data"]["batch_size"])
    else:
        sequences = min(target, place[1]) / config["data"]["block_size"]  # a batch is at most the whole run
    keys |= batch_keys(spec, point, config["data"].get("micro_batch_size"), sequences)
    return Point(point.groups, {**point.overrides, **keys}), target


def batch_keys(spec: SweepSpec, point: Point, micro: int | None, sequences: float) -> dict[str, Any]:
    """Return the config keys of a batch near ``sequences`` that divides evenly over the devices of a cell.

    If ``micro`` sets the micro-batch, a batch of at least one micro-batch on every device is a multiple of these, and a
    smaller batch is one micro-batch on every device. Otherwise the sequences of a device are a multiple of up to
    LARGEST_MULTIPLE, so that they divide into micro-batches, unless that would round by more than an eighth.
    """
    devices = devices_of(spec, point.overrides)
    unit = devices * micro if micro is not None and sequences >= devices * micro else devices
    while micro is None and unit < devices * LARGEST_MULTIPLE and 8 * unit <= sequences:
        unit *= 2
    batch = max(round(sequences / unit), 1) * unit
    is_one = micro is not None and batch < devices * micro
    return {"data.batch_size": batch} | ({"data.micro_batch_size": batch // devices} if is_one else {})


def devices_of(spec: SweepSpec, overrides: Mapping[str, Any]) -> int:
    """Return the number of devices on which a cell is trained."""
    devices = overrides.get("trainer.devices")
    if isinstance(devices, int):
        return max(devices * (overrides.get("trainer.num_nodes") or spec.hardware.nodes), 1)
    return max(spec.hardware.gpus_per_node * spec.hardware.nodes, 1)


def _check_optimizer(spec: SweepSpec, recipe: PowerRecipe, config: Mapping[str, Any]) -> None:
    name = config["optimizer"]["name"]
    if recipe.optimizer not in (None, name):
        raise UserError(
            f"{recipe_path(spec)} is a recipe for the optimiser {recipe.optimizer}, and the definition uses {name}: "
            f"set groups.optimizer to {recipe.optimizer}, or fit a recipe to runs with {name}"
        )


def check_cells(spec: SweepSpec, recipe: PowerRecipe, cells: Sequence[Cell]) -> None:
    """Raise UserError for a cell that a recipe from a file cannot be trusted for, because it is too far outside."""
    if spec.recipe == PUBLISHED:
        return
    path = recipe_path(spec)
    for cell in cells:
        factor = recipe.factor_outside(cell.num_params, cell.tokens)
        if factor > FARTHEST:
            raise UserError(
                f"{cell.model} at {text.flops(cell.budget_flops)} ({text.count(cell.num_params)} parameters, "
                f"{text.count(cell.tokens)} tokens) is a factor of {factor:.3g} outside the runs of {path} "
                f"({recipe.range_words()}), and a recipe is refused beyond {FARTHEST:g}: change models or budgets, or "
                "fit the recipe to runs nearby"
            )
        low = RANGES["optimizer.lr"][0]
        if not low <= cell.learning_rate <= HIGHEST_LR:
            raise UserError(
                f"{path} gives {cell.model} at {text.flops(cell.budget_flops)} a learning rate of "
                f"{cell.learning_rate:g}: it must be from {low:g} to {HIGHEST_LR:g}: fit it again with `dlm hparams`"
            )


def recipe_lines(spec: SweepSpec, recipe: PowerRecipe | None, cells: Sequence[Cell]) -> list[str]:
    """Say which recipe the cells follow, how far outside its runs they lie, and how far its batches were rounded."""
    if recipe is None:
        return []
    runs = "" if recipe.runs is None else f", fitted to {text.counted(recipe.runs, 'run')}"
    lines = [f"recipe {spec.recipe}{runs}: {recipe.source}; its range is {recipe.range_words()}"]
    outside = [cell for cell in cells if recipe.factor_outside(cell.num_params, cell.tokens) > 1]
    if outside:
        worst = max(outside, key=lambda cell: recipe.factor_outside(cell.num_params, cell.tokens))
        factor = recipe.factor_outside(worst.num_params, worst.tokens)
        lines.append(
            f"outside that range: {len(outside)} of {text.counted(len(cells), 'cell')}, by a factor of up to "
            f"{factor:.3g} ({worst.cell_id}); there the recipe is an extrapolation"
        )
    rounded = [cell for cell in cells if cell.batch_target_tokens is not None]
    if rounded:
        worst = max(rounded, key=lambda cell: abs(cell.batch_error_pct or 0.0))
        target, batch = worst.batch_target_tokens or 0.0, worst.global_batch_size * worst.block_size
        lines.append(
            f"batches are rounded to whole sequences on every device, at most by {worst.batch_error_pct:+.3g}%: "
            f"{worst.cell_id} has {text.count(batch)} tokens, the recipe gives {text.count(target)}"
        )
    return lines
