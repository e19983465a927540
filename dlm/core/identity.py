"""identity: the values that decide a result -> cell id. Called by plan and by launch, which must agree.

Two runs have one id exactly when they would give the same losses: model, data, objective, optimiser, schedule,
batch, budget, steps, validation, seed, precision (unless auto) and the checkpoint it starts from. Devices, micro-batch,
workers, logging and paths are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dlm.core import text
from dlm.core.objectives import objective_info

VERSION = 1  # raise it when the meaning of a value in the identity changes


HASH_CHARS = 8  # six would collide once in a few hundred sweeps of 10,000 cells


SWEEP_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # a sweep is a folder in workdir/ and a W&B group


# What of each node of the config does not decide the result.
_WITHOUT = {"model": {"name"}, "validation": {"times"}}


_DATA_KEYS = ("block_size", "stride", "batch_size")


def canonical(value: Any) -> Any:
    """Plain JSON values in one form: whole floats as integers, mappings without their null entries."""
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def canonical_json(value: Any) -> str:
    """The canonical JSON text: sorted keys, no spaces, NaN refused."""
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def identity(config: Mapping[str, Any], *, steps: int, data_hash: str | None) -> dict[str, Any]:
    """The canonical content behind a cell id.

    ``config`` holds the resolved nodes model, data, objective, optimizer, scheduler, training, validation and
    seed. ``data_hash`` is None while the data are not prepared (a preview: the id will change).
    """
    nodes = {
        name: {key: value for key, value in config[name].items() if key not in _WITHOUT.get(name, ())}
        for name in ("model", "objective", "optimizer", "scheduler", "validation")
    }
    data = {key: config["data"].get(key) for key in _DATA_KEYS}
    content = {
        "version": VERSION,
        **nodes,
        "data": {**data, "hash": data_hash},
        "training": {"budget": _budget(config), "convention": config["training"].get("convention"), "steps": steps},
        "seed": config["seed"],
        "parent": config.get("ckpt_path"),
        "precision": _precision(config),
    }
    result: dict[str, Any] = canonical(content)
    return result


def _budget(config: Mapping[str, Any]) -> float | None:
    """The target FLOPs, or None where the steps were given instead, which win."""
    training = config["training"]
    return None if training.get("steps") is not None else training.get("budget")


def _precision(config: Mapping[str, Any]) -> str | None:
    """A precision that was asked for; ``auto`` is the device's business, as the device itself is."""
    precision = config.get("trainer", {}).get("precision")
    return None if precision == "auto" else precision


def cell_id(config: Mapping[str, Any], *, steps: int, data_hash: str | None) -> str:
    """A readable head and a content hash: ``mdm-170M-1e19-3f9ac21b``. Never parsed back."""
    budget = _budget(config)
    size = text.flops(float(budget)) if budget is not None else f"{steps}steps"
    objective = objective_info(config["objective"]["name"])
    head = f"{objective.id_head}-{config['model'].get('name', 'model')}-{size}"
    return f"{head}-{content_hash(identity(config, steps=steps, data_hash=data_hash))[:HASH_CHARS]}"
