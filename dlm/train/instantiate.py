"""Make the callbacks and the logger that a config names, if their classes are allowed (dlm.core.classes)."""

from __future__ import annotations

from typing import Any

import hydra
from hydra._internal.utils import _locate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from dlm.core.classes import LIGHTNING, OURS, allowed, check_classes, classes_in, is_within, not_allowed
from dlm.core.data_only import texts_in
from dlm.core.errors import UserError, shown


def made(node: Any, where: str) -> Any:
    """Make the object that a config node describes, with the objects that it contains.

    Args:
        node: Plain values with ``_target_``.
        where: The key of the node, for messages.

    Raises:
        UserError: A class is not allowed, cannot be imported, or is another one than its name says.
    """
    check_classes(node, where=where)
    for place, name in classes_in(node, where):
        _check_what_it_is(place, name)
    for place, text in texts_in(node, where):
        if "${" in text:  # it was escaped; Hydra would resolve it now, after the classes have been checked
            raise UserError(f"{place} is {shown(text)}: an escaped '${{' is not allowed here; write the value itself")
    return hydra.utils.instantiate(node)


def _check_what_it_is(place: str, name: str) -> None:
    """Check the object that a name leads to: `PKG.os.system` has the name of a package and is a function of another."""
    try:
        found = _locate(name)  # as hydra.utils.get_object, which would print a line of its own
    except ImportError as error:
        raise UserError(f"{place} is {name!r}, which cannot be imported: {' '.join(str(error).split())}") from error
    is_class = isinstance(found, type)
    own = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    kind = type(found).__name__
    of_lightning = is_class and issubclass(found, Callback | Logger) and is_within(own, LIGHTNING)
    if not (of_lightning or (is_class and own in OURS) or is_within(own, allowed())):
        raise not_allowed(place, name, because=f", which is {own if is_class else f'no class but a {kind}'}")
