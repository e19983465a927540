"""Write files atomically, and append to and read logs of JSON lines.

Sweep folders are on shared cluster file systems, so there is no database. A file is written completely under a
temporary name, flushed to disk and renamed; a log only grows by complete lines.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dlm.core import paths
from dlm.core.errors import UserError
from dlm.core.json_text import parse_json
from dlm.core.names import printable

OWNER_ONLY = 0o600  # the mode of a file that may hold a secret; the umask decides on all others
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # the numbers of an OSError when the disk is full or the quota is exhausted
# The numbers of an OSError while a network file system is away.
AWAY = (errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.ELOOP)  # something else is where a folder belongs
PATIENCE_SEC = 60.0
PROBE_BYTES = 4096  # what ``check_writable`` writes: a block, because very short files need none on some file systems

T = TypeVar("T")


def patiently(folder: Path, write: Callable[[], T], *, patience_sec: float = PATIENCE_SEC) -> T:
    """Call `write`, which writes into an existing `folder`, and try again while the file system of `folder` is away.

    A folder that is missing counts as away, so nothing is written to the empty folder of an unmounted file system.

    Raises:
        OSError: The file system was away for longer than `patience_sec`, or something else is wrong.
    """
    deadline = time.monotonic() + patience_sec
    while True:
        try:
            folder.stat()
            return write()
        except OSError as error:
            if error.errno not in AWAY or time.monotonic() >= deadline:
                raise
            time.sleep(0.5)


def complaint(error: BaseException) -> str | None:
    """Return the line with which a command ends after a mistake of the user; None for a bug of dlm."""
    line = explain_os_error(error) if isinstance(error, OSError) else None
    if isinstance(error, UserError):
        line = str(error)
    return None if line is None else printable(line)


def explain_os_error(error: OSError) -> str | None:
    """Describe in one line an error of the file system that the user can mend; None for any other error."""
    is_full = error.errno in DISK_FULL
    if is_full and not error.filename:  # a write to an open file does not name it
        return f"{_reason(error)}: make room, and run the same command again"
    if not error.filename or not isinstance(error.filename, str | os.PathLike):
        return None
    path = Path(error.filename)
    has_vanished = error.errno == errno.ENOENT and not path.absolute().parent.is_dir()
    in_the_way = next((one for one in (path, *path.parents) if os.path.lexists(one)), path)
    if error.errno in NO_FOLDER and not in_the_way.is_dir():
        return f"{in_the_way} is no folder, and one belongs there{_setting_of(path)}"
    if has_vanished:
        why = "its folder does not exist"
    elif error.errno in (*DENIED, *DISK_FULL) or (error.errno in AWAY and error.errno != errno.ENOENT):
        why = _reason(error)
    else:
        return None
    what_to_do = ": make room, and run the same command again" if is_full else ""
    return f"cannot read or write {path}: {why}{what_to_do}{_setting_of(path)}"


def _reason(error: OSError) -> str:
    return (error.strerror or "no reason given").lower()


def _setting_of(path: Path) -> str:
    """Return which environment variable names the folder that a path is in; '' if none does."""
    for variable, (_, purpose) in paths.FOLDERS.items():
        if path.absolute().is_relative_to(paths.named_folder(variable)):
            return f" ({variable} names {purpose})"
    return ""


def check_writable(folder: Path) -> None:
    """Raise UserError if nothing can be written to ``folder``, or where it would be made. Called before long work."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=place, buffering=0) as stream:  # os.access knows neither quotas nor full disks
            stream.write(bytes(PROBE_BYTES))
            os.fsync(stream.fileno())
    except OSError as error:
        error.filename = str(place)
        line = explain_os_error(error)
        if line is None:
            raise
        raise UserError(line) from error


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let an OSError name ``path``: an error of a full disk names no file, others may name the temporary one."""
    try:
        yield
    except OSError as error:
        is_unnamed = error.filename is None and error.errno in DISK_FULL
        if is_unnamed or (temporary is not None and error.filename == str(temporary)):
            error.filename = str(path)
        raise


def sync_directory(path: Path) -> None:
    """Flush the directory ``path`` to disk, which makes renames inside it durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_beside(path: Path) -> Path:
    """Return the name for a temporary file or folder that is to become ``path``.

    The name is random, so nobody can put a file or a link there before. The caller must create it anew: a folder by
    ``mkdir``, a file by ``write_through``, which uses this name.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


@contextlib.contextmanager
def write_through(path: Path, *, replaces: bool = True, mode: int = 0o666) -> Iterator[Path]:
    """Write ``path`` atomically: yield a temporary file, which becomes ``path`` at the end.

    A reader sees the old file or the new one, never a part of it. The umask limits ``mode``. Without ``replaces``,
    UserError is raised if ``path`` exists by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    with naming(path, temporary):
        # The umask decides who may read the file; tempfile would reserve it to its owner.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with naming(path, temporary):
            yield temporary
            os.fsync(handle)
            if replaces:
                os.replace(temporary, path)
            else:
                _link_new(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        os.close(handle)
    sync_directory(path.parent)


def _link_new(temporary: Path, path: Path) -> None:
    """Give a file its final name. Raises UserError if that name is taken, which a rename would not notice."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise UserError(f"{path} exists and is not overwritten: give another name or remove it") from error
    os.unlink(temporary)


def write_atomic(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write ``content`` to ``path`` atomically. The umask limits ``mode``."""
    with write_through(path, mode=mode) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_if_changed(path: Path, content: str) -> None:
    """Write ``content`` to ``path`` atomically, unless the file already has this content."""
    if not (path.is_file() and path.read_bytes() == content.encode()):
        write_atomic(path, content)


def dump_json(value: Any) -> str:
    """Format a value as JSON, with keys in order of insertion and an indent of two spaces.

    NaN raises ValueError; a missing value must be None, which becomes null.
    """
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any, *, mode: int = 0o666) -> None:
    """Write ``value`` as JSON to ``path`` atomically. The umask limits ``mode``."""
    write_atomic(path, dump_json(value), mode=mode)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError, which names the file, if the file is not valid JSON."""
    return json_of(path.read_bytes(), str(path))


def json_of(content: str | bytes, source: str) -> Any:
    """Read a JSON text that was found in the file ``source``. Raises UserError, which names the file, if it is none."""
    try:
        return parse_json(content)
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"{source} is not valid JSON ({error}): restore or delete that file") from error


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a log in a single write, so that lines of concurrent writers do not mix.

    If the log ends in an incomplete line, as after a crash, a line break is written first.
    """
    line = json.dumps(row, allow_nan=False) + "\n"
    with naming(path), open(path, "a+b", buffering=0) as stream:
        stream.seek(max(stream.seek(0, os.SEEK_END) - 1, 0))
        is_torn = stream.read(1) not in (b"", b"\n")
        stream.write((b"\n" if is_torn else b"") + line.encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, oldest first, without incomplete lines; an empty list if there is no log."""
    return [row for _, row in numbered_lines(path) if isinstance(row, dict)]


def numbered_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line of a log that is valid JSON. A crash may leave other lines behind."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            value = parse_json(line, finite=False)
        except ValueError:
            continue
        yield number, value
