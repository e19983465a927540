"""wandb_file: an offline run-<id>.wandb -> id, group, config, history, summary, exit code. Called by collect.

Read without wandb and without a server (W&B 0.31): a LevelDB log (7-byte file header, 32 KiB blocks, records of CRC32,
length and type) of protobuf messages, of which the few fields that matter are decoded here (wandb_internal.proto).
"""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.core.errors import UserError

BLOCK_BYTES = 32768


FILE_HEADER = b":W&B"


VERSION = b"\xe1\xbe\x00"  # what follows: a magic number, and version 0 of W&B 0.13 to 0.31


HEADER_BYTES = 7  # of the file, and of each record: CRC32 (4), length (2), type (1)


_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


# Field numbers of wandb_internal.proto.
_RECORD = {2: "history", 3: "summary", 5: "config", 17: "run", 18: "exit"}


_RUN_ID, _RUN_CONFIG, _RUN_GROUP, _EXIT_CODE = 1, 4, 6, 1


_ITEM_KEY, _ITEM_NESTED_KEY, _ITEM_JSON = 1, 2, 16


Fields = list[tuple[int, int | bytes]]


@dataclass(kw_only=True)
class WandbRun:
    """One run as its files tell it; ``history`` is in the order it was logged."""

    run_id: str | None = None
    group: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None  # None: the run never said that it ended
    state: str | None = None  # what a server says of it; None: read from files
    path: Path | None = None  # of its file, where it is one attempt
    version: str = ""  # of what a server has: changes when that does
    unread: str | None = None  # why a server's history could not be read
    warnings: list[str] = field(default_factory=list)

    @property
    def key(self) -> list[list[Any]]:
        """What tells a server's run that has changed from one that has not (history.Key); unread, it is asked again."""
        return [[self.version if self.unread is None else "unread", 0, 0]]

    @property
    def record(self) -> dict[str, Any]:
        """What dlm says of the run in its config (record.described); {} of a run that dlm did not launch."""
        record = self.config.get("record")
        return record if isinstance(record, dict) else {}


def read_wandb_file(path: Path) -> WandbRun:
    """Everything that can be read of ``path``. What is torn or corrupt is skipped, and named in ``warnings``.

    Raises UserError when it is no .wandb file at all.
    """
    data = path.read_bytes()
    if not FILE_HEADER.startswith(data[:4]) and not data.startswith(FILE_HEADER):
        raise UserError(f"{path} is no .wandb file: it does not begin with {FILE_HEADER.decode()}")
    if len(data) >= HEADER_BYTES and data[4:HEADER_BYTES] != VERSION:
        raise UserError(f"{path} is of another version of W&B's files ({data[4:HEADER_BYTES].hex()}): it was left out")
    run = WandbRun(path=path)
    if len(data) <= HEADER_BYTES:
        run.warnings.append(f"{path.name} holds nothing: the run was killed before W&B wrote to it")
    for message in _messages(data, run.warnings, path.name):
        try:
            _take(run, message)
        except (ValueError, IndexError) as error:  # its CRC was right, its content is not
            run.warnings.append(f"{path.name}: skipped a record that cannot be decoded ({error})")
    return run


def _messages(data: bytes, warnings: list[str], name: str) -> Iterator[bytes]:
    """The messages of a LevelDB log; after damage it goes on with the next block."""
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
            warnings.append(f"{name} is cut off at byte {offset}: the last record is missing")
            return
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
    if any(data[offset:]):
        warnings.append(f"{name} is cut off at byte {offset}: the last record is missing")


def _take(run: WandbRun, message: bytes) -> None:
    """Put one record into ``run``."""
    for number, value in _fields(message):
        kind = _RECORD.get(number)
        if kind is None or not isinstance(value, bytes):
            continue
        content = _fields(value)
        if kind == "history":
            run.history.append(_items(content))
        elif kind == "summary":
            run.summary |= _items(content)
        elif kind == "config":
            run.config |= _items(content)
        elif kind == "exit":
            run.exit_code = next((_signed(int(v)) for n, v in content if n == _EXIT_CODE and isinstance(v, int)), 0)
        elif kind == "run":
            _take_run(run, content)


