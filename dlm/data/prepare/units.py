"""Divide source files into units of work.

A unit is the work that a worker takes at a time: several small files, one file, or a slice of a large file. The units
depend on the source files alone, not on the number of workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from dlm.data.prepare.bad import UnreadableError
from dlm.data.prepare.documents import Unit
from dlm.data.prepare.kinds import suffix_of
from dlm.data.prepare.tables import num_row_groups

# Upper and lower bound of the limit on a unit's source bytes, which is the total size / MANY_UNITS.
UNIT_BYTES, SMALL_UNIT_BYTES = 32 * 1024 * 1024, 1024 * 1024


MANY_UNITS = 64  # enough units to keep every core busy until the end


SLICED = (".jsonl", ".ndjson", ".parquet")  # the kinds of files that can be read in part


def make_units(files: Sequence[tuple[str | None, Path]]) -> list[Unit]:
    """Divide files into units, in the order of the files.

    Consecutive small files of the same split and kind share a unit; large files are sliced.
    """
    sizes = [path.stat().st_size for _, path in files]
    limit = min(UNIT_BYTES, max(sum(sizes) // MANY_UNITS, SMALL_UNIT_BYTES))
    units: list[Unit] = []
    for (split, path), size in zip(files, sizes, strict=True):
        kind = suffix_of(path)
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
    if unit.kind == ".parquet":
        try:
            total = num_row_groups(Path(unit.paths[0]))
        except UnreadableError:  # the worker that reads the file says what is wrong with it
            total = 0
    if not total:
        yield unit
        return
    step = max(total * limit // unit.size, 1)
    for start in range(0, total, step):
        stop = min(start + step, total)
        yield dataclasses.replace(unit, size=unit.size * (stop - start) // total, start=start, stop=stop)
