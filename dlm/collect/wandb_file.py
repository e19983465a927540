"""Read the run-<id>.wandb files of a run directory into a ``WandbRun``, without a W&B server.

A .wandb file (W&B 0.13 to 0.31) is a LevelDB log: a file header of 7 bytes, then blocks of 32 KiB. A block holds
records, each with a header of 7 bytes (CRC32, length, type). One or more records make up a message in protobuf format
(wandb_internal.proto). W&B's own reader stops at the first damaged byte; this reader continues with the next block.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.core.errors import UserError
from dlm.core.json_text import parse_json

BLOCK_BYTES = 32768
FILE_HEADER = b":W&B"
VERSION = b"\xe1\xbe\x00"  # follows FILE_HEADER: a magic number and version 0, which W&B 0.13 to 0.31 write
HEADER_BYTES = 7  # size of the file header and of each record header: CRC32 (4), length (2), type (1)
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4  # types of records


@dataclass(kw_only=True)
class WandbRun:
    """One run as W&B recorded it, in files or on a server."""

    run_id: str | None = None
    group: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # rows in the order in which they were logged
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None  # None: the run did not record its end
    state: str | None = None  # W&B's name of the state, from the server; None: the run was read from files
    path: Path | None = None  # the .wandb file, if this is a single attempt
    attempts: list[WandbRun] = field(default_factory=list)  # the attempts that this run was merged from
    version: str = ""  # the version of the run on a server, which changes when the run changes
    unread: str | None = None  # why the history on the server could not be read
    warnings: list[str] = field(default_factory=list)

    def key(self, reading: str | int = 0) -> list[list[Any]]:
        """Return a ``history.Key`` for the history on the server.

        Args:
            reading: An identifier of how the history is read, such as the hash of a mapping.

        Returns:
            A key that changes when the run or ``reading`` changes, or when the history could not be read.
        """
        return [[self.version if self.unread is None else "unread", reading, 0]]

    @property
    def record(self) -> dict[str, Any]:
        """The facts that ``record.wandb.described`` put into the config; {} for a run that dlm did not launch."""
        record = self.config.get("record")
        return record if isinstance(record, dict) else {}

    @property
    def data_hash(self) -> str | None:
        """The hash of the training data, if the run logged it to W&B; otherwise None."""
        data_hash = self.record.get("data_hash")
        return data_hash if isinstance(data_hash, str) else None


def read_wandb_file(path: Path) -> WandbRun:
    """Read everything that is intact in ``path``; ``warnings`` of the result name torn or corrupt parts.

    Raises:
        UserError: ``path`` is not a .wandb file, or its version is unknown.
        OSError: The file cannot be read.
    """
    data = path.read_bytes()
    if not FILE_HEADER.startswith(data[:4]):
        raise UserError(f"{path} is not a .wandb file: it does not begin with {FILE_HEADER.decode()}")
    if len(data) >= HEADER_BYTES and data[4:HEADER_BYTES] != VERSION:
        raise UserError(f"{path} has an unknown version of W&B's format ({data[4:HEADER_BYTES].hex()}): left out")
    run = WandbRun(path=path)
    if len(data) <= HEADER_BYTES:
        run.warnings.append(f"{path.name} holds nothing: the run was killed before W&B wrote to it")
    for message in read_messages(data, run.warnings, path.name):
        try:
            _add_message(run, message)
        except ValueError as error:  # the CRC is correct, but the content is not
            run.warnings.append(f"{path.name}: skipped a record that cannot be decoded ({error})")
    return run


def read_messages(data: bytes, warnings: list[str], name: str) -> Iterator[bytes]:
    """Yield the messages of a LevelDB log.

    A file that ends between two messages is not damaged: W&B flushes complete messages, so the file of a killed run can
    end there.

    Args:
        data: The content of the file.
        warnings: One line is appended for each damaged place. Reading continues with the block after this place.
        name: The name of the file, for the warnings.
    """
    offset, parts = HEADER_BYTES, list[bytes]()
    while offset + HEADER_BYTES <= len(data):
        block_left = BLOCK_BYTES - offset % BLOCK_BYTES
        if block_left < HEADER_BYTES:  # too short for a header: padding
            offset += block_left
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, offset)
        body = data[offset + HEADER_BYTES : offset + HEADER_BYTES + length]
        fits = HEADER_BYTES + length <= block_left  # a record never crosses a block
        if fits and offset + HEADER_BYTES + length > len(data):
            break
        if not fits or zlib.crc32(data[offset + 6 : offset + 7] + body) != crc:
            warnings.append(f"{name} is corrupt at byte {offset}: skipped the rest of that 32 KiB block")
            offset, parts = offset + block_left, []
            continue
        offset += HEADER_BYTES + length
        if kind in (_FULL, _FIRST):
            parts = []
        elif not parts:  # the beginning of this message was skipped
            continue
        parts.append(body)
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []
    block_left = -offset % BLOCK_BYTES
    if block_left < HEADER_BYTES:
        offset += block_left
    if parts or offset < len(data):
        warnings.append(f"{name} is cut off at byte {offset}: the last record is missing")


def _add_message(run: WandbRun, message: bytes) -> None:
    """Add the content of one message to ``run``. Raises ValueError when the message cannot be decoded."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    try:
        record = Record.FromString(message)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    kind = record.WhichOneof("record_type")
    if kind == "history":
        run.history.append(_values(record.history.item))
    elif kind == "summary":
        run.summary |= _values(record.summary.update)
    elif kind == "config":
        run.config |= _values(record.config.update)
    elif kind == "exit":
        run.exit_code = record.exit.exit_code
    elif kind == "run":
        run.run_id = record.run.run_id or run.run_id
        run.group = record.run.run_group or run.group
        run.config |= _values(record.run.config.update)


