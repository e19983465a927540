"""Compute the id of a cell from the values that determine its result; planning and launching compute the same id.

Two runs have the same id if and only if they would give the same losses. The id depends on the model, data, objective,
optimiser, schedule, batch, budget, steps, validation, seed, precision (unless auto) and the checkpoint to start from.
It does not depend on devices, micro-batch, workers, logging and paths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dlm.core import text
from dlm.core.objectives import objective_info

VERSION = 1  # increase it when a value in the identity changes its meaning


HASH_CHARS = 8  # with six, ids would collide once in a few hundred sweeps of 10,000 cells


SWEEP_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # the name is also that of a folder in workdir/ and of a W&B group
SWEEP_NAME_WORDS = "allowed are letters, digits, '_', '.' and '-', a letter or digit first"


def canonical(value: Any) -> Any:
    """Normalise plain JSON values: whole floats become integers, and null entries of mappings are left out."""
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of a value, with sorted keys and no spaces. NaN raises ValueError."""
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of a value, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


# In these config nodes, all keys determine the result except the listed ones.
_DECIDING = {"model": ("name",), "objective": (), "optimizer": (), "scheduler": (), "validation": ("times",)}

_DATA = ("block_size", "stride", "batch_size", "unique_tokens")  # the keys of the node data that determine the result


def identity(config: Mapping[str, Any], *, steps: int, data_hash: str | None) -> dict[str, Any]:
    """Return the values whose hash is part of the cell id.

    Args:
        config: A config with the resolved nodes model, data, objective, optimizer, scheduler, training, validation and
            seed.
        steps: Optimiser steps.
        data_hash: The hash of the data; None if the data is not prepared yet. Preparing it changes the id.
    """
    precision = config.get("trainer", {}).get("precision")
    left_out = dict(_DECIDING)
    if config["scheduler"].get("warmup_tokens_per_param") is not None:
        left_out["scheduler"] = ("warmup_fraction", "warmup_min_steps")
    return {
        "version": VERSION,
        **{
            name: {key: value for key, value in config[name].items() if key not in without}
            for name, without in left_out.items()
        },
        "data": {"hash": data_hash, **{key: config["data"].get(key) for key in _DATA}},
        "training": {"budget": _budget(config), "convention": config["training"].get("convention"), "steps": steps},
        "seed": config["seed"],
        "parent": config.get("ckpt_path"),
        "precision": None if precision == "auto" else precision,  # auto depends on the device
    }


def shared_identity(config: Mapping[str, Any], *, data_hash: str | None) -> dict[str, Any]:
    """Return the values that two runs must share to have the same losses while their learning rates are equal.

    These are all values of ``identity`` except the schedule, the length, the validation and the checkpoint to start
    from.
    """
    whole = identity(config, steps=0, data_hash=data_hash)
    shared = {key: whole[key] for key in ("model", "objective", "optimizer", "data", "seed", "precision")}
    normalised: dict[str, Any] = canonical(shared)
    return normalised


def _budget(config: Mapping[str, Any]) -> float | None:
    """Return the target FLOPs; None if training.steps is set, which takes precedence."""
    training = config["training"]
    return None if training.get("steps") is not None else training.get("budget")


def cell_id(config: Mapping[str, Any], *, steps: int, data_hash: str | None) -> str:
    """Return a readable prefix and a content hash: ``mdm-170M-1e19-3f9ac21b``. dlm never parses ids."""
    budget = _budget(config)
    size = text.flops(float(budget)) if budget is not None else f"{steps}steps"
    objective = objective_info(config["objective"]["name"])
    head = f"{objective.id_head}-{config['model'].get('name', 'model')}-{size}"
    return f"{head}-{content_hash(identity(config, steps=steps, data_hash=data_hash))[:HASH_CHARS]}"
