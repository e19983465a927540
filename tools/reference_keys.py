"""Make the pages of the keys of a sweep definition and of the config keys, for tools/reference.py."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from reference_text import code, table, with_links

# The keys of a sweep definition ---------------------------------------------------------------------------------------


def sweep_keys() -> str:
    """Return the page of the keys of a sweep definition."""
    from dlm.plan import definition, rules

    spec = definition.SweepSpec
    schema = spec.model_json_schema()
    parts = {"hardware": definition.Hardware, "proof": rules.Proof, "replicates": rules.Replicates,
             "launcher": rules.LauncherRule, "tune": rules.Tune}  # fmt: skip
    if {cls.__name__ for cls in parts.values()} != set(schema["$defs"]):
        raise SystemExit(f"tools/reference.py: sweep_keys lists {list(parts)}, and SweepSpec has {[*schema['$defs']]}")
    sections = [
        "# The keys of a sweep definition",
        "[sweeps.md](sweeps.md) explains how definitions are used. `--set KEY=VALUE` changes a key on the command "
        "line, as in `--set hardware.mfu=0.3`.",
        key_table(spec, schema),
    ]
    for name, cls in parts.items():
        sections += [f"## {name}", inspect.cleandoc(cls.__doc__ or ""), key_table(cls, schema["$defs"][cls.__name__])]
    return "\n\n".join(sections)


def key_table(cls: type, schema: Mapping[str, Any]) -> str:
    """Return the table of the keys of one class: name, type, default and meaning."""
    texts = field_texts(cls)
    rows = [
        [code(name), type_in_words(one), default_in_words(name, one, schema), with_links(texts[name])]
        for name, one in schema["properties"].items()
    ]
    return table(("key", "type", "default", "meaning"), rows)


def field_texts(cls: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class."""
    (body,) = [node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef)]
    found: dict[str, str] = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            if not (isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)):
                raise SystemExit(f"{cls.__name__}.{field.target.id}: write a docstring below it that says what it does")
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def type_in_words(one: Mapping[str, Any]) -> str:
    """Return the type of a key, from its JSON schema."""
    if "anyOf" in one:
        return " or ".join(type_in_words(choice) for choice in one["anyOf"])
    if "enum" in one:
        return ", ".join(code(choice) for choice in one["enum"])
    if "$ref" in one:
        return "mapping"
    if one.get("type") == "array":
        if "prefixItems" in one:
            return f"list of {len(one['prefixItems'])} {plural(one['prefixItems'][0])}"
        return f"list of {plural(one['items'])}"
    if one.get("type") == "object":
        inner = one.get("additionalProperties")
        return f"mapping to {plural(inner)}" if isinstance(inner, dict) else "mapping to values"
    names = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    return names.get(one.get("type", "value"), one.get("type", "value")) + limits(one)


def plural(one: Mapping[str, Any]) -> str:
    """Return the type of the values of a list."""
    if "enum" in one:
        return type_in_words(one)
    if one.get("type") == "array":
        return f"lists of {plural(one['items'])}"
    names = {"string": "texts", "integer": "whole numbers", "number": "numbers"}
    return names.get(one.get("type", ""), "mappings" if "$ref" in one else "values") + limits(one)


def limits(one: Mapping[str, Any]) -> str:
    """Return the range of a number: ' (1 to 100)', ' (above 0)'."""
    low, high = one.get("ge"), one.get("le")
    if low is None:
        above = f"above {one['gt']:g}" if "gt" in one else ""
        return f" ({above}{f', at most {high:g}' if high is not None else ''})" if above else ""
    return f" (at least {low:g})" if high is None else f" ({low:g} to {high:.10g})"


