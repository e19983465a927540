"""Say what is wrong with a row or a file that holds no text, so that it can be refused or left out by name."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dlm.core.errors import UserError, shown

MIB = 1024 * 1024
MAX_DOCUMENT = 256  # MiB, the default of --max-document


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A row without text, or a file of which the rest cannot be read."""

    where: str  # the file and, if it is one row, the row
    what: str
    advice: str = "correct or remove that row"
    is_file: bool = False

    def __str__(self) -> str:
        return f"{self.where} {self.what}"


Report = Callable[[Bad], None]  # what to do with a bad row or file: raise an error, or note it and return


class UnreadableError(Exception):
    """The rest of a file cannot be read."""

    def __init__(self, bad: Bad) -> None:
        super().__init__(str(bad))
        self.bad = bad


def refuse(bad: Bad) -> None:
    """Raise the UserError for a bad row or file that must not be left out."""
    option = "go on without it with --skip-unreadable" if bad.is_file else "leave out such rows with --skip-bad N"
    raise UserError(f"{bad}: {bad.advice}, or {option}")


def unreadable(path: Path, what: str, advice: str = "copy it again") -> UnreadableError:
    """Return the error for a file of which the rest cannot be read."""
    return UnreadableError(Bad(where=str(path), what=what, advice=advice, is_file=True))


def too_long(where: object, limit: int) -> Bad:
    """Describe a row that is longer than ``limit`` bytes, the value of --max-document."""
    what = f"is longer than {limit / MIB:g} MiB, which is --max-document"
    return Bad(where=str(where), what=what, advice="raise --max-document, correct or remove that row")


def text_of(value: object, text_key: str, where: object, report: Report) -> str | None:
    """Return the text of a row; report the row and return None if the value is no text."""
    if not isinstance(value, str):
        advice = "correct that row, set --text-key"
        report(Bad(where=f"{where}:", what=f"'{text_key}' is {shown(value)}, no text", advice=advice))
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        report(Bad(where=str(where), what=f"holds {half}, one half of a surrogate pair, which is no character"))
        return None
    return value


@contextlib.contextmanager
def naming_damage(path: Path, kind: str) -> Iterator[None]:
    """Convert the errors that reading a damaged or unreadable file raises to UnreadableError."""
    import pyarrow as pa
    import zstandard

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, SystemError, zlib.error, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno:
            raise unreadable(path, f"cannot be read ({error.strerror})") from error
        said = " ".join(str(error).split())
        raise unreadable(path, f"is damaged or no {kind} file ({said})", "copy it again") from error
