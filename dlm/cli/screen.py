"""screen: plans, states and progress -> what a terminal shows. Called by cli; rich is imported when it draws."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.record.outcomes import State
from dlm.record.run import read_result, read_status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from dlm.plan.cells import Plan
    from dlm.submit.job import Job
    from dlm.submit.local import Event


def console() -> Console:
    """Standard output; wide enough for a table where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


MANY_ROWS = 200  # more are plain lines: rich takes a millisecond a row


def plain_lines(names: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> list[str]:
    """The lines of a table with a header; the columns named in ``right`` are aligned there."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    sides = [">" if name in right else "<" for name in names]
    return ["  ".join(map(format, row, map("{}{}".format, sides, widths))).rstrip() for row in (names, *rows)]


def show_plan(plan: Plan, *, show_dropped: int = 5) -> None:
    """The cells as a table, then what was dropped and what it all costs."""
    from rich.table import Table

    out = console()
    title = f"[bold]{plan.spec.name}[/]: {len(plan.cells)} cells, FLOPs counted as {plan.convention}"
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    columns = ("cell", "N", "tokens", "steps", "tokens/N", "budget", "error %", "epochs", "time", "GPU-h", "GiB")
    for name in columns:
        table.add_column(name, justify="left" if name == "cell" else "right", no_wrap=True)
    previous, rows = None, []
    for cell in plan.cells:
        values = (
            cell.cell_id,
            text.count(cell.num_params),
            text.count(cell.tokens),
            f"{cell.steps:,}",
            f"{cell.tokens_per_param:.3g}",
            text.flops(cell.budget_flops),
            f"{cell.budget_error_pct:+.3f}",
            "-" if cell.epochs is None else f"{cell.epochs:.2f}",
            text.duration(None if cell.estimate.hours is None else cell.estimate.hours * 3600),
            "-" if cell.estimate.gpu_hours is None else f"{cell.estimate.gpu_hours:.3g}",
            "-" if cell.estimate.memory_gib is None else f"{cell.estimate.memory_gib:.2g}",
        )
        rows.append(values)
        if len(plan.cells) > MANY_ROWS:
            continue
        if previous not in (None, cell.budget_flops):
            table.add_section()
        previous = cell.budget_flops
        table.add_row(*values)
    if len(rows) > MANY_ROWS:
        out.print(title)
        print("\n".join(plain_lines(columns, rows, right=columns[1:])))
    else:
        out.print(table)
    for reason, names in _dropped_by_reason(plan, show_dropped):
        out.print(f"[dim]dropped {names}: {reason}[/]")
    hidden = len(plan.dropped) - show_dropped
    if hidden > 0:
        out.print(f"[dim]... and {hidden} more dropped, `dlm plan --json` lists them with their reasons[/]")
    out.print(_cost_line(plan))


def _dropped_by_reason(plan: Plan, limit: int) -> list[tuple[str, str]]:
    return [(row["reason"], f"{row['model']} at {text.flops(row['budget_flops'])}") for row in plan.dropped[:limit]]


def _cost_line(plan: Plan) -> str:
    flops = sum(cell.budget_flops for cell in plan.cells)
    line = f"{len(plan.cells)} cells, {text.flops(flops)} FLOPs ({plan.convention})"
    if plan.cells[0].estimate.hours is None:
        return f"{line}; time: {plan.cells[0].estimate.basis}"
    hours = sum(cell.estimate.hours or 0 for cell in plan.cells)
    gpu_hours = sum(cell.estimate.gpu_hours or 0 for cell in plan.cells)
    price = f"{gpu_hours:,.4g} GPU-hours" if gpu_hours else f"{text.duration(hours * 3600)} of one process"
    return f"{line}, {price} ({plan.cells[0].estimate.basis})"


def show_status(rows: list[dict[str, Any]], summary: str) -> None:
    """One line per cell and a summary."""
    left = ("cell", "state", "reason")
    if len(rows) > MANY_ROWS:
        cells = [["-" if value is None else str(value) for value in row.values()] for row in rows]
        print("\n".join(plain_lines(list(rows[0]), cells, right=[name for name in rows[0] if name not in left])))
        print(summary)
        return
    from rich.table import Table

    colours = {
        State.DONE: "green", State.RUNNING: "cyan", State.SUBMITTED: "blue", State.PLANNED: "dim",
        State.PREEMPTED: "yellow",
    }  # fmt: skip
    out = console()
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        shown = {key: "-" if value is None else str(value) for key, value in row.items()}
        colour = colours.get(row["state"], "red")
        table.add_row(*{**shown, "state": f"[{colour}]{row['state']}[/]"}.values())
    out.print(table)
    out.print(summary)


class LocalProgress:
    """What a local run shows: bars on a terminal, a line per ended cell in a file."""

    def __init__(self, plan: Plan, sweep_dir: Path) -> None:
        self.flops: Mapping[str, float] = {cell.cell_id: cell.flops["full_masked_head"] for cell in plan.cells}
        self.steps = {cell.cell_id: cell.steps for cell in plan.cells}
        self.sweep_dir, self.total = sweep_dir, len(plan.cells)
        self.ended = sum(1 for name in self.flops if read_result(self._run(name)) is not None)
        self._bars: dict[str, Any] = {}
        self._looked = 0.0
        self._progress: Progress | None = None

    def _run(self, name: str) -> Path:
        return self.sweep_dir / "runs" / name

    def __enter__(self) -> LocalProgress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console())
            self._whole = self._progress.add_task("[bold]all cells[/], in FLOPs", total=sum(self.flops.values()))
            self._progress.start()
            self.on_tick()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def on_event(self, event: Event) -> None:
        """A cell was started, deferred or ended."""
        if event.kind == "ended":
            self._show_ended(event.job, event)
        elif event.kind == "deferred":
            self._print(f"{event.job.name} is run by another process: waiting for it")
        elif event.kind == "started" and self._progress is not None:
            self._bars[event.job.name] = self._progress.add_task(event.job.name, total=self.steps[event.job.name])

    def _show_ended(self, job: Job, event: Event) -> None:
        result = read_result(job.run_dir)
        self.ended += result is not None
        if result is not None:
            said = f"{result.loss:.4f} nats/token"
        else:
            said = f"exit code {event.exit_code}, see {job.run_dir / 'log.txt'}"
        self._print(f"[{self.ended}/{self.total}] {job.name}: {said}, {event.wall_sec or 0:.0f} s")
        if self._progress is not None and job.name in self._bars:
            self._progress.remove_task(self._bars.pop(job.name))

    def _print(self, line: str) -> None:
        if self._progress is None:
            print(line, flush=True)
        else:
            self._progress.console.print(line, markup=False)

    def on_tick(self) -> None:
        """Look at the running cells, at most once a second."""
        if self._progress is None or time.monotonic() - self._looked < 1:
            return
        self._looked, done = time.monotonic(), 0.0
        for name, flops in self.flops.items():
            status = read_status(self._run(name))
            step = 0 if status is None else status.step
            done += flops * step / self.steps[name]
            if name in self._bars:
                self._progress.update(self._bars[name], completed=step)
        self._progress.update(self._whole, completed=done)
