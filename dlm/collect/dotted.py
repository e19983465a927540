"""Look up a dotted name in the config, the summary or a history row of a run, however its writer nested it.

W&B shows ``{"train": {"opt": {"lr": 1}}}``, ``{"train.opt": {"lr": 1}}`` and ``{"train.opt.lr": 1}`` under one name,
train.opt.lr, so that name stands for all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dlm.core.errors import shown


class TwoValuesError(ValueError):
    """A name has several spellings in one dictionary, and their values differ."""


def look_up(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted name; None if no spelling has a value. Raises TwoValuesError."""
    if "." not in name:
        return values.get(name)
    found = spellings(values, name)
    first = next(found, None)
    for other in found:
        if other != first:
            raise TwoValuesError(f"two values of {name}, {shown(first)} and {shown(other)}")
    return first


def spellings(values: Any, name: str) -> Iterator[Any]:
    """Yield the values that the spellings of a dotted name have, without null."""
    if not isinstance(values, dict):
        return
    if values.get(name) is not None:
        yield values[name]
    for place, letter in enumerate(name):
        if letter == ".":
            yield from spellings(values.get(name[:place]), name[place + 1 :])


def dotted_names(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Yield the names in nested dictionaries, with dots between the levels."""
    for key, value in values.items():
        yield f"{before}{key}"
        if isinstance(value, dict):
            yield from dotted_names(value, f"{before}{key}.")
