"""No text from elsewhere reaches the terminal as a command to it, while dlm's own colours do."""

import contextlib
import io
import sys

import pytest
from rich.text import Text

from dlm.cli import entry, verbs
from dlm.core import signals, terminal


class Screen(io.StringIO):
    """What a terminal is sent."""

    def isatty(self):
        return True


@contextlib.contextmanager
def screen(monkeypatch):
    """Send to a ``Screen`` what is printed in this block."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = Screen()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        yield shown


def test_what_is_printed_is_shown(monkeypatch):
    with screen(monkeypatch) as sent:
        terminal.guard()
        terminal.guard()  # once is enough
        print("a\tb\x1b[2J\r\x9b1m", "\u202e\ud800")
        print("\x07", file=sys.stderr)
        assert sys.stdout.isatty()
    assert sent.getvalue() == "a\tb\\x1b[2J\\r\\x9b1m \\u202e\\ud800\n\\x07\n"


@pytest.mark.parametrize("is_guarded", [False, True])
def test_rich_keeps_its_colours_and_shows_those_of_a_name(monkeypatch, is_guarded):
    with screen(monkeypatch) as sent:
        if is_guarded:
            terminal.guard()
        out = terminal.console()
        out.print(Text("name \x1b[5m\x9b", style="green"))
        out.print("[bold]x[/] \x9b")
    shown = sent.getvalue()
    assert "\x1b[32mname \\x1b[5m\\x9b\x1b[0m" in shown and "\x1b[1mx\x1b[0m \\x9b" in shown
    assert "\x9b" not in shown and "\x1b[5m" not in shown


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        ("a\tb\r\nc\n", "a\tb\nc\n"),
        ("step 1\rstep 2\rstep 3\nend\n", "step 3\nend\n"),
        ("whole\nstep 1\rstep 2\r", "whole\nstep 2\n"),
        ("\x1b[1;34mwandb\x1b[0m: x\x1b]0;title\x07\x1b[2J\n", "wandb: x\\x1b]0;title\\x07\\x1b[2J\n"),
    ],
)
def test_a_log_is_shown_without_colours_and_with_the_last_state_of_a_bar(log, shown):
    assert terminal.shown_log(log) == shown


def test_a_long_line_of_a_log_is_shown_at_once():
    line = "x" * 1_000_000
    assert terminal.shown_log(line) == line


def test_the_command_guards_what_it_prints(monkeypatch):
    monkeypatch.setattr(signals, "exit_at_ctrl_c", lambda: None)
    monkeypatch.setattr(verbs, "main", lambda: print("\x1b[2J"))
    with screen(monkeypatch) as sent:
        entry.main()
    assert sent.getvalue() == "\\x1b[2J\n"
