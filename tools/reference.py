"""Write the pages of docs/ that repeat what the code says, from the code; with --check, compare them only.

The keys of a definition come from SweepSpec and the docstrings of its fields, the config keys from the files of
configs/ and their comments, the commands from typer and argparse, and the public names of Python from the faces of
the rooms.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from reference_keys import config_keys, sweep_keys
from reference_text import code, table

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MADE = "<!-- `make docs` writes this page: tools/reference.py says from what. Change that instead. -->"
ROOMS = ("plan", "record", "data", "collect", "fit", "report", "submit")  # the rooms whose faces are for Python
# Public names of files that are no faces.
FURTHER = {"dlm.fit.predict": ("predict", "Prediction"), "dlm.fit.profile": ("profile", "Profile"),
           "dlm.convert": ("load_model", "read_weights")}  # fmt: skip


def pages() -> dict[str, str]:
    """Return the names of the pages and their contents."""
    made = {"sweep_keys": sweep_keys(), "config_keys": config_keys(), "commands": commands(), "api": python_names()}
    return {f"{name}.md": f"{MADE}\n\n{text.strip()}\n" for name, text in made.items()}


# The commands ---------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Return the page of the verbs of `dlm` and their options."""
    import typer

    from dlm.cli.verbs import app

    command: Any = typer.main.get_command(app)
    sections = [
        "# Commands",
        "`dlm VERB --help` shows the same. [files.md](files.md#exit-codes) lists the exit codes.",
        table(("before the verb", "meaning"), option_rows(command.params)),
    ]
    for name, verb in command.commands.items():
        if not verb.hidden:
            own = own_parser(name)
            given = [verb.help or "", *(parser_sections(own) if own else [parameters(verb.params)])]
            sections += [f"## dlm {name}", *(plain(text) for text in given if text)]
    sections += ["## python -m dlm.launch", launch_text()]
    return "\n\n".join(sections)


def launch_text() -> str:
    """Return what there is to say of the entry point of one run."""
    return (
        "`python -m dlm.launch [-m] [--rerun] KEY=VALUE ...` trains one run; with `-m`, one for every combination of "
        "the values. [config_keys.md](config_keys.md) lists the keys, and [training.md](training.md) explains them."
    )


def own_parser(verb: str) -> argparse.ArgumentParser | None:
    """Return the parser of a verb that has its own."""
    modules = {"prepare": "dlm.data.prepare.command", "convert": "dlm.convert"}
    return importlib.import_module(modules[verb])._parser() if verb in modules else None


def plain(text: str) -> str:
    """Return a help text without rich's marks, its paragraphs kept."""
    unmarked = re.sub(r"\[/?(?:bold|dim|italic)?\]", "", inspect.cleandoc(text))
    return unmarked.replace("\b\n", "")


def parameters(params: Iterable[Any]) -> str:
    """Return the table of the arguments and options of a verb."""
    return table(("argument or option", "meaning"), option_rows(params))


def option_rows(params: Iterable[Any]) -> Iterator[list[str]]:
    """Yield name and meaning of each parameter of typer."""
    for param in params:
        if getattr(param, "hidden", False) or param.name == "help":
            continue
        if param.param_type_name == "argument":
            shown = param.name.upper()
            yield [code(shown if param.required else f"[{shown}]"), plain(param.help or "")]
            continue
        if param.name in ("install_completion", "show_completion"):
            yield [code(param.opts[0]), plain(param.help or "")]
            continue
        is_switch = getattr(param, "is_flag", False)
        value = "" if is_switch else f" {param.metavar or 'VALUE'}"
        names = ", ".join([*param.opts, *param.secondary_opts])
        default = param.default() if callable(param.default) else param.default
        says = "" if is_switch or default in (None, (), []) else f" Default: {code(default)}."
        says = " Required." if param.required else says
        yield [code(f"{names}{value}"), plain(param.help or "") + says]


def parser_sections(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the tables of a parser of argparse, and of each of its kinds."""
    kinds = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not kinds:
        yield table(("argument or option", "meaning"), map(action_row, parser_actions(parser)))
    for action in kinds:
        helps = {choice.dest: choice.help for choice in action._choices_actions}
        for name, kind in action.choices.items():
            yield f"### {parser.prog} {name}"
            yield kind.description or f"{helps[name]}."
            yield table(("argument or option", "meaning"), map(action_row, parser_actions(kind)))


def parser_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments and options of a parser but --help."""
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def action_row(action: argparse.Action) -> list[str]:
    """Return name and meaning of an argument or option of argparse."""
    value = str(action.metavar or action.dest.upper())
    if not action.option_strings:
        name = value if action.nargs != "?" else f"[{value}]"
    else:
        name = ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")
    text = (action.help or "").rstrip(".")
    return [code(name), f"{text}{'; required' if action.required and action.option_strings else ''}"]


# The public names of Python -------------------------------------------------------------------------------------------


def python_names() -> str:
    """Return the page of the public names, which mkdocstrings fills from their docstrings."""
    sections = [
        "# Python",
        "Everything that is meant to be imported. A room is imported in an instant; what it needs is loaded when a "
        "name is used. [fitting.md](fitting.md#in-python) begins with an example.",
    ]
    for module, names in public_names().items():
        sections += [f"## {module}", first_line(module), *(f"::: {module}.{name}" for name in names)]
    return "\n\n".join(sections)


def public_names() -> dict[str, list[str]]:
    """Return the public names by the module from which they are imported."""
    rooms = {
        f"dlm.{room}": sorted(importlib.import_module(f"dlm.{room}").__all__, key=lambda one: (one.lower(), one))
        for room in ROOMS
    }
    table_names = importlib.import_module("dlm.fit.table").__all__
    return {**rooms, "dlm.fit.table": list(table_names), **{name: list(names) for name, names in FURTHER.items()}}


def first_line(module: str) -> str:
    """Return the first sentence of the docstring of a module."""
    return (importlib.import_module(module).__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or with --check say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    is_check = parser.parse_args(argv).check
    made = pages()
    stale = [name for name, text in made.items() if not (DOCS / name).exists() or (DOCS / name).read_text() != text]
    for name in stale:
        if is_check:
            print(f"docs/{name} is out of date: run python tools/reference.py", file=sys.stderr)
        else:
            (DOCS / name).write_text(made[name])
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
