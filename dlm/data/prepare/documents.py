"""Find text files in folders, divide them into units of work, and read the documents of a unit.

A unit is the work that a worker takes at a time: several small files, one file, or a slice of a large file. The units
depend on the source files alone, not on the number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
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


# Upper and lower bound of the limit on a unit's source bytes, which is the total size / MANY_UNITS.
UNIT_BYTES, SMALL_UNIT_BYTES = 32 * 1024 * 1024, 1024 * 1024


MANY_UNITS = 64  # enough units to keep every core busy until the end


CHUNK_BYTES = 1024 * 1024


SLICED = ("jsonl", "parquet")  # the kinds of files that can be read in part


STATE = "state.json"  # a file in every folder that datasets.save_to_disk writes


# Names of the validation split, in order of preference. Only the first name that exists in the sources is used.
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")


_OF_SPLIT = re.compile(rf"({'|'.join(('train', *VALIDATION_NAMES))})(-\d+-of-\d+.*)?")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A unit of work: files of one kind, or a slice of one file."""

    split: str | None  # None: the hash of each document decides
    kind: str
    paths: tuple[str, ...]
    size: int  # bytes of the sources, for the progress bar
    start: int = 0  # first byte (jsonl) or row group (parquet) of a slice
    stop: int | None = None  # end of a slice, exclusive; None: the unit is not a slice


def kind_of(path: Path) -> str | None:
    """Return the kind of a source file by the suffix of its name, or None if the file is not a source."""
    return next((kind for suffix, kind in KINDS.items() if path.name.lower().endswith(suffix)), None)


def find_files(source: Path) -> list[Path]:
    """Return the text files of ``source`` (a file or a folder), sorted by path. Raises UserError if there are none."""
    if not source.exists():
        raise UserError(f"{source} does not exist: give a file or folder of text")
    if source.is_file():
        if kind_of(source) is None:
            raise UserError(
                f"{source} is of a kind that dlm does not read: give {', '.join(KINDS)} or a folder of them"
            )
        return [source]
    listed = {path for state in source.rglob(STATE) for path in _saved_files(state)}
    saved = {path.parent for path in listed}  # these folders may also hold cache files, which are not sources
    files = [
        path
        for path in sorted(source.rglob("*"), key=lambda path: path.relative_to(source).as_posix())
        if path.is_file() and (path in listed or (kind_of(path) is not None and path.parent not in saved))
    ]
    if not files:
        raise UserError(f"{source} holds no documents: no file of {', '.join(KINDS)}")
    return files


def _saved_files(state: Path) -> list[Path]:
    """Return the Arrow files that a state.json of datasets.save_to_disk lists."""
    content = read_json(state)
    if not isinstance(content, dict) or "_data_files" not in content:
        return []
    if content.get("_indices_data_files"):
        raise UserError(
            f"{state.parent} keeps its rows in another order than its files: call flatten_indices() and save it again"
        )
    return [state.parent / item["filename"] for item in content["_data_files"]]


def split_of(path: Path, source: Path) -> str | None:
    """Return the split that a file is named after, or None.

    The name of its top-level folder in ``source`` takes precedence over the name of the file. Examples are
    train/a.jsonl, train.jsonl and train-00000-of-00002.parquet.
    """
    folders = path.relative_to(source).parts[:-1]
    for name in (*folders[:1], path.name.split(".")[0]):
        match = _OF_SPLIT.fullmatch(name)
        if match:
            return match[1]
    return None


