"""README.ja.md is README.md in Japanese: its paragraphs, code, headings, links, tables and numbers are in step."""

import re
from dataclasses import dataclass
from itertools import zip_longest

from support import ROOT
from support.markdown import Page

ENGLISH, JAPANESE = Page(ROOT / "README.md"), Page(ROOT / "README.ja.md")
ITEM = re.compile(r"\d+\. |\* ")
TARGET = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Piece:
    """A paragraph, an item of a list, a heading, a row of a table, or a line of a code block, and where it begins."""

    line: int
    kind: str
    text: str

    def facts(self) -> dict[str, object]:
        """What both languages share; sorted, since a Japanese sentence has another order."""
        if self.kind == "line of code":
            return {"kind": self.kind, "text": self.text}
        plain = TARGET.sub("", re.sub(r"`[^`]*`", "", self.text))
        first_cell = self.text.split("|")[1].strip() if self.kind == "row of a table" else ""
        return {
            "kind": self.kind,
            "number of cells": self.text.count("|"),
            "first cell": first_cell if "`" in first_cell or "](" in first_cell else "",
            "links": sorted(map(without_language, TARGET.findall(self.text))),
            "code": sorted(re.findall(r"`[^`]+`", self.text)),
            "numbers": sorted(re.findall(r"\d[\d.]*\d|\d", plain)),
        }


def without_language(target: str) -> str:
    """Return a link as in either page: each links the other, and headings of its own in its own language."""
    return re.sub(r"^README(\.ja)?\.md$", "the other language", re.sub("^#.*", "an own heading", target))


def pieces(text: str) -> list[Piece]:
    found: list[Piece] = []
    in_code, continues = False, False
    for number, line in enumerate(text.splitlines(), start=1):
        fence = line.startswith("```")
        if fence or in_code:
            found.append(Piece(number, "line of code", line))
            in_code, continues = in_code != fence, False
        elif continues and line and not line.startswith("|") and not ITEM.match(line):
            found[-1] = Piece(found[-1].line, found[-1].kind, f"{found[-1].text} {line.strip()}")
        elif line:
            found.append(Piece(number, kind_of(line), line))
            continues = not line.startswith(("|", "#"))
        else:
            continues = False
    return found


def kind_of(line: str) -> str:
    if line.startswith("#"):
        return f"heading {line.split()[0]}"
    return "row of a table" if line.startswith("|") else "item of a list" if ITEM.match(line) else "paragraph"


def first_difference(english: str, japanese: str) -> str:
    """Return a message about the first pair of pieces that are out of step, or nothing."""
    nothing = Piece(0, "nothing", "nothing (the page ends)")
    for one, other in zip_longest(pieces(english), pieces(japanese), fillvalue=nothing):
        theirs = other.facts()
        differs = [f"{name}: {ours} and {theirs.get(name)}" for name, ours in one.facts().items()
                   if ours != theirs.get(name)]  # fmt: skip
        if differs:
            return (
                f"README.ja.md is out of step with README.md; change the Japanese page.\n"
                f"README.md:{one.line}: {one.text}\nREADME.ja.md:{other.line}: {other.text}\n"
                f"They differ in {'; '.join(differs)}"
            )
    return ""


def test_the_japanese_readme_is_in_step():
    difference = first_difference(ENGLISH.text, JAPANESE.text)
    assert not difference, difference


def test_a_difference_is_named_with_both_lines():
    """Each kind of change is seen. The page is compared with itself, so that README.md may change freely."""
    text = JAPANESE.text
    changes = {
        "make test\n": "make tests\n", "```python": "```", "## Weights": "### Weights", "(LICENSE)": "(LICENCE)",
        "`--rerun`": "`--again`", "95 %": "90 %", "| `make sweep` |": "| `make all` |", "\n\nGPU": "\n\nNew.\n\nGPU",
    }  # fmt: skip
    for before, after in changes.items():
        assert before in text
        changed = text.replace(before, after, 1)
        line = text[: text.index(before)].count("\n") + 1
        message = first_difference(text, changed)
        places = re.findall(r"^README(?:\.ja)?\.md:(\d+): ", message, flags=re.M)
        assert len(places) == 2 and line <= int(places[1]) <= line + 2, (before, message)


def test_each_page_links_the_other_and_only_its_own_headings():
    assert "README.ja.md" in ENGLISH.links() and "README.md" in JAPANESE.links()
    titles = re.findall(r"^#+ (.*)$", JAPANESE.prose, flags=re.M)
    own = {link[1:] for link in JAPANESE.links() if link.startswith("#")}
    assert own <= {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
