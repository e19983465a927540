"""documents: files and folders of text -> splits, units of work, documents. Called by build; no torch.

A unit is what one worker turns into packed files at a time: some small files, one file, or a slice of a large one.
Units depend on the sources alone, never on the workers.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dlm.core.errors import UserError
from dlm.core.files import read_json

KINDS = {
    ".jsonl": "jsonl", ".jsonl.zst": "zst", ".jsonl.gz": "gz", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text",
}  # fmt: skip


UNIT_BYTES, SMALL_UNIT_BYTES = 32 * 1024 * 1024, 1024 * 1024  # of source files


MANY_UNITS = 64  # enough to keep every core busy to the end


CHUNK_BYTES = 1024 * 1024


STATE = "state.json"  # of a folder written by datasets.save_to_disk


VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")  # the first of them that there is


_OF_SPLIT = re.compile(rf"({'|'.join(('train', *VALIDATION_NAMES))})(-\d+-of-\d+.*)?")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Files of one kind, or one file's bytes (jsonl), row groups (parquet) or record batches from start to stop."""

    split: str | None  # None: each document's own hash decides
    kind: str
    paths: tuple[str, ...]
    size: int  # bytes of the sources, for the progress
    start: int = 0
    stop: int | None = None


def kind_of(path: Path) -> str | None:
    """The kind of a source file by its name; None for what is no source."""
    return next((kind for suffix, kind in KINDS.items() if path.name.lower().endswith(suffix)), None)


def find_files(source: Path) -> list[Path]:
    """The files of text in a source, sorted. Raises UserError when there are none."""
    if not source.exists():
        raise UserError(f"{source} does not exist: give a file or folder of text")
    if source.is_file():
        if kind_of(source) is None:
            raise UserError(f"{source} is of no kind that dlm reads: {', '.join(KINDS)} or a folder of them")
        return [source]
    listed = {path for state in source.rglob(STATE) for path in _saved_files(state)}
    saved = {path.parent for path in listed}  # such a folder may hold a cache as well
    files = [
        path
        for path in sorted(source.rglob("*"), key=lambda path: path.relative_to(source).as_posix())
        if path.is_file() and (path in listed or (kind_of(path) is not None and path.parent not in saved))
    ]
    if not files:
        raise UserError(f"{source} holds no documents: no file of {', '.join(KINDS)}")
    return files


def _saved_files(state: Path) -> list[Path]:
    """The Arrow files of one split that datasets.save_to_disk wrote."""
    content = read_json(state)
    if not isinstance(content, dict) or "_data_files" not in content:
        return []
    if content.get("_indices_data_files"):
        raise UserError(
            f"{state.parent} has its rows in another order than its files: flatten_indices() and save again"
        )
    return [state.parent / item["filename"] for item in content["_data_files"]]


def split_of(path: Path, source: Path) -> str | None:
    """The split that a file's first folder or its own name states: train/..., train.jsonl, train-00000-of-00002..."""
    folders = path.relative_to(source).parts[:-1]
    for name in (*folders[:1], path.name.split(".")[0]):
        match = _OF_SPLIT.fullmatch(name)
        if match:
            return match[1]
    return None


def find_splits(sources: Sequence[Path], validation: Sequence[Path]) -> list[tuple[str | None, Path]]:
    """(split, file) of everything to be read; None where each document's own hash decides.

    Files named for validation win, then folders (or files) named train and validation within the sources.
    """
    files = [(split_of(path, source), path) for source in sources for path in find_files(source)]
    if validation:
        held_out = [("validation", path) for source in validation for path in find_files(source)]
        train = [("train", path) for split, path in files if split in (None, "train")]
        return [*held_out, *train]
    names = {split for split, _ in files}
    held = next((name for name in VALIDATION_NAMES if name in names), None)
    if "train" not in names or held is None:
        return [(None, path) for _, path in files]
    kept = {"train": "train", None: "train", held: "validation"}
    return sorted(((kept[split], path) for split, path in files if split in kept), key=lambda item: item[0] == "train")


