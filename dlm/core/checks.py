"""Check the values of a config and name the key behind a wrong one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dlm.core import schedule
from dlm.core.errors import UserError, unknown

# What every key that decides a result must lie between; a bound that is None is open.
RANGES: dict[str, tuple[float, float]] = {
    "optimizer.lr": (1e-12, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.momentum": (0, 0.99999),
    "scheduler.warmup_fraction": (0, 1),
    "scheduler.warmup_min_steps": (0, math.inf),
    "scheduler.min_ratio": (0, 1),
    "scheduler.decay_fraction": (1e-6, 1),
    "objective.eps": (1e-9, 0.999),
    "callbacks.record.spike": (0, math.inf),
}


NAMES = {
    "recipe": ("smdm", "power_law"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.decay": ("all", "matrices"),
    "scheduler.name": tuple(schedule.SHAPES),
    "objective.weight": ("elbo", "low_var", "realised_fraction"),
    "validation.estimator": ("mc", "exact_count"),
}


WHOLE = {
    "seed": 0,
    "validation.seed": 0,
    "validation.num_sequences": 1,
    "validation.draws": 2,  # one draw has no standard error
    "validation.times": 1,
    "data.stride": 1,
    "trainer.threads": 1,
    "callbacks.checkpoint.times": 1,
    "callbacks.checkpoint.every_n_steps": 1,
    "callbacks.checkpoint.save_top_k": 0,
}


SWITCHES = ("trainer.compile", "trainer.activation_checkpointing")


def check_values(config: Mapping[str, Any]) -> None:
    """Raise UserError for a value that no run can use, with its key and what is allowed."""
    for key, (low, high) in RANGES.items():
        value = _at(config, key)
        if value is not None and not (_is_number(value) and low <= value <= high):
            top = f"to {high:g}" if math.isfinite(high) else "up"
            raise UserError(f"{key} is {value!r}: it must be a number from {low:g} {top}")
    for key, minimum in WHOLE.items():
        value = _at(config, key)
        if value is not None:
            whole(key, value, minimum)
    for key, allowed in NAMES.items():
        name = _at(config, key)
        if name is not None and name not in allowed:
            raise unknown(key, name, allowed)
    for key in SWITCHES:
        value = _at(config, key)
        if value is not None and not isinstance(value, bool):  # "no" and 1 would both be taken for true
            raise UserError(f"{key} is {value!r}: allowed are true and false")


def _at(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole(key: str, value: object, minimum: int = 1) -> int:
    """``value`` as a whole number of at least ``minimum``; UserError naming ``key`` otherwise."""
    if not _is_number(value) or value != int(value) or value < minimum:  # type: ignore[call-overload, operator]
        raise UserError(f"{key} is {value!r}: it must be a whole number of at least {minimum}")
    return int(value)  # type: ignore[call-overload, no-any-return]
