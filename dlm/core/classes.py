"""Decide which classes a config may name by ``_target_``: those on the list, and those that the user allows.

The list is that of dlm's own callbacks and its logger, and of Lightning's callbacks and loggers. ``--allow-target PKG``
on the command line adds a package or a class of the user's. dlm hands this on to the jobs of that command in the
environment variable DLM_ALLOW_TARGET; no file can add to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dlm.core.checks import ARGUMENTS
from dlm.core.errors import UserError, shown

VARIABLE, FLAG = "DLM_ALLOW_TARGET", "--allow-target"
OURS = tuple(name for name in ARGUMENTS if name.startswith("dlm."))
LIGHTNING = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers")
PLUGINS = "hydra_plugins"  # what Hydra itself makes; it accepts launchers and sweepers from this package only


def allowed() -> list[str]:
    """Return the packages and classes that the user allows."""
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def allow(names: Iterable[str]) -> None:
    """Allow packages or classes in this process and the processes that it starts.

    Raises UserError for a name that is no dotted name of Python.
    """
    given = list(names)
    for name in given:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name, flags=re.ASCII):
            raise UserError(f"{FLAG} {name}: give a package or a class, such as mylab or mylab.callbacks.Mine")
    if given:
        os.environ[VARIABLE] = ",".join(dict.fromkeys([*allowed(), *given]))


def environment() -> dict[str, str]:
    """Return the variable that tells jobs what the user allows; nothing if the user allows nothing."""
    return {VARIABLE: ",".join(allowed())} if allowed() else {}


def take_flags(words: Sequence[str]) -> list[str]:
    """Allow what the flags in a command line of Hydra name, and return the other words.

    Raises UserError for a flag without a name.
    """
    rest, given, left = list[str](), list[str](), iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name != FLAG:
            rest.append(word)
        else:
            given.append(value if equals else next(left, ""))
    allow(given)
    return rest


def is_within(name: str, packages: Iterable[str]) -> bool:
    """Whether a dotted name is one of the packages or classes, or in one of them."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_listed(name: str, also: Iterable[str] = ()) -> bool:
    """Whether a config may name this class. Its module must not be imported before that is known."""
    is_dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name, flags=re.ASCII) is not None
    return is_dotted and (name in OURS or is_within(name, [*LIGHTNING, *allowed(), *also]))


def check_classes(config: object, *, where: str = "", source: str = "", also: Iterable[str] = ()) -> None:
    """Raise UserError for a class that a config names and that is neither on the list nor allowed by the user.

    Args:
        config: Plain values; only what stands under ``_target_`` counts, at any depth.
        where: The key at which they stand.
        source: The file that holds them, for messages.
        also: Further packages that are allowed here.
    """
    for place, name in classes_in(config, where):
        if not isinstance(name, str) or not is_listed(name, also):
            raise not_allowed(place, name, source)


def not_allowed(place: str, name: object, source: str = "", because: str = "") -> UserError:
    """Return the error for a class that a config must not name."""
    return UserError(
        f"{source + ': ' if source else ''}{place} is {shown(name)}{because}: allowed are dlm's own callbacks and "
        f"logger ({OURS[0]}, ...) and those of {' and '.join(LIGHTNING)}; if you trust the code of another class, "
        f"start with {FLAG} and its package or name"
    )


def classes_in(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of each ``_target_`` that is not null, at any depth."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            place = f"{where}.{key}" if where else str(key)
            if key == "_target_" and value is not None:
                yield place, value
            yield from classes_in(value, place)
    elif isinstance(node, list | tuple):
        for item in node:
            yield from classes_in(item, where)


def check_override_classes(words: Iterable[str]) -> None:
    """Raise UserError for an override of the command line that names a class which is not allowed."""
    for word in words:
        for name in re.findall(r"""(?<!\w)_target_["']?\s*[=:]\s*["']?([\w.]+)""", word):
            if name != "null" and not is_listed(name, [PLUGINS]):
                raise not_allowed(f"--override {word}: _target_", name)
