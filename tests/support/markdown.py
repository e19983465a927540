"""Extract links, inline code, commands, and code blocks from a Markdown page."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
HEADING = re.compile(r"^#+ (.*)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    def __str__(self) -> str:
        return self.path.name

    @property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def prose(self) -> str:
        """The text outside fenced code blocks."""
        return FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        """Return the contents of the fenced blocks in one language."""
        return [body for name, body in FENCE.findall(self.text) if name == language]

    def commands(self) -> list[list[str]]:
        """Return the words of every command: lines of shell blocks, and inline code that calls make, dlm or Python."""
        lines = [line for block in self.blocks("bash") for line in block.splitlines()]
        lines += [code for code in self.inline() if code.startswith(("make ", "dlm ", "python ", ".venv/bin/"))]
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def inline(self) -> list[str]:
        """Return all inline code, one string for each pair of backticks."""
        return [" ".join(code.split()) for code in CODE.findall(self.prose)]

    def links(self) -> list[str]:
        """Return the targets of all links that have no URL scheme."""
        return [target for target in LINK.findall(self.prose) if not re.match(r"[a-z]+:", target)]

    def anchors(self) -> set[str]:
        """Return the anchors that GitHub generates for the headings."""
        titles = [re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(self.prose)]
        return {title.replace(" ", "-") for title in titles}
