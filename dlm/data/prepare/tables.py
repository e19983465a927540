"""Read the documents of Parquet, Arrow and Feather files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dlm.data.prepare.bad import Bad, Report, naming_damage, text_of, unreadable

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
ARROW_FILE = b"ARROW1"  # an Arrow file begins with these bytes, an Arrow stream does not


def read_parquet(
    path: Path, text_key: str, report: Report, *, start: int = 0, stop: int | None = None
) -> Iterator[str]:
    """Yield the texts of the row groups from ``start`` up to ``stop``, or up to the end."""
    file = _open_parquet(path)
    _check_column(path, file.schema_arrow.names, text_key)
    groups = range(start, file.metadata.num_row_groups if stop is None else stop)
    batches = file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_key], use_threads=False)
    yield from _texts(path, batches, text_key, report, f" from row group {start} on" if start else "")


def read_arrow(path: Path, text_key: str, report: Report) -> Iterator[str]:
    """Yield the texts of an Arrow file, an Arrow stream, as `datasets` writes it, or a Feather file."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _check_column(path, reader.schema.names, text_key)
        batches = (reader.get_batch(k) for k in range(reader.num_record_batches)) if is_file else iter(reader)
        yield from _texts(path, _valid(batches), text_key, report)
        if not is_file:
            end = source.tell()
            source.seek(max(end - len(END_OF_STREAM), 0))
            if source.read(len(END_OF_STREAM)) != END_OF_STREAM or source.read().strip(b"\0"):
                raise unreadable(path, "has no mark at the end of its stream, so it is damaged", "copy it again")


def _valid(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches of an Arrow file. Raises ArrowInvalid for values that lie outside of the file."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def num_row_groups(path: Path) -> int:
    """Return the number of row groups of a Parquet file. Raises UnreadableError if it is damaged."""
    with naming_damage(path, ".parquet"):
        return int(_open_parquet(path).metadata.num_row_groups)


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, memory_map=True)


def _check_column(path: Path, names: Sequence[str], text_key: str) -> None:
    if text_key not in names:
        raise unreadable(path, f"has no column '{text_key}': it has {', '.join(names)}", "set --text-key")
    if names.count(text_key) > 1:
        raise unreadable(path, f"has {names.count(text_key)} columns '{text_key}'", "rename all but one of them")


def _texts(path: Path, batches: Iterator[Any], text_key: str, report: Report, since: str = "") -> Iterator[str]:
    row = 0
    for batch in batches:
        column = batch.column(text_key)
        try:
            values = column.to_pylist()
        except UnicodeDecodeError:  # some value is not UTF-8: find out which
            values = [_value(scalar) for scalar in column]
        for value in values:
            row += 1
            where = f"{path} row {row}{since}"
            if isinstance(value, UnicodeDecodeError):
                report(Bad(where=where, what=f"is not UTF-8 text (byte {value.start})"))
            elif (text := text_of(value, text_key, where, report)) is not None:
                yield text


def _value(scalar: Any) -> object:
    """Return the value of an Arrow scalar, or the error that it raises."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
