"""Make the parts of the pages that tools/reference.py writes."""

from __future__ import annotations

import re
from collections.abc import Iterable


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def with_links(text: str) -> str:
    """Return a text in which the pages that it names, as in docs/sweeps.md, are links."""
    return re.sub(r"\bdocs/(\w+\.md(?:#[\w-]+)?)", lambda found: f"[{found[1].partition('#')[0]}]({found[1]})", text)


def code(text: object) -> str:
    """Return a text as inline code, or nothing for nothing."""
    return f"`{text}`" if str(text) else ""