def _values(items: Iterable[Any]) -> dict[str, Any]:
    """Turn the items of a history row, a summary or a config into a dictionary."""
    keyed = ((".".join(item.nested_key) or item.key, item.value_json) for item in items)
    return {key: parse_json(text, finite=False) for key, text in keyed if key and text}


def wandb_files(run_dir: Path) -> list[Path]:
    """Return the .wandb files of a run directory, oldest attempt first (the folder names contain the time)."""
    return sorted(run_dir.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.parent.name)


def config_in_wandb(run_dir: Path) -> dict[str, Any] | None:
    """Return the config of this cell from the newest .wandb file that holds it; None if no file holds it."""
    for path in reversed(wandb_files(run_dir)):
        with contextlib.suppress(UserError, OSError):  # read_wandb_run adds a warning for this file
            config = read_wandb_file(path).config
            if config.get("cell_id") == run_dir.name:
                return config
    return None


def read_wandb_run(
    run_dir: Path, run_id: str, *, accepts: Callable[[WandbRun], bool] = lambda attempt: True
) -> WandbRun:
    """Merge all attempts of a run into one ``WandbRun``.

    Later values in config and summary replace earlier ones, and the rows of all attempts are concatenated. The
    attempts are ordered by their numbers rather than by time, because a clock may jump back. W&B's own step starts
    at 0 again in a resumed offline run, so ``history.from_rows`` merges the rows on the logged ``step``.

    Args:
        run_dir: The run directory.
        run_id: The id of the run in W&B.
        accepts: Returns whether an attempt belongs to this run. Rejected attempts are left out, unless all attempts
            are rejected.

    Returns:
        The run; it is empty if there is no file. Its ``warnings`` name files that cannot be read or are left out.
    """
    whole = WandbRun(run_id=run_id)
    attempts = [one for path in wandb_files(run_dir) if (one := _read_attempt(path, whole)) is not None]
    if all(isinstance(one.record.get("attempt"), int) for one in attempts):
        attempts.sort(key=lambda one: int(one.record["attempt"]))
    accepted = [one for one in attempts if not one.config or accepts(one)]
    whole.attempts = accepted or attempts
    whole.warnings += [f"{one.path} is of another config: left out" for one in attempts if one not in whole.attempts]
    for one in whole.attempts:
        whole.group, whole.exit_code = one.group or whole.group, one.exit_code
        whole.config |= one.config
        whole.summary |= one.summary
        whole.history += one.history
    return whole


def _read_attempt(path: Path, whole: WandbRun) -> WandbRun | None:
    """Read one attempt of the run ``whole``; None if it is empty or, with a warning, unreadable or of another run."""
    try:
        attempt = read_wandb_file(path)
    except (UserError, OSError) as error:
        whole.warnings.append(str(error))
        return None
    whole.warnings += attempt.warnings
    if attempt.run_id not in (None, whole.run_id):
        whole.warnings.append(f"{path} is of run {attempt.run_id}, not {whole.run_id}: left out")
        return None
    return attempt if attempt.config or attempt.history else None  # an attempt that was killed at once has no number