def default_in_words(name: str, one: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return the default of a key as YAML would write it."""
    if name in schema.get("required", ()):
        return "required"
    value = one.get("default")
    if isinstance(value, float) and value == float("inf"):
        return "no limit"
    if isinstance(value, list) and any(isinstance(part, float) and not part.is_integer() for part in value):
        return code(f"[{', '.join(str(Fraction(part).limit_denominator(100)) for part in value)}]")
    if value is None and one.get("type") == "object":
        return code("{}")
    return code(in_yaml(value))


def in_yaml(value: object) -> str:
    """Return a value as YAML writes it in one line."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        value = int(value)
    if value == "":
        return '""'
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()


# The config keys ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigFile:
    """One file of configs/: what its first comment says, and its keys with their defaults and comments."""

    head: str
    keys: dict[str, tuple[str, str]]  # dotted key -> default, comment
    inherits: tuple[str, ...]


def config_keys() -> str:
    """Return the page of all keys of configs/."""
    from dlm.core.paths import configs_dir

    folder = configs_dir()
    groups = sorted({path.parent.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")} - {"."})
    sections = [
        "# Config keys",
        "Every key of a run, by group: a group is a folder of [configs/](../configs/config.yaml), and a file in it is "
        "a choice, as in `optimizer=muon`. A key of a group is changed as `GROUP.KEY=VALUE`, such as "
        "`optimizer.lr=1e-3`; the keys of config.yaml and of experiments need no group. [training.md](training.md) "
        "explains how they work together.",
        "## config.yaml",
        described(read_config(folder / "config.yaml")),
    ]
    for group in groups:
        sections.append(f"## {group}")
        files = {path.stem: read_config(path) for path in sorted((folder / group).glob("*.yaml"))}
        sections += [sizes(files)] if group == "model" else choices(group, files)
    return "\n\n".join(sections)


def choices(group: str, files: Mapping[str, ConfigFile]) -> Iterator[str]:
    """Yield the sections of a group: each choice, what it is, and its keys."""
    for name, file in files.items():
        yield f"### {group}={name}"
        yield described(file)


def described(file: ConfigFile) -> str:
    """Return the text of one file: its first comment, and the table of its keys."""
    base = (
        f"It has the keys of {' and '.join(code(name) for name in file.inherits)}, and these:" if file.inherits else ""
    )
    rows = [[code(key), code(default), with_links(text)] for key, (default, text) in file.keys.items()]
    return "\n\n".join(
        part for part in (with_links(file.head), base, table(("key", "default", "meaning"), rows)) if part
    )


def sizes(files: Mapping[str, ConfigFile]) -> str:
    """Return the section of the model group: the keys of all files, then a table of their values."""
    by_size = sorted(files.items(), key=lambda item: int(re.findall(r"N = ([\d,]+)", item[1].head)[0].replace(",", "")))
    keys = by_size[0][1].keys
    varied = [key for key in keys if len({file.keys[key][0] for file in files.values()}) > 1]
    meaning = [[code(key), code("") if key in varied else code(keys[key][0]), keys[key][1]] for key in keys]
    shapes = [[code(file.keys[key][0]) for key in varied] + [file.head.rstrip(".")] for _, file in by_size]
    return "\n\n".join([table(("key", "default", "meaning"), meaning), "The sizes:", table((*varied, "about"), shapes)])


def read_config(path: Path) -> ConfigFile:
    """Read a file of configs/ with its comments.

    The comment at the top of the file describes the file. Another comment belongs to the key on its line, or to the key
    below it.
    """
    text = path.read_text()
    lines = text.splitlines()
    nodes = list(leaves(yaml.compose(text)))
    top = 0
    while top < len(lines) and lines[top].startswith("#"):
        top += 1
    found: dict[str, tuple[str, str]] = {}
    inherits: list[str] = []
    for key, node in nodes:
        row = node.start_mark.line
        if key == "defaults":
            inherits = [name for name in yaml.safe_load(text)["defaults"] if isinstance(name, str) and name != "_self_"]
            continue
        above = row
        while above > top and lines[above - 1].lstrip().startswith("#"):
            above -= 1
        beside = lines[node.end_mark.line][node.end_mark.column :] if node.end_mark.line == row else ""
        said = [*lines[above:row], *([beside] if beside.lstrip().startswith("#") else [])]
        found[key] = (in_one_line(text[node.start_mark.index : node.end_mark.index]), comment(said))
    head = [line for line in lines[:top] if "@package" not in line]
    return ConfigFile(comment(head), found, tuple(inherits))


def leaves(node: yaml.MappingNode, above: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Yield the dotted keys of a YAML mapping and their nodes; a list, and a mapping in one line, is one value."""
    for key, value in node.value:
        name = f"{above}{key.value}"
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def in_one_line(text: str) -> str:
    """Return a value as the file has it, and a list over several lines in one."""
    parts = text.strip().splitlines()
    return f"[{', '.join(part.strip().removeprefix('- ') for part in parts)}]" if len(parts) > 1 else text.strip()


def comment(lines: Iterable[str]) -> str:
    """Return the text of comment lines."""
    return " ".join(re.sub(r"^\s*#\s?", "", line).strip() for line in lines)
