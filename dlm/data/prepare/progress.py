"""Show the progress of a preparation: as a bar on a terminal, otherwise as a line at most every LINE_SEC seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm.data.prepare.encode import UnitRecord


LINE_SEC = 30.0


def with_progress(records: Iterable[UnitRecord], sizes: Mapping[str, int]) -> Iterator[UnitRecord]:
    """Yield the records of units as they are encoded, and show the progress.

    Args:
        records: One record for each unit, in any order.
        sizes: Key of a unit -> bytes of its sources.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from dlm.core.terminal import console

    started = said = time.monotonic()
    documents = tokens = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    is_shown = sys.stdout.isatty()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console(), disable=not is_shown) as bar:
        task = bar.add_task(f"preparing: 0 of {len(sizes)} parts", total=max(sum(sizes.values()), 1))
        for done, record in enumerate(records, start=1):
            documents += sum(record.documents.values())
            tokens += sum(file.tokens for files in record.files.values() for file in files)
            rate = tokens / max(time.monotonic() - started, 1e-9)
            line = (
                f"preparing: {done} of {len(sizes)} parts, {documents:,} documents, {tokens:,} tokens, "
                f"{rate / 1e6:.2f} million a second"
            )
            bar.update(task, advance=sizes[record.key], description=line)
            if bar.disable and time.monotonic() - said > LINE_SEC:
                said = time.monotonic()
                print(line, flush=True)
            yield record