def make_units(files: Sequence[tuple[str | None, Path]]) -> list[Unit]:
    """Units in the order of the files; neighbours of one kind are put together, large files are sliced."""
    sizes = [path.stat().st_size for _, path in files]
    limit = min(UNIT_BYTES, max(sum(sizes) // MANY_UNITS, SMALL_UNIT_BYTES))
    units: list[Unit] = []
    for (split, path), size in zip(files, sizes, strict=True):
        kind = kind_of(path)
        assert kind is not None
        last = units[-1] if units else None
        if size > limit and kind in _SLICERS:
            units += [
                Unit(split=split, kind=kind, paths=(str(path),), size=part, start=start, stop=stop)
                for start, stop, part in _SLICERS[kind](path, size, limit)
            ]
        elif last and last.stop is None and (last.split, last.kind) == (split, kind) and last.size + size <= limit:
            units[-1] = Unit(split=split, kind=kind, paths=(*last.paths, str(path)), size=last.size + size)
        else:
            units.append(Unit(split=split, kind=kind, paths=(str(path),), size=size))
    return units


def _slices_of_bytes(path: Path, size: int, limit: int) -> Iterator[tuple[int, int, int]]:
    for start in range(0, size, limit):
        stop = min(start + limit, size)
        yield start, stop, stop - start


def _slices_of_groups(path: Path, size: int, limit: int) -> Iterator[tuple[int, int, int]]:
    metadata = _parquet(path).metadata
    per_slice = max(metadata.num_row_groups * limit // size, 1)
    for start in range(0, metadata.num_row_groups, per_slice):
        stop = min(start + per_slice, metadata.num_row_groups)
        yield start, stop, size * (stop - start) // metadata.num_row_groups


_SLICERS = {"jsonl": _slices_of_bytes, "parquet": _slices_of_groups}


def read_unit(unit: Unit, text_key: str) -> Iterator[str]:
    """The documents of a unit in order. Raises UserError that names file and line for what is no document."""
    for path in map(Path, unit.paths):
        if unit.kind == "text":
            yield _read_text(path)
        elif unit.kind in ("parquet", "arrow"):
            yield from _read_table(path, unit, text_key)
        else:
            yield from _read_lines(path, unit, text_key)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out") from error


def _read_lines(path: Path, unit: Unit, text_key: str) -> Iterator[str]:
    with open(path, "rb") as raw:
        stream: Any = raw
        if unit.kind == "zst":
            stream = io.BufferedReader(_Zstd(raw, path), CHUNK_BYTES)
        elif unit.kind == "gz":
            stream = gzip.GzipFile(fileobj=raw)
        try:
            yield from _documents(stream, path, unit, text_key)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged or truncated ({error}): copy it again") from error


def _documents(stream: IO[bytes], path: Path, unit: Unit, text_key: str) -> Iterator[str]:
    """The documents of the lines that begin in the unit's bytes."""
    position = unit.start
    if position:
        stream.seek(position - 1)
        position += len(stream.readline()) - 1
    number = 0
    while unit.stop is None or position < unit.stop:
        line = stream.readline()
        if not line:
            return
        number += 1
        if not line.isspace():
            yield _document(line, text_key, _Place(path, number, unit.start))
        position += len(line)


@dataclass(frozen=True)
class _Place:
    """A line of a file, counted from the start of a slice; its number is worked out only for a complaint."""

    path: Path
    number: int
    start: int

    def __str__(self) -> str:
        if not self.start:
            return f"{self.path}:{self.number}"
        with open(self.path, "rb") as stream:
            before = stream.read(self.start - 1).count(b"\n")
            stream.readline()
        return f"{self.path}:{before + 1 + self.number}"


def _document(line: bytes, text_key: str, place: object) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{place} is not valid JSON ({error}): mend or remove that line") from error
    if not isinstance(row, dict):
        raise UserError(f"{place} is no JSON object: every line must be one, with the text under --text-key")
    if text_key not in row:
        raise UserError(f"{place} has no key '{text_key}': it has {', '.join(row) or 'none'}; set --text-key")
    return _checked(row[text_key], text_key, place)


def _checked(text: Any, text_key: str, place: object) -> str:
    if not isinstance(text, str):
        raise UserError(f"{place}: '{text_key}' is {str(text)[:40]!r}, no text: mend that row or set --text-key")
    return text


class _Zstd(io.RawIOBase):
    """The content of a zstd file. zstandard's own reader takes a truncated file for a whole one."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        import zstandard

        self._new, self._error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._raw, self._path = raw, path
        self._frame: Any = None
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = self._raw.read(CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise UserError(f"{self._path} is truncated: copy it again")
                return 0
            self._left = self._decompress(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        parts = []
        try:
            while chunk:  # a file may hold several frames
                self._frame = self._frame or self._new()
                parts.append(self._frame.decompress(chunk))
                chunk = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        except self._error as error:
            raise UserError(f"{self._path} is no zstd file or damaged ({error}): copy it again") from error
        return b"".join(parts)


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is no parquet file or damaged ({_one_line(error)}): copy it again") from error


def _read_table(path: Path, unit: Unit, text_key: str) -> Iterator[str]:
    import pyarrow as pa

    row = 0
    try:
        for batch in _batches(path, unit, text_key):
            for text in batch.column(text_key).to_pylist():
                row += 1
                yield _checked(text, text_key, f"{path} row {row}{_since(unit)}")
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged ({_one_line(error)}): copy it again") from error


def _since(unit: Unit) -> str:
    return f" from row group {unit.start} on" if unit.start else ""


def _batches(path: Path, unit: Unit, text_key: str) -> Iterator[Any]:
    import pyarrow as pa

    if unit.kind == "parquet":
        file = _parquet(path)
        _check_column(path, file.schema_arrow.names, text_key)
        groups = range(unit.start, file.metadata.num_row_groups if unit.stop is None else unit.stop)
        yield from file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_key], use_threads=False)
        return
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_stream(source)
        _check_column(path, reader.schema.names, text_key)
        yield from reader


def _check_column(path: Path, names: Sequence[str], text_key: str) -> None:
    if text_key not in names:
        raise UserError(f"{path} has no column '{text_key}': it has {', '.join(names)}; set --text-key")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
