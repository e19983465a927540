"""Divide what a sweep may use at once among its job arrays: the launcher's keys max_running and max_gpus."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dlm.core.errors import UserError
from dlm.submit.cell_now import CellNow
from dlm.submit.cluster import Request
from dlm.submit.job import Job, SlurmSettings
from dlm.submit.partitions import gpus_in


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many further cells of a sweep may run at once, and on how many GPUs."""

    cells: float = math.inf
    gpus: float = math.inf

    def fits(self, gpus: int) -> bool:
        """Whether there is room for one more cell with so many GPUs."""
        return self.cells >= 1 and self.gpus >= gpus

    def without(self, cells: int, gpus: int) -> Room:
        """Return the room that is left when so many cells run with so many GPUs in all."""
        return Room(cells=self.cells - cells, gpus=self.gpus - gpus)


def room_left(settings: SlurmSettings, live: Iterable[CellNow]) -> Room:
    """Return the room that the cells which wait or run leave.

    Of an array that was submitted earlier, as many cells may run at once as SLURM lets run of it.
    """
    arrays = defaultdict[str, list[CellNow]](list)
    for cell in live:
        arrays[str(cell.record.submission)].append(cell)
    room = Room(cells=settings.max_running or math.inf, gpus=settings.max_gpus or math.inf)
    for cells in arrays.values():
        record = cells[0].record
        count = min(len(cells), record.at_once or len(cells))
        room = room.without(count, count * (record.gpus or 0))
    return room


def shares(arrays: Sequence[Request], room: Room, settings: SlurmSettings) -> list[int]:
    """Return how many tasks of each array may run at once, so that together they stay within the room.

    Every array gets one task, in the given order, then those with the most jobs for each task get more. 0 means that
    there is no room for the array yet.

    Raises:
        UserError: A single job needs more GPUs than the sweep may use.
    """
    counts = [0] * len(arrays)
    gpus = [gpus_of(array.jobs[0], settings) for array in arrays]
    for array, need in zip(arrays, gpus, strict=True):
        if settings.max_gpus is not None and need > settings.max_gpus:
            limit = f"hydra.launcher.max_gpus is {settings.max_gpus}"
            raise UserError(f"{array.jobs[0].name} needs {need} GPUs, and {limit}")
    for i, need in enumerate(gpus):
        if room.fits(need):
            counts[i], room = 1, room.without(1, need)
    limits = [min(len(array.jobs), _parallelism(array, settings)) for array in arrays]
    while True:
        growing = [i for i, need in enumerate(gpus) if 0 < counts[i] < limits[i] and room.fits(need)]
        if not growing:
            return counts
        best = max(growing, key=lambda i: len(arrays[i].jobs) / counts[i])
        counts[best], room = counts[best] + 1, room.without(1, gpus[best])


def gpus_of(job: Job, settings: SlurmSettings) -> int:
    """Return the number of GPUs of a job on all its nodes, also if the key gres asks for them."""
    gres = (job.settings or settings).gres
    return job.resources.num_gpus if gres is None else job.resources.nodes * gpus_in(gres)


def _parallelism(array: Request, settings: SlurmSettings) -> int:
    return (array.jobs[0].settings or settings).array_parallelism
