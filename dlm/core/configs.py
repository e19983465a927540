"""Read YAML files, and configs/<group>/<choice>.yaml without Hydra.

Planning a thousand cells must not compose a thousand Hydra configs, which take 90 ms each. The groups that determine a
result therefore hold only plain values, with no interpolation except the data folder, so Hydra and this reader see the
same values.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dlm.core.errors import UserError, shown, unknown
from dlm.core.limits import check_extent, read_limited
from dlm.core.paths import configs_dir

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"


class _Loader(_Base):  # type: ignore[misc]
    """A YAML loader that reads each word as Hydra does: 1e-3 is a number and 2024-01-01 is text, unlike in YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"^[-+]?[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)

# Numbers that YAML 1.1 reads in base 8 or 60, which nobody means: 010 is 8, and 24:00:00 is 86400.
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")

# (a part of what YAML says, what to do)
_ADVICE = (
    ("mapping values are not allowed", "put a text that contains ': ' in quotes"),
    ("found another document", "a file may hold one document: leave out what stands from the second --- on"),
    ("could not determine a constructor", "leave out the tag, the word that begins with '!'"),
    (
        "cannot start any token",
        "indent with spaces instead of tabs, and put a text that begins with @, % or ` in quotes",
    ),
    ("could not find expected ':'", "write a key as KEY: VALUE, with a space after the colon"),
    ("did not find expected key", "give the keys of one level the same indent, and close every quote and bracket"),
    ("found duplicate key", "OmegaConf cannot merge a mapping that changes a key which it merges: write the keys out"),
    ("unhashable key", "a key must be a word"),
)


def load_yaml(path: Path) -> Any:
    """Read a YAML file. Raises UserError, which names the file, for a file that ``parse_yaml`` refuses."""
    try:
        content = read_limited(path)
        return parse_yaml(content.decode("utf-8"), str(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}, is not UTF-8 text: save the file as UTF-8") from error


def load_mapping(path: Path, *, may_be_empty: bool = False) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Raises UserError if the file is not a mapping of keys to values, nor an empty file that ``may_be_empty``.
    """
    content = load_yaml(path)
    if content is None and may_be_empty:
        return {}
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds {'a list' if isinstance(content, list) else 'one value'}"
        raise UserError(f"{path} {what}: it must hold keys and values, KEY: VALUE")
    return content


def parse_yaml(text: str, source: str) -> Any:
    """Parse a YAML text.

    Raises:
        UserError: The text is not valid YAML or too large (``dlm.core.limits``), a key stands twice in one mapping, or
            a number is in base 8 or 60. The message names the text ``source`` and the lines.
    """
    try:
        check_extent(yaml.parse(text, Loader=_Loader), source)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node, source, {})
            return _constructed(loader, node, source)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UserError(f"{source}{yaml_problem(error)}") from error


def _constructed(loader: Any, node: yaml.Node, source: str) -> Any:
    try:
        return loader.construct_document(node)
    except (ValueError, KeyError, AttributeError) as error:  # what PyYAML raises for !!int foo, !!bool x, !!timestamp x
        raise UserError(f"{source}: a value does not fit its tag, such as !!int: leave out the tag") from error


def yaml_problem(error: yaml.YAMLError) -> str:
    """Say in one line where a YAML text is wrong, and what to do; to be put after the name of the text."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    words = (getattr(error, name, None) for name in ("problem", "context", "reason"))
    said = next(filter(None, words), str(error)).removeprefix("but ")
    where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1},"
    advice = next((f": {advice}" for part, advice in _ADVICE if part in said), "")
    return f"{where} is not valid YAML: {said}{advice}"


def _check_node(node: yaml.Node, source: str, is_open: dict[int, bool]) -> None:
    """Raise UserError for what YAML would read without a word: a key twice, a number in base 8 or 60, an endless alias.

    ``is_open`` holds the nodes that were looked at, by id: True for those that contain this one.
    """
    if id(node) in is_open:  # an alias
        if is_open[id(node)]:
            line = node.start_mark.line + 1
            raise UserError(f"{source}, line {line}: what begins here contains an alias of itself: write it out")
        return
    is_open[id(node)] = True
    if isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in first:
                    lines = f"lines {first[name]} and {line}" if line != first[name] else f"line {line}, twice"
                    raise UserError(f"{source} has the key {shown(key.value)} in {lines}: keep one of them")
                first[name] = line
            _check_node(value, source, is_open)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item, source, is_open)
    elif node.tag in (f"{_TAG}int", f"{_TAG}float") and _OTHER_BASE.fullmatch(node.value):
        read = yaml.load(node.value, Loader=_Loader)
        if ":" in node.value or read != int(node.value.replace("_", "")):  # 07 is 7 in either base
            line = node.start_mark.line + 1
            raise UserError(f"{source}, line {line}: YAML reads {node.value} as {read}: write the number in base 10")
    is_open[id(node)] = False


def parse_setting(word: str, option: str, *, otherwise: str = "write it as KEY=VALUE") -> tuple[str, Any]:
    """Split a KEY=VALUE word into the key and the value, and parse the value as YAML.

    Args:
        word: The word that the user gave.
        option: The option that takes the word, for messages.
        otherwise: The advice in the message for a word of another form.

    Raises:
        UserError: The word does not have the form KEY=VALUE, or the value is not valid YAML.
    """
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"{option} {word}: {otherwise}")
    return key, parse_yaml(value, f"{option} {word if len(word) <= 200 else f'{word[:197]}...'}")


def choices(group: str) -> list[str]:
    """Return the sorted names of the choices of one group."""
    return sorted(path.stem for path in (configs_dir() / group).glob("*.yaml"))


_load = functools.lru_cache(maxsize=4096)(load_mapping)


def load_choice(group: str, choice: str) -> dict[str, Any]:
    """Read one choice of a group, merged over the choices of the same group that its defaults list names.

    Raises UserError with the close matches for a choice that does not exist.
    """
    path = configs_dir() / group / f"{choice}.yaml"
    if "/" in choice or not path.is_file():  # '../' would lead out of the folder of the group
        raise unknown(group, choice, choices(group))
    content = dict(_load(path))
    defaults = [name for name in content.pop("defaults", ()) if isinstance(name, str) and name != "_self_"]
    return functools.reduce(merge, (*(load_choice(group, name) for name in defaults), content), {})


def load_base() -> dict[str, Any]:
    """Return the plain values of configs/config.yaml: all except Hydra's own keys and interpolations."""
    base = _load(configs_dir() / "config.yaml")
    return {key: base[key] for key in ("recipe", "training", "validation", "seed")}


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested dicts: {"optimizer.lr": 1} -> {"optimizer": {"lr": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated with ``over``, with nested dicts merged as in Hydra. Neither argument is changed."""
    both = {
        key: merge(base[key], value) if isinstance(value, Mapping) and isinstance(base.get(key), Mapping) else value
        for key, value in over.items()
    }
    return {**base, **both}
