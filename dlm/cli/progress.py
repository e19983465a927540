"""Show the progress of a sweep on this machine: a line for each cell that ends, and bars on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.core import text
from dlm.core.errors import ExitCode
from dlm.core.names import printable
from dlm.core.terminal import console
from dlm.record.run import Status, read_result, read_status, run_directory
from dlm.submit.progress import own_steps_done

if TYPE_CHECKING:
    from rich.progress import TaskID

    from dlm.cli.targets import Sweep
    from dlm.submit.cell_now import CellNow
    from dlm.submit.cluster import Event
    from dlm.submit.job import BranchPoint

WHOLE = "all cells"
BAR, WIDE = 10, 100  # the width of a bar, and that of the narrowest terminal on which bars are drawn
STARTING, FIRST = "starting torch", "first step"
SURE = 0.02  # the share of the FLOPs to do that must be done before the time left is estimated from them
LEAST_ROOM, INDENT = 30, "  "  # beside the longest id; with less, what a cell does stands below its id, indented
# What a run does before its first step: a file that it writes at its start, and what it does once the file is there.
PHASES = (("config.yaml", "building the model"), ("env.json", "waiting for data"))


def alone_line(run_dir: Path, at: BranchPoint) -> str:
    """Return the line about a branch that starts from nothing, because its trunk will not write the checkpoint."""
    trunk = run_dir.with_name(at.trunk)
    result = read_result(trunk)
    reason = f", because it stopped early, at step {result.step}" if result is not None and result.stopped_early else ""
    return (
        f"{run_dir.name} trains from nothing: its trunk {trunk.name} will not write the checkpoint of step {at.step}"
        f"{reason}"
    )


class LocalProgress:
    """The progress display of a sweep on this machine: a line for each cell that ends, and bars on a terminal.

    Args:
        sweep: The sweep that runs.
        now: The states of its cells before the run, by cell id.
    """

    def __init__(self, sweep: Sweep, now: Mapping[str, CellNow]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._folder = sweep.folder
        self._cells = sweep.plan.cells
        self._flops = {cell.cell_id: cell.flops["full_masked_head"] * cell.own_share for cell in sweep.plan.cells}
        self._steps = {cell.cell_id: cell.steps for cell in sweep.plan.cells}
        self._tokens = {cell.cell_id: cell.tokens for cell in sweep.plan.cells}
        self._started: dict[str, float] = {}  # cell id -> when its process was started, seconds since the epoch
        self._begun: tuple[float, float] | None = None  # the time and the FLOPs that were done when this display began
        self._num_done = sum(cell.result is not None for cell in now.values())
        self._looked = 0.0
        self._bars: dict[str, TaskID] = {}
        out = console()
        bars = [BarColumn(bar_width=BAR)] if out.width >= WIDE else []
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            *bars,
            TextColumn("{task.fields[words]}", markup=False),
            console=out,
            disable=not sys.stdout.isatty(),
        )
        names = [WHOLE, *map(printable, self._steps)]
        self._room = out.width - max(map(len, names)) - 1 - (BAR + 1 if bars else 0)
        self._is_stacked = self._room < LEAST_ROOM
        if self._is_stacked:
            self._room = out.width - len(INDENT)
        self._whole = self._progress.add_task(WHOLE, total=sum(self._flops.values()), words="")

    def __enter__(self) -> LocalProgress:
        if left := len(self._steps) - self._num_done:
            self._say(f"starting {left} of {text.counted(len(self._steps), 'cell')} ...")
        self._progress.start()
        self.on_tick()
        return self

    def __exit__(self, *_: object) -> None:
        self._looked = 0.0  # what stays on the terminal is the last state, not that of a second ago
        self.on_tick()
        self._progress.stop()
        if self._started:
            self._say(f"run directories: {self._folder / 'runs'}")

    def on_event(self, event: Event) -> None:
        """Show that a cell was started, deferred or ended."""
        name = event.job.name
        if event.kind == "started":
            self._bars[name] = self._progress.add_task(printable(name), total=self._steps[name], words=STARTING)
            self._started[name] = time.time()
        elif event.kind == "deferred":
            self._say(f"{name} is run by another process: waiting for it")
        elif event.kind == "alone" and event.job.awaits is not None:
            self._say(alone_line(event.job.run_dir, event.job.awaits))
        elif event.kind == "ended":
            self._show_ended(event)

    def _show_ended(self, event: Event) -> None:
        job = event.job
        result, status = read_result(job.run_dir), read_status(job.run_dir)
        ending = f"exit code {event.exit_code}, see {job.run_dir / 'log.txt'}"
        if event.exit_code == ExitCode.PREEMPTED and status is not None and status.reason:
            ending = status.reason
        if result is not None:
            self._num_done += 1
            ending = f"{result.loss:.4f} nats/token"
        self._say(f"[{self._num_done}/{len(self._steps)}] {job.name}: {ending}, {event.wall_sec or 0:.0f} s")
        if job.name in self._bars:
            self._progress.remove_task(self._bars.pop(job.name))

    def _say(self, line: str) -> None:
        self._progress.console.print(printable(line), markup=False, soft_wrap=True)

    def on_tick(self) -> None:
        """Update the progress bars from the status of the cells, at most once a second, and only on a terminal."""
        if self._progress.disable or time.monotonic() - self._looked < 1:
            return
        self._looked = time.monotonic()
        done_flops = 0.0
        for cell in self._cells:
            name = cell.cell_id
            status = read_status(run_directory(self._folder, name))
            step = 0 if status is None else status.step
            done_flops += self._flops[name] * own_steps_done(cell, step)
            if name in self._bars:
                self._update(self._bars[name], printable(name), step, self._parts(name, status))
        self._update(self._whole, WHOLE, done_flops, self._parts_of_all(done_flops))

    def _update(self, bar: TaskID, name: str, completed: float, parts: Sequence[str]) -> None:
        words = fitting(parts, self._room)
        if self._is_stacked:
            self._progress.update(bar, completed=completed, description=f"{name}\n{INDENT}{words}", words="")
        else:
            self._progress.update(bar, completed=completed, words=words)

    def _parts(self, name: str, status: Status | None) -> list[str]:
        """What is known of a running cell, the most important first."""
        begun = self._started[name]
        if status is None or status.updated < begun:  # of an earlier attempt
            return [phase_of(run_directory(self._folder, name), begun)]
        if status.phase is not None:
            first = status.phase
        elif not status.step:
            first = FIRST
        else:
            first = f"step {status.step:,}/{self._steps[name]:,}"
        parts = [first]
        if status.loss is not None:
            parts.append(f"loss {status.loss:.3f}")
        if status.tokens_per_sec:
            left = self._tokens[name] * (1 - status.step / self._steps[name])
            parts.append(f"{text.duration(left / status.tokens_per_sec)} left")
            parts.append(f"{text.count(status.tokens_per_sec)} tokens/s")
        return parts

    def _parts_of_all(self, done_flops: float) -> list[str]:
        """How far the sweep is, the most important first."""
        total, now = sum(self._flops.values()), time.monotonic()
        done = f"{self._num_done}/{len(self._steps)} done"
        if not self._started:
            return [STARTING, done]
        self._begun = self._begun or (now, done_flops)
        parts = [f"{100 * done_flops / total:.0f} % of the FLOPs", done]
        since, before = self._begun
        if done_flops < total and done_flops - before > SURE * (total - before):
            parts.append(f"{text.duration((now - since) * (total - done_flops) / (done_flops - before))} left")
        return [*parts, f"{text.duration(now - since)} so far"]


def phase_of(run_dir: Path, begun: float) -> str:
    """What a run does before its first step, by the files that it has written since ``begun``, seconds since the epoch.

    The time of a file may be rounded down to a second or two, as some file systems do.
    """
    said = STARTING
    for name, phase in PHASES:
        try:
            is_new = (run_dir / name).stat().st_mtime >= begun - 2
        except OSError:  # it is not there yet
            is_new = False
        said = phase if is_new else said
    return said


def fitting(parts: Sequence[str], room: int) -> str:
    """Join as many of the parts as fit into ``room``, in their order; the first one is always there."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > room:
            break
        line = f"{line}  {part}"
    return line