def find_splits(sources: Sequence[Path], validation: Sequence[Path]) -> list[tuple[str | None, Path]]:
    """Assign every source file to a split.

    If ``validation`` is given, its files are held out. Otherwise folders or files in the sources that are named train
    and validation (or valid, val, dev, test) are the splits.

    Args:
        sources: Files and folders of text.
        validation: Files and folders whose documents are held out.

    Returns:
        (split, file), validation first. A split of None means that the hash of each document decides.
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
    """Divide files into units, in the order of the files.

    Consecutive small files of the same split and kind share a unit; large files are sliced.
    """
    sizes = [path.stat().st_size for _, path in files]
    limit = min(UNIT_BYTES, max(sum(sizes) // MANY_UNITS, SMALL_UNIT_BYTES))
    units: list[Unit] = []
    for (split, path), size in zip(files, sizes, strict=True):
        kind = kind_of(path)
        assert kind is not None
        unit = Unit(split=split, kind=kind, paths=(str(path),), size=size)
        last = units[-1] if units else None
        if size > limit and kind in SLICED:
            units += _slices(unit, limit)
        elif last and last.stop is None and (last.split, last.kind) == (split, kind) and last.size + size <= limit:
            units[-1] = dataclasses.replace(last, paths=last.paths + unit.paths, size=last.size + size)
        else:
            units.append(unit)
    return units


def _slices(unit: Unit, limit: int) -> Iterator[Unit]:
    """Slice the only file of ``unit``, by bytes or by row groups, into units of about ``limit`` bytes."""
    total = unit.size
    if unit.kind == "parquet":
        path = Path(unit.paths[0])
        with _refusing_damage(path, unit.kind):
            total = _open_parquet(path).metadata.num_row_groups
    step = max(total * limit // unit.size, 1)
    for start in range(0, total, step):
        stop = min(start + step, total)
        yield dataclasses.replace(unit, size=unit.size * (stop - start) // total, start=start, stop=stop)


def read_unit(unit: Unit, text_key: str) -> Iterator[str]:
    """Yield the documents of a unit in order.

    Raises:
        UserError: A line, row or file is not a valid document. The message names the file and the line or row.
    """
    read = {"text": _read_text, "parquet": _read_table, "arrow": _read_table}.get(unit.kind, _read_lines)
    for path in map(Path, unit.paths):
        with _refusing_damage(path, unit.kind):
            yield from read(path, unit, text_key)


def _read_text(path: Path, unit: Unit, text_key: str) -> Iterator[str]:
    try:
        yield path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out") from error


@contextlib.contextmanager
def _refusing_damage(path: Path, kind: str) -> Iterator[None]:
    """Convert the errors that reading a damaged or unreadable file raises to UserError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        said = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or no {kind} file ({said}): copy it again") from error


def _read_lines(path: Path, unit: Unit, text_key: str) -> Iterator[str]:
    """Yield the documents of the lines that begin within the byte range of the unit."""
    with _open_lines(path, unit.kind) as stream:
        position, number = unit.start, 0
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while (unit.stop is None or position < unit.stop) and (line := stream.readline()):
            number += 1
            if not line.isspace():
                yield _document(line, text_key, _Place(path, number, unit.start))
            position += len(line)


def _open_lines(path: Path, kind: str) -> IO[bytes]:
    if kind == "gz":  # Arrow refuses the zeros with which some tools fill up the last block of a gzip file
        return io.BufferedReader(gzip.open(path), CHUNK_BYTES)
    if kind != "zst":
        return open(path, "rb")
    import pyarrow as pa

    # Arrow reads all frames of a file and refuses a truncated file. The library zstandard accepts it as complete.
    stream = pa.input_stream(str(path), compression="zstd", buffer_size=CHUNK_BYTES)
    return io.BufferedReader(stream, CHUNK_BYTES)


@dataclass(frozen=True)
class _Place:
    """The position of a line. The line number within the file is computed only for an error message."""

    path: Path
    number: int  # line number within the slice, from 1
    start: int  # first byte of the slice

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
        raise UserError(f"{place} is not valid JSON ({error}): correct or remove that line") from error
    if not isinstance(row, dict):
        raise UserError(f"{place} is no JSON object: every line must be one, with the text under --text-key")
    if text_key not in row:
        raise UserError(f"{place} has no key '{text_key}': it has {', '.join(row) or 'none'}; set --text-key")
    return _checked(row[text_key], text_key, place)


def _checked(text: Any, text_key: str, place: object) -> str:
    if not isinstance(text, str):
        raise UserError(f"{place}: '{text_key}' is {str(text)[:40]!r}, no text: correct that row or set --text-key")
    return text


def _read_table(path: Path, unit: Unit, text_key: str) -> Iterator[str]:
    row = 0
    since = f" from row group {unit.start} on" if unit.start else ""
    for batch in _batches(path, unit, text_key):
        for text in batch.column(text_key).to_pylist():
            row += 1
            yield _checked(text, text_key, f"{path} row {row}{since}")


def _batches(path: Path, unit: Unit, text_key: str) -> Iterator[Any]:
    import pyarrow as pa

    if unit.kind == "parquet":
        file = _open_parquet(path)
        _check_column(path, file.schema_arrow.names, text_key)
        groups = range(unit.start, file.metadata.num_row_groups if unit.stop is None else unit.stop)
        yield from file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_key], use_threads=False)
        return
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_stream(source)
        _check_column(path, reader.schema.names, text_key)
        yield from reader


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, memory_map=True)


def _check_column(path: Path, names: Sequence[str], text_key: str) -> None:
    if text_key not in names:
        raise UserError(f"{path} has no column '{text_key}': it has {', '.join(names)}; set --text-key")
