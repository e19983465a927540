"""Print tables and sentences at the width of the terminal. In a pipe, all columns are printed, in plain lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TextIO

from dlm.core import table, terminal
from dlm.core.names import printable
from dlm.record.outcomes import State

WORDS = ("cell", "state", "reason", "job", "role")  # left-aligned columns of text; all other columns hold numbers
COMMAND = "  dlm "  # a line that begins so is a command to copy
MANY_ROWS = 200  # a table with more rows is printed without colours, because rich takes long to write them
STATE_COLOURS = {
    State.DONE: "green",
    State.RUNNING: "cyan",
    State.SUBMITTED: "blue",
    State.PLANNED: "dim",
    State.PREEMPTED: "yellow",
}  # all other states are red
_STATES = "|".join(State)
_STATE = re.compile(rf"(?<=  )(?:{_STATES})(?=  |$)|(?<=state: )(?:{_STATES})\b", re.MULTILINE)


def show_table(rows: Sequence[Mapping[str, str]], *, expendable: Sequence[str] = (), whole: str) -> None:
    """Print a table whose column headings are the keys of the first row.

    Args:
        rows: The rows; the first column names a row.
        expendable: The columns that a narrow terminal lacks, the least important one first.
        whole: The command that prints all columns on any terminal.
    """
    width = terminal.width()
    layout = table.laid_out(_listed(rows), width, left=WORDS, expendable=expendable)
    if len(rows) > MANY_ROWS or width is None:
        print("\n".join(layout.lines))
    else:
        _print_coloured(layout)
    if layout.missing:
        say(f"the terminal is too narrow for {', '.join(layout.missing)}; `{whole}` has all columns")


def plain_lines(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the lines of a table including the column headings; columns of numbers are right-aligned."""
    return list(table.laid_out(_listed(rows), left=WORDS).lines)


def _listed(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    return [list(rows[0]), *([printable(row[head]) for head in rows[0]] for row in rows)]


def _print_coloured(layout: table.Layout) -> None:
    from rich.text import Text

    shown = Text("\n".join(layout.lines), no_wrap=True, end="\n")
    if layout.is_stacked:
        shown.highlight_regex(r"(?m)^\S.*$", "bold")
    else:
        shown.stylize("bold", 0, len(layout.lines[0]))
    shown.highlight_regex(_STATE, lambda state: STATE_COLOURS.get(State(state), "red"))
    terminal.console().print(shown, soft_wrap=True)


def say(*lines: str, to: TextIO | None = None) -> None:
    """Print lines, which may hold any text, broken between words at the width of the terminal.

    Args:
        lines: The lines. A pipe or a file gets each of them whole, and so does a terminal that of a command, which
            could not be copied otherwise.
        to: The stream; None: the standard output.
    """
    width = terminal.width(to)
    for line in lines:
        print(
            *table.wrapped(printable(line), None if line.startswith(COMMAND) else width), sep="\n", file=to, flush=True
        )
