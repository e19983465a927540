"""Describe a run to W&B, and read its result back from W&B."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dlm.core.errors import UserError
from dlm.core.recipe import Recipe
from dlm.record.run import Result

# Phrases in W&B's messages when it refuses a login, an entity or a project. A retry does not help.
REFUSED_BY_WANDB = ("not found", "permission denied", "error 401", "error 403", "error 404", "API key")

MOST_CHARACTERS = 128  # that W&B allows in an id and in each name
MOST_OF_A_TAG = 64
RESERVED = {"id": ":;,#?/'", "project": "/\\#?%:", "name": "", "group": ""}  # characters that W&B refuses in them

RESULT_PREFIX = "result/"  # prefix of the fields of Result in the W&B summary of a run
_RESULT = TypeAdapter(Result)

UNITS = {
    "train/loss": "nats/token",
    "val/loss": "nats/token",
    "val/loss_se": "nats/token",
    "params": "parameters",
    "tokens": "tokens",
    "flops": "training FLOPs",
    "time": "seconds since the epoch",
    "step_time": "seconds",
    "tokens_per_sec": "tokens/second",
    "mfu": "fraction of the peak",
    "memory_bytes": "bytes",
    "grad_norm": "L2 norm",
    "wall_sec": "seconds",
    "gpu_hours": "GPU-hours",
}


def run_id(sweep: str, cell_id: str) -> str:
    """Return the W&B id of the run of a cell, the same as ``id`` in configs/logger/wandb.yaml."""
    return f"{sweep}-{cell_id}"


def check_names(logger: Mapping[str, Any] | None, *, sweep: str, cell_id: str) -> None:
    """Raise UserError if W&B would refuse the id or a name of a run, before anything is trained under it.

    Args:
        logger: The ``logger`` node of the config; ${sweep} and ${cell_id} in it need not be resolved.
        sweep: The name of the sweep.
        cell_id: The id of the cell.
    """
    for key, reserved in RESERVED.items():
        given = (logger or {}).get(key)
        if given is None:
            continue
        name = str(given).replace("${sweep}", sweep).replace("${cell_id}", cell_id)
        odd = [letter for letter in reserved if letter in name]
        if odd:
            raise UserError(f"logger.{key} is {name!r}: W&B allows none of {reserved} in it, so remove {' '.join(odd)}")
        if len(name) > MOST_CHARACTERS:
            change = "shorten the name of the sweep, which is part of it" if sweep in name else "shorten it"
            raise UserError(
                f"logger.{key} is {name!r}, of {len(name)} characters: W&B allows {MOST_CHARACTERS}, so {change}"
            )


def fitting_tags(tags: Iterable[Any] | str | None) -> list[str] | None:
    """Return tags that W&B accepts: a longer one is cut, and ends with a hash of the whole.

    Raises UserError for an empty tag.
    """
    if tags is None:
        return None
    words = [tags] if isinstance(tags, str) else [str(tag) for tag in tags]
    if "" in words:
        raise UserError(f"logger.tags is {words}: W&B allows no empty tag, so name or remove it")
    return [tag if len(tag) <= MOST_OF_A_TAG else _cut(tag) for tag in words]


def _cut(tag: str) -> str:
    digest = hashlib.sha256(tag.encode()).hexdigest()[:8]
    return f"{tag[: MOST_OF_A_TAG - len(digest) - 1]}-{digest}"


def logged_result(summary: Mapping[str, Any]) -> Result | None:
    """Read the result that a run logged to W&B at its end; None when the result is absent or incomplete.

    Numbers get back the types that they had when they were logged, because W&B's server stores 3.0 as 3.

    Args:
        summary: The W&B summary (last values) of the run; the keys of the result begin with RESULT_PREFIX.
    """
    found = {key.removeprefix(RESULT_PREFIX): value for key, value in summary.items() if key.startswith(RESULT_PREFIX)}
    try:
        return _RESULT.validate_python(found)
    except ValidationError:
        return None


def planned_facts(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the values that follow from the config of a run, named like the columns of runs.csv."""
    return {
        "objective": config["objective"]["name"],
        "params": recipe.shape.num_params,
        "params_total": recipe.shape.num_params_total(causal=recipe.causal),
        "tokens": recipe.tokens,
        "steps": recipe.steps,
        "convention": recipe.convention,
        "flops": recipe.flops[recipe.convention],
        **{f"flops_{convention}": value for convention, value in recipe.flops.items()},
    }


def described(config: Mapping[str, Any], recipe: Recipe, **facts: Any) -> dict[str, Any]:
    """Return what a run tells W&B at its start: its resolved config, facts about the run, and units.

    Args:
        config: The resolved config.
        recipe: The recipe derived from the config.
        **facts: Facts about this attempt: data_hash, git_sha, device, attempt.

    Returns:
        ``config``, and next to it ``record`` (``planned_facts``, the sweep and ``facts``) and ``units``.
    """
    record = {"sweep": config["sweep"], **planned_facts(config, recipe), **facts}
    return {**config, "record": record, "units": UNITS}
