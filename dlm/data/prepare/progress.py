"""Show how much of the sources is prepared: as a bar on a terminal, elsewhere as a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress


LINE_SEC = 30.0


class UnitProgress:
    """How much of the sources is prepared: ``with UnitProgress(sizes) as progress: progress.add(...)``.

    Args:
        sizes: Bytes of each unit.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.total, self.units = sum(sizes), len(sizes)
        self.bytes, self.done, self.documents, self.tokens = 0, 0, 0, 0
        self.started = self.said = time.monotonic()
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> UnitProgress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())
            self._task = self._bar.add_task(self._line(), total=max(self.total, 1))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, size: int, *, documents: int, tokens: int) -> None:
        """Count a unit of ``size`` bytes as done."""
        self.bytes, self.done = self.bytes + size, self.done + 1
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.bytes, description=self._line())
        elif time.monotonic() - self.said > LINE_SEC:
            self.said = time.monotonic()
            print(self._line(), flush=True)

    def _line(self) -> str:
        rate = self.tokens / max(time.monotonic() - self.started, 1e-9)
        return (
            f"preparing: {self.done} of {self.units} parts, {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{rate / 1e6:.2f} million a second"
        )
