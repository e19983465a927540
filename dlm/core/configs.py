"""groups: reads configs/<group>/<choice>.yaml without Hydra. Called by ladder, sweep and plan.

Planning a thousand cells must not compose a thousand Hydra configs (90 ms each). So the groups that decide a
result hold plain values only (no defaults list, no interpolation), and both Hydra and this reader see the same.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import yaml

from dlm.core.errors import UserError, unknown
from dlm.core.paths import configs_dir

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """YAML 1.1 reads 1e-3 as text; Hydra, and everyone who writes it, means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_yaml(path: Path) -> Any:
    """The content of a YAML file; a syntax error is one line that names file and place."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: it is no text in UTF-8 ({error.reason})") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; ``source`` names it in the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def choices(group: str) -> list[str]:
    """The names in one group, sorted."""
    return sorted(path.stem for path in (configs_dir() / group).glob("*.yaml"))


@functools.lru_cache(maxsize=4096)
def _load(path: Path) -> dict[str, Any]:
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of keys to values")
    return content


def load_choice(group: str, choice: str) -> dict[str, Any]:
    """One choice of a group as a new dict; an unknown choice is a UserError with the close matches."""
    path = configs_dir() / group / f"{choice}.yaml"
    if not path.is_file():
        raise unknown(group, choice, choices(group))
    return dict(_load(path))


def load_base() -> dict[str, Any]:
    """The plain values of configs/config.yaml: everything but Hydra's own keys and interpolations."""
    base = _load(configs_dir() / "config.yaml")
    return {key: base[key] for key in ("recipe", "training", "validation", "seed")}
