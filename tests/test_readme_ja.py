"""README.ja.md is README.md in Japanese: commands, headings, links and tables are in step."""

import re
from itertools import zip_longest

import pytest
from support import ROOT
from support.markdown import FENCE, Page

ENGLISH, JAPANESE = Page(ROOT / "README.md"), Page(ROOT / "README.ja.md")


def code(page: Page) -> list[str]:
    return [line for _, block in FENCE.findall(page.text) for line in block.splitlines()]


def levels(page: Page) -> list[str]:
    """The mark of each heading, with the code in it."""
    return [f"{marks} {re.findall('`[^`]+`', title)}" for marks, title in re.findall(r"^(#+) (.*)$", page.prose, re.M)]


def links(page: Page) -> list[str]:
    """The target of each link to another page, in the order of the paragraphs and sorted within each of them.

    Left out are a page's link to the other language, and its links to its own headings, which are translated.
    """
    found = [sorted(re.findall(r"\]\(([^)#\s][^)\s]*)\)", part)) for part in page.prose.split("\n\n")]
    return [link for part in found for link in part if not link.startswith("README")]


def first_cells(page: Page) -> list[str]:
    """The first cell of each row of the tables below the line of dashes."""
    rows = re.findall(r"^\| ([^|]*) \|", page.prose, re.M)
    return [cell for cell in rows if "`" in cell or "](" in cell]


def names(page: Page) -> list[str]:
    """The inline code of each paragraph, sorted, since sentences are ordered otherwise in Japanese."""
    return [f"{' '.join(sorted(re.findall('`[^`]+`', part)))}" for part in page.prose.split("\n\n") if "`" in part]


def numbers(page: Page) -> list[str]:
    """The numbers in figures, sorted within each paragraph."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", page.prose)
    return [" ".join(sorted(re.findall(r"\d[\d.]*\d|\d", part))) for part in plain.split("\n\n")]


@pytest.mark.parametrize("part", [code, levels, links, first_cells, names, numbers])
def test_the_japanese_readme_is_in_step(part):
    for english, japanese in zip_longest(part(ENGLISH), part(JAPANESE)):
        assert english == japanese, f"README.md has {english!r} where README.ja.md has {japanese!r}: renew README.ja.md"


def test_each_page_links_the_other_and_the_japanese_one_only_its_own_headings():
    assert "README.ja.md" in ENGLISH.links() and "README.md" in JAPANESE.links()
    own = {link[1:] for link in JAPANESE.links() if link.startswith("#")}
    titles = {title.strip().replace(" ", "-").lower() for title in re.findall(r"^#+ (.*)$", JAPANESE.prose, re.M)}
    assert own and own <= titles
    assert len(own) == len({link for link in ENGLISH.links() if link.startswith("#")})