def _take_run(run: WandbRun, content: Fields) -> None:
    for number, value in content:
        if not isinstance(value, bytes):
            continue
        if number == _RUN_ID:
            run.run_id = value.decode()
        elif number == _RUN_GROUP:
            run.group = value.decode()
        elif number == _RUN_CONFIG:
            run.config |= _items(_fields(value))


def _items(content: Fields) -> dict[str, Any]:
    """Key -> value of the items of a history row, summary or config (field 1 of each)."""
    items: dict[str, Any] = {}
    for number, value in content:
        if number != 1 or not isinstance(value, bytes):
            continue
        item = _fields(value)
        nested = [v.decode() for n, v in item if n == _ITEM_NESTED_KEY and isinstance(v, bytes)]
        keys = [v.decode() for n, v in item if n == _ITEM_KEY and isinstance(v, bytes)]
        texts = [v.decode() for n, v in item if n == _ITEM_JSON and isinstance(v, bytes)]
        key = ".".join(nested) or "".join(keys[:1])
        if key and texts:
            items[key] = json.loads(texts[0])
    return items


def _fields(message: bytes) -> Fields:
    """(field number, value) of a protobuf message; raises ValueError or IndexError on what is none."""
    fields: Fields = []
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == 0:
            value, position = _varint(message, position)
        elif wire in (1, 2, 5):
            length = {1: 8, 5: 4}.get(wire)
            if length is None:
                length, position = _varint(message, position)
            value, position = message[position : position + length], position + length
            if position > len(message):
                raise ValueError("a field runs over the end of its message")
        else:
            raise ValueError(f"wire type {wire}")
        fields.append((number, value))
    return fields


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _signed(value: int) -> int:
    """An int32 as protobuf writes it: below zero in two's complement of 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def wandb_files(run_dir: Path) -> list[Path]:
    """The .wandb files of a run directory, oldest attempt first (their folders are named by time)."""
    return sorted(run_dir.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.parent.name)


def config_in_wandb(run_dir: Path) -> dict[str, Any] | None:
    """The config in the newest of its .wandb files that holds that of this cell; the history is left unread."""
    for path in reversed(wandb_files(run_dir)):
        try:
            data = path.read_bytes()
        except OSError:  # named when the run is read (attempts_of)
            continue
        if data[:HEADER_BYTES] != FILE_HEADER + VERSION:
            continue
        run = WandbRun()
        for message in _messages(data, [], path.name):
            with contextlib.suppress(ValueError, IndexError):
                _take(run, message)
            if run.config.get("cell_id") == run_dir.name:
                return run.config
    return None


def read_wandb_run(
    run_dir: Path, run_id: str, *, accepts: Callable[[dict[str, Any]], bool] = lambda config: True
) -> WandbRun | None:
    """All attempts of a run as one: config and summary of the last, the rows of each in turn. None without a file.

    W&B's own step starts at 0 again in a resumed offline run, so rows are merged on the logged ``step`` (history).
    Beside attempts whose config ``accepts`` takes, those of another config are named and left out.
    """
    whole = WandbRun(run_id=run_id)
    parts = attempts_of(run_dir, whole)
    others = [part for part in parts if part.config and not accepts(part.config)]
    if len(others) < len(parts):
        parts = [part for part in parts if all(part is not other for other in others)]
        whole.warnings += [f"{part.path} is of another config: left out" for part in others]
    for part in parts:
        whole.group, whole.exit_code = part.group or whole.group, part.exit_code
        whole.config |= part.config
        whole.summary |= part.summary
        whole.history += part.history
    return whole if wandb_files(run_dir) else None


def attempts_of(run_dir: Path, whole: WandbRun) -> list[WandbRun]:
    """The attempts of ``whole`` in their order: by the number that each wrote down, for a clock may jump back.

    What cannot be read, or is of another run, is left out and named in its ``warnings``.
    """
    parts = []
    for path in wandb_files(run_dir):
        try:
            part = read_wandb_file(path)
        except (UserError, OSError) as error:
            whole.warnings.append(str(error))
            continue
        whole.warnings += part.warnings
        if part.run_id not in (None, whole.run_id):
            whole.warnings.append(f"{path} is of run {part.run_id}, not {whole.run_id}: left out")
            continue
        parts.append(part)
    parts = [part for part in parts if part.config or part.history]  # one that was killed at once tells no number
    if all(isinstance(part.record.get("attempt"), int) for part in parts):
        parts.sort(key=lambda part: int(part.record["attempt"]))
    return parts
