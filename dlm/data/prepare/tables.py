"""Read the documents of Parquet, Arrow and Feather files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dlm.data.prepare.bad import Bad, Report, naming_damage, text_of, too_long, unreadable

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
BATCH_ROWS = 1024
NEXT_INT = 0x15  # in Thrift's compact protocol: the next field is an int32
ARROW_FILE = b"ARROW1"  # an Arrow file begins with these bytes, an Arrow stream does not


def read_parquet(
    path: Path, text_key: str, report: Report, *, limit: int, start: int = 0, stop: int | None = None
) -> Iterator[str]:
    """Yield the texts of the row groups from ``start`` up to ``stop``, or up to the end."""
    file = _open_parquet(path)
    _check_column(path, file.schema_arrow.names, text_key)
    groups = range(start, file.metadata.num_row_groups if stop is None else stop)
    rows = min((_batch_rows(path, file.metadata.row_group(group), text_key, limit) for group in groups), default=1)
    batches = file.iter_batches(batch_size=rows, row_groups=groups, columns=[text_key], use_threads=False)
    yield from _texts(path, batches, text_key, report, limit, f" from row group {start} on" if start else "")


def _batch_rows(path: Path, group: Any, text_key: str, limit: int) -> int:
    """Return how many rows of a row group to decode at once, so that they take about ``limit`` bytes at most.

    A long text that a dictionary holds once may stand in every row, which the sizes in the file do not show.
    """
    columns = (group.column(k) for k in range(group.num_columns))
    column = next((column for column in columns if column.path_in_schema == text_key), None)
    if column is None:  # its type is no text, so no row will have one
        return BATCH_ROWS
    longest = column.total_uncompressed_size // max(column.num_values, 1)
    if column.has_dictionary_page:
        longest = max(longest, _dictionary_bytes(path, column))
    return min(max(limit // max(longest, 1), 1), BATCH_ROWS)


def _dictionary_bytes(path: Path, column: Any) -> int:
    """Return the bytes of the dictionary of a column, from the header of its page (Thrift's compact protocol).

    The header begins with two numbers, the type of the page and its size. If it does not, the size of the whole column
    is returned.
    """
    with open(path, "rb") as stream:
        stream.seek(column.dictionary_page_offset)
        head = stream.read(24)
    numbers, place = list[int](), 0
    while len(numbers) < 2 and place < len(head) and head[place] == NEXT_INT:
        value, place, shift = 0, place + 1, 0
        while place < len(head):
            value |= (head[place] & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if head[place - 1] < 0x80:
                break
        numbers.append(value >> 1)
    return numbers[1] if len(numbers) == 2 else int(column.total_uncompressed_size)


def read_arrow(path: Path, text_key: str, report: Report, *, limit: int) -> Iterator[str]:
    """Yield the texts of an Arrow file, an Arrow stream, as `datasets` writes it, or a Feather file."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _check_column(path, reader.schema.names, text_key)
        batches = (reader.get_batch(k) for k in range(reader.num_record_batches)) if is_file else iter(reader)
        yield from _texts(path, _valid(batches), text_key, report, limit)
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


def _texts(
    path: Path, batches: Iterator[Any], text_key: str, report: Report, limit: int, since: str = ""
) -> Iterator[str]:
    row = 0
    for batch in batches:
        for value in _values(batch.column(text_key), limit):
            row += 1
            where = f"{path} row {row}{since}"
            if isinstance(value, UnicodeDecodeError):
                report(Bad(where=where, what=f"is not UTF-8 text (byte {value.start})"))
            elif value is _TOO_LONG:
                report(too_long(where, limit))
            elif (text := text_of(value, text_key, where, report)) is not None:
                yield text


_TOO_LONG = object()


def _values(column: Any, limit: int) -> Iterator[object]:
    """Yield the values of a column one by one; instead of a text above ``limit``, _TOO_LONG; or an error of decoding.

    The values of a column that has a dictionary may be one long text again and again, so no list of them is made.
    """
    too_long = _places_above(column, limit)
    for place, scalar in enumerate(column):
        yield _TOO_LONG if place in too_long else _value(scalar)


def _places_above(column: Any, limit: int) -> set[int]:
    """Return the places of the texts of a column that have more than ``limit`` bytes."""
    if column.nbytes <= limit:  # the usual case, without importing what the other one needs
        return set()
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = column.dictionary if pa.types.is_dictionary(column.type) else column
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(is_kind(texts.type) for is_kind in kinds):
        return set()
    lengths = pc.binary_length(texts)
    lengths = lengths if texts is column else lengths.take(column.indices)
    return set(pc.indices_nonzero(pc.greater(lengths, limit)).to_pylist())


def _value(scalar: Any) -> object:
    """Return the value of an Arrow scalar, or the error that it raises."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
