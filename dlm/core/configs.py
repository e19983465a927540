"""Read configs/<group>/<choice>.yaml without Hydra.

Planning a thousand cells must not compose a thousand Hydra configs, which take 90 ms each. The groups that determine a
result therefore hold only plain values, with no interpolation except the data folder, so Hydra and this reader see the
same values.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dlm.core.errors import UserError, unknown
from dlm.core.paths import configs_dir

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """A YAML loader that reads 1e-3 as a number, as Hydra does; YAML 1.1 reads 1e-3 as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_yaml(path: Path) -> Any:
    """Read a YAML file. Raises UserError, which names the file, if the file cannot be read as YAML."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: it is not UTF-8 text ({error.reason})") from error
    return parse_yaml(text, str(path))


def load_mapping(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file. Raises UserError if the file is not a mapping of keys to values."""
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of keys to values")
    return content


def parse_yaml(text: str, source: str) -> Any:
    """Parse a YAML text. Raises UserError, which names the text ``source``, if the text is not valid YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


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
    return key, parse_yaml(value, f"{option} {word}")


def choices(group: str) -> list[str]:
    """Return the sorted names of the choices of one group."""
    return sorted(path.stem for path in (configs_dir() / group).glob("*.yaml"))


_load = functools.lru_cache(maxsize=4096)(load_mapping)


def load_choice(group: str, choice: str) -> dict[str, Any]:
    """Read one choice of a group, merged over the choices of the same group that its defaults list names.

    Raises UserError with the close matches for a choice that does not exist.
    """
    path = configs_dir() / group / f"{choice}.yaml"
    if not path.is_file():
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
