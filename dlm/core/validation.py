"""Check the content of a YAML file against a pydantic model; a mistake is one line in the words of the file.

The words follow from the types of the model, not from pydantic's messages, which name its own classes and expressions.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dlm.core.errors import UserError, hint, shown, unknown

M = TypeVar("M", bound=BaseModel)

_BOUNDS = (("gt", "above {}"), ("ge", "of at least {}"), ("lt", "below {}"), ("le", "at most {}"))
_PLURALS = {float: "numbers", int: "whole numbers", str: "names"}


def validated(model: type[M], content: Mapping[str, Any], source: str) -> M:
    """Make a model from the content of a YAML file.

    Args:
        model: The class of the model.
        content: The keys and values of the file.
        source: The name of the file, for the message.

    Raises:
        UserError: Describes the first mistake. An unknown key comes before anything that is missing, which may be the
            key that was meant.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        first = min(mistakes, key=lambda mistake: mistake["type"] != "extra_forbidden")
        raise UserError(f"{source}: {_describe(model, content, first)}") from error


def _describe(model: type[BaseModel], content: Mapping[str, Any], mistake: Mapping[str, Any]) -> str:
    """Describe a mistake: the key, its value and what is allowed."""
    where, kind, value = tuple(mistake["loc"]), mistake["type"], mistake["input"]
    if kind == "missing" and isinstance(where[-1], int):  # a list that is too short
        where, kind = where[:-1], "too_short"
    *above, key = where
    if kind == "invalid_key" or key == "[key]":
        inside = name_of(above[:-1] if key == "[key]" else above, content)
        return f"the key {shown(value)}{f' of {inside}' if inside else ''} is not text: put it in quotes"
    name = name_of(where, content)
    if kind == "extra_forbidden":
        inside = name_of(above, content)
        return str(unknown(f"key of {inside}" if inside else "key", key, _type_at(model, above)[0].model_fields))
    must = f"it must {_predicate(*_type_at(model, where), value)}"
    if kind == "missing":
        return f"{name} is missing: {must}"
    if kind == "value_error":
        own = mistake["ctx"]["error"]
        return str(own) if isinstance(own, UserError) else f"{name} is {shown(value)}: {own}"
    return f"{name} is {shown(value)}: {must}"


def name_of(where: Sequence[str | int], content: Any) -> str:
    """Name a place as a user would: ('replicates', 1, 'runs') is 'runs in entry 2 of replicates'.

    The number of an entry is left out where the content has no list, which dlm reads as a list of one entry.
    """
    name, outer = "", ""
    for part in where:
        if isinstance(part, int):
            if isinstance(content, Sequence):
                name, outer = "", f"entry {part + 1} of {name}{f' in {outer}' if outer else ''}"
                content = content[part] if part < len(content) else None
            continue
        name = f"{name}.{part}" if name else str(part)
        content = content.get(part) if isinstance(content, Mapping) else None
    return " in ".join(filter(None, (name, outer)))


def _type_at(model: type[BaseModel], where: Sequence[str | int]) -> tuple[Any, tuple[Any, ...]]:
    """Return the type at a place of a model, and the constraints on its values."""
    kind: Any = model
    limits: tuple[Any, ...] = ()
    for part in where:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields[str(part)]
            kind, limits = field.annotation, tuple(field.metadata)
        else:  # the values of a mapping, or the entries of a list
            kind, limits = get_args(kind)[1 if get_origin(kind) is dict else 0], ()
        kind, limits = _bare(kind, limits)
    return kind, limits


def _bare(kind: Any, limits: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without Annotated and without None, and all constraints on its values."""
    while True:
        if get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            limits = (*limits, *more)
        elif get_origin(kind) in (Union, types.UnionType):
            kind = next(option for option in get_args(kind) if option is not type(None))
        else:
            plain = [item.metadata if isinstance(item, FieldInfo) else [item] for item in limits]
            return kind, tuple(item for items in plain for item in items)


def _predicate(kind: Any, limits: tuple[Any, ...], value: object) -> str:
    """Say what a value of a type must be: 'be a number above 0'."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        near = hint(value, map(str, inner), otherwise="") if isinstance(value, str) else ""
        *most, last = map(str, inner)
        return f"be {', '.join(most)} or {last}{f'; {near}' if near else ''}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"hold keys of these, with their values: {', '.join(kind.model_fields)}"
    if kind is bool:
        return "be true or false"
    if kind is str:
        return "be text" if value is None or isinstance(value, list | dict) else "be text, in quotes"
    if kind in (int, float):
        finite = "finite " if isinstance(value, float) and not math.isfinite(value) else ""
        ends = ((words, getattr(item, key, None)) for item in limits for key, words in _BOUNDS)
        bounds = " and ".join(
            words.format(end if isinstance(end, int) else f"{end:g}") for words, end in ends if end is not None
        )
        return f"be a {'whole ' if kind is int else finite}number {bounds}".rstrip()
    if origin is dict:
        return "hold keys and values, such as {KEY: VALUE}"
    if origin in (tuple, list):
        item = _bare(inner[0], ())[0]
        if origin is tuple and inner[-1] is not ...:
            return f"be a list of two {_PLURALS.get(item, 'values')}"
        least = " with at least one entry" if value == [] else ""
        return f"be a list of {_PLURALS.get(item, 'values')}{least}{_example(item, value)}"
    return "be text, a finite number, true, false, null, a list, or keys with values"


def _example(item: Any, value: object) -> str:
    """Show a value that stands alone as a list, if it could be an entry of the list."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    is_number = is_whole or (isinstance(value, float) and math.isfinite(value))
    is_word = isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None
    fits = is_word if item is str else is_number or (is_word and item is Any)
    return f", such as [{value}]" if fits and len(str(value)) <= 60 else ""
