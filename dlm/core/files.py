"""files: atomic writes, append-only JSON lines and leases. Used by every room that touches the disk.

Sweep directories live on shared cluster file systems, so there is no database: a file is written whole to a
temporary name, fsynced and renamed; a log only ever grows by whole lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlm.core.errors import UserError


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def write_through(path: Path) -> Iterator[Path]:
    """A temporary file to write what is to be ``path``: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        yield temporary
        os.fsync(handle)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        os.close(handle)
    sync_directory(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with write_through(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_if_changed(path: Path, content: str) -> bool:
    """``write_atomic``, unless the file already holds exactly that. True when it wrote."""
    if path.is_file() and path.read_text() == content:
        return False
    write_atomic(path, content)
    return True


def dump_json(value: Any) -> str:
    """JSON as dlm writes it: keys in order of insertion, two spaces, NaN refused (missing is null)."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically."""
    write_atomic(path, dump_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file; a torn or edited one is the user's to repair, so it is named in one line."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore or delete that file") from error


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one line in one write, so that concurrent writers and a crash cannot interleave lines."""
    line = json.dumps(row, allow_nan=False) + "\n"
    with open(path, "ab", buffering=0) as stream:
        stream.write(_line_break_if_torn(path) + line.encode())


def _line_break_if_torn(path: Path) -> bytes:
    """A newline where a crash left half a line at the end, so that the next line stands alone."""
    with open(path, "rb") as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return b""
        stream.seek(-1, os.SEEK_END)
        return b"" if stream.read(1) == b"\n" else b"\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line of an append-only log, oldest first; a half-written line is no row. [] when absent."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows
