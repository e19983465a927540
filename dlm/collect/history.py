"""Merge logged rows into one table per run, and keep the tables of a sweep in history.parquet.

A table has one row per optimiser step, in order. Where a resumed run logged a step again, the last logged value of
each column counts. history.parquet holds one row group per run. The metadata of the file record which files each
table was read from, so that a run is not read again unless its files have changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dlm.core.files import read_jsonl, write_through

if TYPE_CHECKING:
    import pyarrow as pa


NUMBERS = ("time", "train/loss", "val/loss", "val/loss_se", "lr", "grad_norm", "tokens_per_sec", "mfu")
HISTORY_COLUMNS = ("run_id", "step", "tokens", *NUMBERS)
VERSION = 1  # version of the metadata of history.parquet
_METADATA = b"dlm"
Key = list[list[Any]]  # [path, size in bytes, modification time in ns] of each file that a history was read from


class ConfigId(NamedTuple):
    """The cell id that follows from the config next to a history, kept because it takes long to compute."""

    data_hash: str | None  # the hash of the data, from which the id was computed together with the config
    cell_id: str


@dataclass(kw_only=True)
class History:
    """The logged values of one run, one row per optimiser step."""

    run_id: str
    key: Key
    table: pa.Table | None = None  # step, tokens and NUMBERS; None while the table is not loaded from history.parquet
    num_rows: int = 0
    last_step: int | None = None
    validations: dict[int, tuple[float, float | None]] = field(default_factory=dict)  # step -> val/loss, val/loss_se
    warnings: list[str] = field(default_factory=list)  # about rows that could not be read
    config_id: ConfigId | None = None  # from config.yaml in the run directory; None: not computed yet
    row_group: int | None = None  # index of the row group in ``stored``
    stored: Path | None = None  # the history.parquet that holds the table

    def cell_id(self, data_hash: str | None, compute: Callable[[], str | None]) -> str | None:
        """Return the cell id of the config of the run; call ``compute`` only if the id for ``data_hash`` is unknown."""
        if self.config_id is None or self.config_id.data_hash != data_hash:
            computed = compute()
            if computed is None:
                return None
            self.config_id = ConfigId(data_hash, computed)
        return self.config_id.cell_id

    def reached(self, steps: int) -> bool:
        """Whether the history extends to step ``steps`` and holds the validation at this step."""
        return self.last_step is not None and self.last_step >= steps and self.at(steps)[0] is not None

    def at(self, step: int) -> tuple[float | None, float | None]:
        """Return (val/loss, its standard error) at ``step``, in nats/token; None for a value that was not logged."""
        return self.validations.get(step, (None, None))

    def read(self) -> pa.Table:
        """Return the table; read it from history.parquet if it is not in memory."""
        if self.table is not None:
            return self.table
        import pyarrow.parquet as pq

        if self.row_group is None or self.stored is None:
            return _schema().empty_table()
        with pq.ParquetFile(self.stored) as file:
            return file.read_row_group(self.row_group).drop_columns("run_id")


def key_of(paths: Iterable[Path], root: Path) -> Key:
    """Return name, size and modification time of files, by which later changes to the files are detected."""
    stats = [(path, path.stat()) for path in paths]
    return [[os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([("step", pa.int64()), ("tokens", pa.int64()), *((name, pa.float64()) for name in NUMBERS)])


def from_metrics(path: Path, run_id: str, key: Key) -> History:
    """Read a metrics.jsonl. Torn lines are left out; ``warnings`` state their number."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import json as arrow_json

    options = arrow_json.ParseOptions(explicit_schema=_schema(), unexpected_field_behavior="ignore")
    one_thread = arrow_json.ReadOptions(use_threads=False)
    content = path.read_bytes()
    with contextlib.suppress(pa.ArrowInvalid):  # a line is torn or has a value of another type: read line by line
        if _is_flat(content):
            table = arrow_json.read_json(io.BytesIO(content), parse_options=options, read_options=one_thread)
            steps = table.column("step")
            if table.num_rows and not steps.null_count and pc.min(steps).as_py() >= 0:
                return _merged(table, run_id, key, [])
    rows = read_jsonl(path)
    torn = sum(bool(line.strip()) for line in content.split(b"\n")) - len(rows)
    lines = "line is" if torn == 1 else "lines are"
    return from_rows(rows, run_id, key, [f"{torn} {lines} torn in metrics.jsonl, and left out"] if torn else [])


def _is_flat(content: bytes) -> bool:
    """Whether each line is one mapping without lists and mappings in it, as dlm writes them.

    pyarrow's parser crashes with the whole process at a line `null` and at deep nesting.
    """
    num_lines = content.count(b"\n") + (not content.endswith(b"\n"))
    is_of_mappings = content.startswith(b"{") and content.rstrip(b"\n").endswith(b"}")
    counts = {content.count(b"{"), content.count(b"}"), content.count(b"}\n{") + 1, num_lines}
    return is_of_mappings and len(counts) == 1 and b"[" not in content


def from_rows(rows: Sequence[Mapping[str, Any]], run_id: str, key: Key, warnings: list[str]) -> History:
    """Merge logged rows into a history.

    Args:
        rows: The rows in the order in which they were logged. Attempts may be out of order if each row has ``attempt``.
        run_id: The id of the run.
        key: The files that the rows were read from.
        warnings: The warnings from reading the rows. Measurements without an integer step are left out, which adds a
            warning.
    """
    import pyarrow as pa

    measured = [row for row in rows if any(name in row for name in NUMBERS)]
    whole = [row for row in measured if _whole(row.get("step")) is not None]
    if all("attempt" in row for row in whole):  # a late upload, or a clock that jumped back, changes their order
        whole.sort(key=lambda row: _whole(row["attempt"]) or 0)
    if len(whole) < len(measured):
        warnings = [*warnings, f"{len(measured) - len(whole)} logged rows have no step and were left out"]
    columns: dict[str, list[Any]] = {"step": [_whole(row["step"]) for row in whole]}
    columns["tokens"] = [_whole(row.get("tokens")) for row in whole]
    columns |= {name: [number(row.get(name)) for row in whole] for name in NUMBERS}
    return _merged(pa.table(columns, schema=_schema()), run_id, key, warnings)


def _whole(value: Any) -> int | None:
    """Convert to an integer of at least 0; W&B may have written 3 as 3.0. None for any other value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**63:
        return None
    return int(value) if int(value) == value else None


def number(value: Any) -> float | None:
    """Convert to a float; W&B writes NaN and infinity as strings. None for any other value."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of a float (more than 308 digits)
        return math.inf if value > 0 else -math.inf


def filled(first: History, second: History, key: Key) -> History:
    """Fill in the values missing in ``first`` from ``second``, another history of the same run.

    Where both have a value, the value of ``first`` counts. The warnings of ``second`` are kept.
    """
    import pyarrow as pa

    return _merged(pa.concat_tables([second.read(), first.read()]), first.run_id, key, second.warnings)


def _merged(table: pa.Table, run_id: str, key: Key, warnings: list[str]) -> History:
    """Make a history with one row per step from a table of all rows in the order in which they were logged."""
    import numpy as np
    import pyarrow.compute as pc

    steps = table.column("step").to_numpy()
    if len(steps) > 1 and not (np.diff(steps) > 0).all():
        table = _last_of_each(table)
    table = table.combine_chunks()
    validated = table.filter(pc.is_valid(table.column("val/loss"))).to_pylist()
    return History(
        run_id=run_id,
        key=key,
        table=table,
        num_rows=table.num_rows,
        last_step=table.column("step")[-1].as_py() if table.num_rows else None,
        validations={row["step"]: (row["val/loss"], row["val/loss_se"]) for row in validated},
        warnings=warnings,
    )


def _last_of_each(table: pa.Table) -> pa.Table:
    """Keep the last value of each column at each step. NaN counts as a value; missing (null) entries are skipped."""
    grouped = table.group_by("step", use_threads=False).aggregate([(name, "last") for name in table.column_names[1:]])
    names = ["step", *(f"{name}_last" for name in table.column_names[1:])]
    return grouped.select(names).rename_columns(table.column_names).sort_by("step")


def stored_histories(path: Path) -> dict[str, History]:
    """Return the histories in a history.parquet by run id, tables not loaded; {} without a file of this VERSION."""
    if not path.is_file():
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = json.loads((pq.read_metadata(path).metadata or {})[_METADATA])
        if metadata["version"] != VERSION:
            return {}
        return {entry["run_id"]: _from_entry(entry, path) for entry in metadata["runs"]}
    except (pa.ArrowInvalid, KeyError, ValueError, TypeError):  # the file is torn or was written by another program
        return {}


def _from_entry(entry: Mapping[str, Any], path: Path) -> History:
    validations = {int(step): (loss, error) for step, loss, error in entry["validations"]}
    config_id = None if entry["config_id"] is None else ConfigId(*entry["config_id"])
    return History(**{**entry, "validations": validations, "config_id": config_id}, stored=path)


def _entry(history: History, row_group: int | None) -> dict[str, Any]:
    """Make the entry of a run in the metadata of history.parquet; ``_from_entry`` reads it back."""
    validations = [[step, *values] for step, values in history.validations.items()]
    entry = {**vars(history), "validations": validations, "row_group": row_group}
    return {name: value for name, value in entry.items() if name not in ("table", "stored")}


def with_run_id(history: History) -> pa.Table:
    """Return the table of a run with HISTORY_COLUMNS."""
    import pyarrow as pa

    table = history.read()
    return table.add_column(0, "run_id", pa.repeat(history.run_id, table.num_rows))


def write_histories(path: Path, found: Sequence[History]) -> None:
    """Write a new history.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with_rows = [history for history in found if history.num_rows]
    groups = {history.run_id: place for place, history in enumerate(with_rows)}
    entries = [_entry(history, groups.get(history.run_id)) for history in found]
    metadata = json.dumps({"version": VERSION, "runs": entries}).encode()
    schema = pa.schema([("run_id", pa.string()), *_schema()])
    with (
        write_through(path) as temporary,
        pq.ParquetWriter(temporary, schema, use_dictionary=["run_id"], write_statistics=["step"]) as writer,
    ):
        for history in with_rows:
            writer.write_table(with_run_id(history), row_group_size=history.num_rows)
        writer.add_key_value_metadata({_METADATA: metadata})
