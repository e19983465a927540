"""Let no text from elsewhere command the terminal: what a `dlm` command prints passes through here.

rich prints past the guard, because it writes colours and progress bars; ``console`` guards the text that it is given.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

from dlm.core.names import printable_lines

if TYPE_CHECKING:
    from rich.console import Console

TABLE_WIDTH = 140  # of the output of rich that does not go to a terminal

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_OVERWRITTEN = re.compile(r"^[^\n]*\r(?=[^\n\r])", re.MULTILINE)


class _Guard(io.TextIOBase):
    """A stream of text that shows control characters, all except line breaks and tabs, and does not send them."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream  # rich writes to the stream of this name, if there is one

    @property
    def encoding(self) -> str:  # type: ignore[override]  # io.TextIOBase has a plain attribute
        return self.rich_proxied_file.encoding

    def write(self, words: str) -> int:
        self.rich_proxied_file.write(printable_lines(words))
        return len(words)

    def flush(self) -> None:
        self.rich_proxied_file.flush()

    def isatty(self) -> bool:
        return self.rich_proxied_file.isatty()

    def fileno(self) -> int:
        return self.rich_proxied_file.fileno()

    def writable(self) -> bool:
        return True


def guard() -> None:
    """Guard what this process prints from now on, its tracebacks included."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Guard):
            setattr(sys, name, _Guard(stream))


def console() -> Console:
    """Return a rich console for the standard output, with TABLE_WIDTH if that is not a terminal."""
    from rich.console import Console
    from rich.segment import Segment

    class Guarded(Console):
        def render(self, *given: Any, **how: Any) -> Iterable[Segment]:
            for part in super().render(*given, **how):
                yield part if part.control else Segment(printable_lines(part.text), part.style)

    stream = sys.stdout
    while hasattr(stream, "rich_proxied_file"):  # a guard, or rich's own while it shows a bar
        stream = stream.rich_proxied_file
    return Guarded(file=stream, width=None if stream.isatty() else TABLE_WIDTH, highlight=False)


def width() -> int | None:
    """Return the width of the terminal in columns of characters; None if the standard output is not a terminal.

    The variable COLUMNS overrides the width of a terminal, as it does for rich.
    """
    return console().width if sys.stdout.isatty() else None


def shown_log(part: str) -> str:
    """Return a part of a log in lines as a terminal shows it: without colours, and of a progress bar its last state.

    All other control characters are shown.
    """
    lines = _COLOUR.sub("", part).replace("\r\n", "\n")
    return printable_lines(_OVERWRITTEN.sub("", lines).replace("\r", "\n"))
