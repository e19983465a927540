"""Check that a sweep definition, a plan and the file of a planned cell hold data only: nothing that Hydra carries out.

These files are passed around. Whoever starts a sweep decides which code runs, by dlm's configs and the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dlm.core.errors import UserError, hint, shown

# The groups that a cell chooses, and the other config keys that it may set.
GROUPS = ("model", "data", "objective", "optimizer", "scheduler", "trainer", "callbacks", "logger")
SETTABLE = (*GROUPS, "recipe", "training", "validation", "seed")
# The keys that the file of a planned cell has besides those.
OF_CELL_FILES = ("sweep", "planned_cell_id", "forecast", "role", "keep_steps", "parent", "branch_step")

# The keys of hydra.launcher that a definition may set: what a job requests. None of them names a command or a file.
RULE_KEYS = (
    "timeout_min", "nodes", "tasks_per_node", "gpus_per_node", "gpus_per_task", "cpus_per_task", "cpus_per_gpu",
    "mem_gb", "mem_per_cpu", "mem_per_gpu", "partition", "account", "qos", "constraint", "exclude", "nodelist",
    "exclusive", "gres", "wckey", "comment", "array_parallelism", "signal_delay_s", "max_num_timeout", "requeue",
)  # fmt: skip

# The name of a cell, or of a file of a group: no path, and nothing that Hydra reads in another way.
_NAME = re.compile(r"\w[\w.-]*")

# The keys by which Hydra makes objects, wherever they stand in a text.
_MAKES_OBJECTS = re.compile(r"(?<!\w)_(?:target|args|partial|recursive|convert)_(?!\w)")
_NAMES_PROGRAMS = re.compile(r"\W*hydra(?!\w)|logger\.settings(?!\w)")  # the keys of Hydra and of W&B's settings


def check_data(content: object, source: str) -> None:
    """Raise UserError, which names the file and the key, for a key or a text that Hydra would carry out.

    Args:
        content: Plain values.
        source: The name of their file.
    """
    for where, text in texts_in(content, ""):
        if found := _MAKES_OBJECTS.search(text):
            raise UserError(
                f"{source}: {where} has {found[0]}, which runs code, and this file may hold data only: give it on your "
                "own command line, --override KEY=VALUE, with --allow-target PKG for a class that is not dlm's"
            )
        if "${" in text:
            raise UserError(
                f"{source}: {where} has {shown(text)}, and this file may hold data only, no '${{': write the value "
                "itself, or give a key that decides no result on your own command line, --override KEY=VALUE"
            )


def check_settings(values: object, source: str) -> None:
    """Raise UserError for a key of Hydra, or of W&B's settings, among the config keys that a definition sets."""
    for key, _ in texts_in(values, ""):
        if _NAMES_PROGRAMS.match(key):
            raise UserError(
                f"{source}: {key} can name programs, files and servers, so a definition cannot set it: give it on your "
                f"own command line, --override {key}=... (another launcher: --launcher NAME)"
            )


def check_cell(groups: object, overrides: object, source: str, *, names: Iterable[str | None] = ()) -> None:
    """Raise UserError for the choices, config keys or names of a planned cell that no definition can give.

    Args:
        groups: Group -> choice.
        overrides: Config key -> value.
        source: The file that holds the cell.
        names: The id of the cell and the names in it that stand for files. Hydra would carry out some others.
    """
    for name in names:
        if name is not None and not _NAME.fullmatch(name):
            raise UserError(
                f"{source}: {shown(name)} is no name of a cell, a model or a run: allowed are letters, digits, '_', '.'"
                " and '-'"
            )
    if not isinstance(groups, Mapping) or not isinstance(overrides, Mapping):
        raise UserError(f"{source}: the groups and overrides of a cell must hold keys and values: plan again")
    for group, choice in groups.items():
        if group not in GROUPS or not _NAME.fullmatch(str(choice)):
            raise UserError(
                f"{source}: no cell chooses {group}: {shown(choice)}; allowed are the groups {_all(GROUPS)}"
            )
    check_settings(overrides, source)
    for key in overrides:
        if str(key).partition(".")[0] not in SETTABLE:
            raise UserError(f"{source}: no cell sets {key}: allowed are {_all(SETTABLE)}")
    check_data(overrides, source)


def check_cell_file(content: Mapping[str, Any], source: str) -> None:
    """Raise UserError for the file of a planned cell that holds something which dlm does not write there."""
    groups: dict[str, object] = {}
    for item in content.get("defaults") or ():
        for name, choice in item.items() if isinstance(item, Mapping) else [(item, None)]:
            groups[str(name).removeprefix("override /")] = choice
    own = {key: value for key, value in content.items() if key != "defaults" and key not in OF_CELL_FILES}
    check_cell(groups, own, source)
    check_data({key: content[key] for key in OF_CELL_FILES if key in content}, source)


def check_rule(keys: Iterable[object], source: str) -> None:
    """Raise UserError for a key of hydra.launcher that a rule of a definition cannot set."""
    for key in keys:
        if key not in RULE_KEYS:
            near = hint(key, RULE_KEYS, otherwise="")
            raise UserError(
                f"{source}launcher.set.{key}: {near + ' ' if near else ''}a definition may set what a job requests "
                f"({_all(RULE_KEYS)}); other keys belong in a file of configs/hydra/launcher (--launcher NAME) or on "
                f"your own command line, --override hydra.launcher.{key}=..."
            )


def texts_in(node: object, where: str) -> Iterator[tuple[str, str]]:
    """Yield every key and every text, each with the dotted key where it stands."""
    if isinstance(node, str):
        yield where, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            place = f"{where}.{key}" if where else str(key)
            yield place, str(key)
            if not isinstance(value, int | float):
                yield from texts_in(value, place)
    elif isinstance(node, list | tuple):
        for item in node:
            yield from texts_in(item, where)


def _all(names: Iterable[str]) -> str:
    return ", ".join(names)
