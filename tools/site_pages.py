"""Complete the pages of docs/ for `make docs`: MkDocs calls these functions (mkdocs.yml, hooks).

README.md becomes the front page. Files outside docs/ that a page links to become pages too, so that every link of the
repository also works on the site: Markdown as it is, a notebook as its text and code, other text as code. A file that
is not text, such as a parquet table, is copied.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FRONT = "README.md"
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")  # no URL, and no anchor of the same page
FENCE = re.compile(r"^(`{3,}).*?^\1$", flags=re.MULTILINE | re.DOTALL)
WITH_LINKS = (".md", ".ipynb")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml"}


def on_config(config: MkDocsConfig) -> None:
    """Give Japanese headings anchors too, as GitHub does."""
    from markdown.extensions.toc import slugify_unicode

    config.mdx_configs["toc"]["slugify"] = slugify_unicode


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the front page, and a page for every file outside docs/ that a page links to, or a page that was added."""
    from mkdocs.structure.files import File, InclusionLevel

    left = [FRONT, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    known = set(left)
    while left:
        source = left.pop()
        if not source.startswith("docs/"):
            content = as_markdown(source) if is_text(source) else (ROOT / source).read_bytes()
            added = File.generated(config, page_of(source), content=content)
            if page_of(source).startswith("files/"):
                added.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(added)
        if source.endswith(WITH_LINKS):
            linked = {path for path in linked_files(as_markdown(source), source) if path not in known}
            known |= linked
            left += sorted(linked)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to the pages of the site."""
    sources = {page_of(FRONT): FRONT, **{name: name for name in top_pages()}}
    shown = page.file.src_uri
    if shown.startswith("files/"):
        source = shown.removeprefix("files/").removesuffix(".md")
    else:
        source = sources.get(shown, f"docs/{shown}")
    return with_site_links(markdown, source) if source.endswith(WITH_LINKS) else markdown


def top_pages() -> list[str]:
    """Return the Markdown files beside README.md, such as BENCHMARKS.md."""
    return [path.name for path in ROOT.glob("*.md") if path.name != FRONT]


def page_of(source: str) -> str:
    """Return the page of the site that shows a file of the repository, or its copy there, relative to docs/."""
    if source == FRONT:
        return "index.md"
    if source in top_pages():
        return source
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return f"files/{source}.md" if is_text(source) else f"files/{source}"


def is_text(source: str) -> bool:
    """Say whether a file of the repository can be shown as a page."""
    try:
        (ROOT / source).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def linked_files(text: str, source: str) -> list[str]:
    """Return the files of the repository that a page links to."""
    found = [target_of(match[2], source) for match in LINK.finditer(FENCE.sub("", text))]
    return [path for path in found if (ROOT / path).is_file()]


def target_of(link: str, source: str) -> str:
    """Return the path in the repository to which a link in a file of the repository leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def with_site_links(text: str, source: str) -> str:
    """Return the text of a page with every link to a file of the repository replaced by one to the page of the site."""

    def on_site(match: re.Match[str]) -> str:
        target = target_of(match[2], source)
        if not (ROOT / target).is_file():  # the build then complains of it
            return match[0]
        return f"{match[1]}{posixpath.relpath(page_of(target), posixpath.dirname(page_of(source)))}{match[3] or ''}"

    start, parts = 0, []
    for code in FENCE.finditer(text):
        parts += [LINK.sub(on_site, text[start : code.start()]), code[0]]
        start = code.end()
    return "".join([*parts, LINK.sub(on_site, text[start:])])


def as_markdown(source: str) -> str:
    """Return a file of the repository as a Markdown page."""
    text = (ROOT / source).read_text()
    if source.endswith(".md"):
        return text
    if source.endswith(".ipynb"):
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        parts = [body if kind == "markdown" else in_fence(body, "python") for kind, body in cells]
        return "\n\n".join([f"*The notebook {source}, without its figures.*", *parts])
    return f"# {source}\n\n{in_fence(text, LANGUAGES.get(Path(source).suffix, 'text'))}"


def in_fence(text: str, language: str) -> str:
    """Return a text as a fenced block of code."""
    return f"````{language}\n{text.rstrip()}\n````\n"
