"""Make a dataclass from the plain values of a file, and say in words which value has another type than it must have.

Only dlm writes these files, but a crash, an editor or another person may have changed them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NewType, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from dlm.core.errors import UserError, shown
from dlm.core.files import numbered_lines, read_json

T = TypeVar("T")
Reader = Callable[[Any], Any]  # takes a value, and returns it as its type has it

Unsigned = NewType("Unsigned", int)  # of 64 bits, such as a part of a hash; it goes into no table
LARGEST_WHOLE = 2**63  # larger whole numbers fit neither into a table nor, beyond 308 digits, into a float


class MisfitError(ValueError):
    """A value has another type than it must have. The text names the value and the type.

    The name of the value is put together while the error goes up to the whole, because most values need no name.
    """

    def __init__(self, words: str, place: str = "") -> None:
        super().__init__(words)
        self.words, self.place, self.is_about_key = words, place, False

    def __str__(self) -> str:
        name = self.place.removeprefix(".") or "the content"
        return f"{'a key of ' if self.is_about_key else ''}{name} {self.words}"


def typed(kind: type[T], value: Any, name: str = "") -> T:
    """Return a value as its type has it: a dataclass for keys and values, a tuple for a list, an enum for a word.

    Args:
        kind: A dataclass, or another type that a field of a dataclass can have.
        value: The plain value, as JSON or YAML gives it. Keys that the dataclass does not have are left out.
        name: What the value is called in the error.

    Raises:
        MisfitError: The value or a part of it has another type, or a key is missing.
    """
    try:
        result: T = _reader(cast(Hashable, kind))(value)
    except MisfitError as error:
        error.place = name + error.place
        raise
    return result


def read_typed(path: Path, kind: type[T], *, what: str = "", otherwise: str = "restore or delete that file") -> T:
    """Read a dataclass from a JSON file.

    Args:
        path: The file.
        kind: The dataclass.
        what: What the file should be, for the message, such as 'plan'; '' for a file that only dlm reads.
        otherwise: What to do with another file, for the message.

    Raises:
        UserError: The file is no JSON, or a value in it has another type.
    """
    content = read_json(path)
    try:
        return typed(kind, content)
    except MisfitError as error:
        problem = f"is no {what}" if what else "is damaged"
        raise UserError(f"{path} {problem} ({error}): {otherwise}") from error


def read_log(path: Path, kind: type[T], *, otherwise: str) -> list[T]:
    """Read the rows of a log as dataclasses, oldest first; torn lines are left out, as a crash may leave one behind.

    Raises UserError, which names the line and ends with the advice ``otherwise``, if a value in it has another type.
    """
    rows = list[T]()
    for number, content in numbered_lines(path):
        try:
            rows.append(typed(kind, content))
        except MisfitError as error:
            raise UserError(f"{path}, line {number}, is damaged ({error}): {otherwise}") from error
    return rows


@functools.cache
def _reader(kind: Any) -> Reader:
    """Return the function that reads values of a type. One is made for each type, because plans hold many values."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in (Any, object):
        return lambda value: value
    if origin in (Union, types.UnionType):
        return _one_of(inner)
    if origin is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return _named(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    if kind in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return _mapping(*(inner or (str, Any)))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _sequence(tuple if origin is tuple else list, inner)
    return _plain(kind)


def _plain(kind: Any) -> Reader:
    words, fits = _PLAIN[kind]

    def read(value: Any) -> Any:
        if not fits(value):
            raise _misfit(value, words)
        return value

    return read


def _is_whole(value: Any) -> bool:
    return type(value) is int and -LARGEST_WHOLE <= value < LARGEST_WHOLE


def _is_number(value: Any) -> bool:
    return math.isfinite(value) if type(value) is float else _is_whole(value)


def _is_text(value: Any) -> bool:
    return type(value) is str and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


# The plain types: what they are called, and which values can also be written to a table and to a terminal.
_PLAIN: Mapping[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: type(value) is bool),
    int: ("a whole number", _is_whole),
    Unsigned: ("a whole number from 0 to 2**64 - 1", lambda value: type(value) is int and 0 <= value < 2**64),
    float: ("a finite number", _is_number),
    str: ("text", _is_text),
}


def _named(kind: Any) -> Reader:
    names = {one: one for one in get_args(kind)} or {one.value: one for one in kind}

    def read(value: Any) -> Any:
        if not isinstance(value, str | int) or value not in names:
            raise _misfit(value, f"one of {', '.join(map(str, names))}")
        return names[value]

    return read


def _one_of(options: Sequence[Any]) -> Reader:
    """Return the reader of a union such as `int | str | None`."""
    readers = [_reader(option) for option in options if option is not type(None)]
    may_be_null = len(readers) < len(options)

    def read(value: Any) -> Any:
        if value is None and may_be_null:
            return None
        *others, last = readers
        for reader in others:
            with contextlib.suppress(MisfitError):
                return reader(value)
        return last(value)

    return read


def _dataclass(kind: Any) -> Reader:
    hints = get_type_hints(kind)
    fields = [(one.name, _reader(hints[one.name]), _is_needed(one)) for one in dataclasses.fields(kind) if one.init]

    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _misfit(value, "keys with values")
        found: dict[str, Any] = {}
        for key, reader, is_needed in fields:
            if key in value:
                try:
                    found[key] = reader(value[key])
                except MisfitError as error:
                    error.place = f".{key}{error.place}"
                    raise
            elif is_needed:
                raise MisfitError("is missing", f".{key}")
        return kind(**found)

    return read


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _mapping(key_kind: Any, value_kind: Any) -> Reader:
    key_of, value_of = _reader(key_kind), _reader(value_kind)

    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _misfit(value, "keys with values")
        found = {}
        for key, item in value.items():
            try:
                name = key_of(key)
            except MisfitError as error:
                error.is_about_key = True
                raise
            try:
                found[name] = value_of(item)
            except MisfitError as error:
                error.place = f".{name}{error.place}"
                raise
        return found

    return read


def _sequence(make: type[Any], inner: Sequence[Any]) -> Reader:
    """Return the reader of a list or a tuple; a tuple without ... has one type for each of its values."""
    is_fixed = make is tuple and bool(inner) and inner[-1] is not ...
    readers = [_reader(one) for one in inner if one is not ...] or [_reader(Any)]

    def read(value: Any) -> Any:
        if not isinstance(value, list | tuple) or (is_fixed and len(value) != len(readers)):
            raise _misfit(value, f"a list of {len(readers)} values" if is_fixed else "a list")
        each = readers if is_fixed else readers * len(value)
        found = []
        for number, item in enumerate(value):
            try:
                found.append(each[number](item))
            except MisfitError as error:
                error.place = f"[{number}]{error.place}"
                raise
        return make(found)

    return read


def _misfit(value: Any, words: str) -> MisfitError:
    return MisfitError(f"is {shown(value)}, and must be {words}")
