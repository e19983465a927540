"""Names and other text from elsewhere (a server, a config, a log): show them, name files after them, keep them in CSV.

Such text may hold anything. It must neither command a terminal nor a spreadsheet, and never lead out of a folder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from dlm.core.errors import UserError, shown

# What a terminal or a reader of text obeys instead of showing it: the control characters (C0, DEL, C1), the breaks of
# lines and paragraphs, the marks that change the direction of writing, and halves of surrogate pairs.
_CONTROL = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_OBEYED = re.compile(f"[{_CONTROL}]")
_OBEYED_IN_LINES = re.compile(rf"(?![\n\t])[{_CONTROL}]")


def printable(words: object) -> str:
    r"""Return text from elsewhere in one line that shows what it holds: an escape character becomes ``\x1b``."""
    return _OBEYED.sub(_escaped, str(words))


def printable_lines(words: str) -> str:
    """Do as ``printable`` does, but keep line breaks and tabs."""
    return _OBEYED_IN_LINES.sub(_escaped, words)


def is_one_line(words: str) -> bool:
    """Whether a text is one line without control characters, so that ``printable`` leaves it as it is."""
    return _OBEYED.search(words) is None


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()


_DIGITS_OF_A_SLUG = 16  # hexadecimal; with 8, two names with one slug would be found in minutes
_PLAIN = re.compile(r"[a-z0-9][a-z0-9_]*(?:[.-][a-z0-9_]+)*")
_MOST_OF_A_SLUG = 60
_MOST_BYTES = 255  # of the name of a file


def slug(name: str, *, reserved: Collection[str] = ()) -> str:
    """Return a name for a file, or an id in HTML, that no other name has, not even where case does not count.

    A short name of small letters, digits and '_', with single '-' or '.' between them, stays as it is. Any other name
    loses its other characters and gets a hash of the whole.

    Args:
        name: A name from a server, a config or a log.
        reserved: Names that have another meaning there.
    """
    looks_hashed = re.search(rf"-[0-9a-f]{{{_DIGITS_OF_A_SLUG}}}$", name)  # another name may have this slug
    if _PLAIN.fullmatch(name) and len(name) <= _MOST_OF_A_SLUG and not looks_hashed and name not in reserved:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS_OF_A_SLUG]
    words = re.findall("[a-z0-9_]+", name.lower())
    return "-".join(["-".join(words)[:_MOST_OF_A_SLUG].rstrip("-") or "name", digest])


def inside(folder: Path, *parts: str) -> Path:
    """Return a path in ``folder`` of which no name may change, because the file is known by it, as a run by its id.

    Raises UserError for a part that is not the name of one file.
    """
    for name in parts:
        is_step = name in ("", ".", "..") or "/" in name or "\0" in name
        if is_step or encodable(name) != name or len(name.encode()) > _MOST_BYTES:
            raise UserError(f"{shown('/'.join(parts))} cannot be the name of a file in {folder}")
    return folder.joinpath(*parts)


def encodable(words: str) -> str:
    """Return text that can be written and put into a table: halves of surrogate pairs, as JSON may hold, are shown."""
    return words.encode("utf-8", "backslashreplace").decode()


_READ_AS_MISSING = (
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
)  # by pandas  # fmt: skip


def as_cell(words: str) -> str:
    """Return text for a cell of a CSV file, with a leading ' if a program would read something else than this text.

    A spreadsheet reads text that begins with = + - @ as a formula; pandas reads numbers, truth values and missing ones.
    ``from_cell`` takes the ' away.
    """
    return f"'{words}" if _is_misread(words.lstrip("'")) else words


def from_cell(cell: str) -> str:
    """Return the text of a cell that ``as_cell`` wrote. Other cells stay as they are."""
    return cell[1:] if cell.startswith("'") and _is_misread(cell.lstrip("'")) else cell


def _is_misread(words: str) -> bool:
    if words.startswith(("=", "+", "-", "@", "\t", "\r")) or words in _READ_AS_MISSING:
        return True
    try:
        float(words)
    except ValueError:
        return words.lower() in ("true", "false")
    return True
