"""Read configs/<group>/<choice>.yaml without Hydra.

Planning a thousand cells must not compose a thousand Hydra configs, which take 90 ms each. The groups that decide a
result therefore hold plain values only, with no interpolation but that of the data folder, and both Hydra and this
reader see the same.
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
    """Reads 1e-3 as a number, as Hydra does. YAML 1.1 reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises UserError, which names the file and the place, for a file that is not YAML."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: it is not UTF-8 text ({error.reason})") from error
    return parse_yaml(text, str(path))


def load_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises UserError when it holds anything else."""
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of keys to values")
    return content


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text. Raises UserError, which calls the text ``source``, for text that is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def parse_setting(word: str, option: str, *, otherwise: str = "write it as KEY=VALUE") -> tuple[str, Any]:
    """The key of a KEY=VALUE word, and its value, which is read as YAML.

    Args:
        word: What the user wrote.
        option: The option that takes it, for messages.
        otherwise: What a word of another form is answered with, as a UserError.
    """
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"{option} {word}: {otherwise}")
    return key, parse_yaml(value, f"{option} {word}")


def choices(group: str) -> list[str]:
    """The names of the choices of one group, sorted."""
    return sorted(path.stem for path in (configs_dir() / group).glob("*.yaml"))


_load = functools.lru_cache(maxsize=4096)(load_mapping)


def load_choice(group: str, choice: str) -> dict[str, Any]:
    """One choice of a group, over the choices of the same group that its defaults list names.

    Raises UserError with the close matches for a choice that is not there.
    """
    path = configs_dir() / group / f"{choice}.yaml"
    if not path.is_file():
        raise unknown(group, choice, choices(group))
    content = dict(_load(path))
    defaults = [name for name in content.pop("defaults", ()) if isinstance(name, str) and name != "_self_"]
    return functools.reduce(merge, (*(load_choice(group, name) for name in defaults), content), {})


def load_base() -> dict[str, Any]:
    """The plain values of configs/config.yaml: everything but Hydra's own keys and interpolations."""
    base = _load(configs_dir() / "config.yaml")
    return {key: base[key] for key in ("recipe", "training", "validation", "seed")}


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested dicts: {"optimizer.lr": 1} -> {"optimizer": {"lr": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``, nested dicts merged as Hydra merges them; both stay as they are."""
    both = {
        key: merge(base[key], value) if isinstance(value, Mapping) and isinstance(base.get(key), Mapping) else value
        for key, value in over.items()
    }
    return {**base, **both}
