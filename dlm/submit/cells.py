"""submit: Plan -> jobs for the submission core; cancel. Called by cli.

Submitting twice submits nothing twice: a finished cell is skipped, one that runs or waits is left alone, a partial
one goes on from its checkpoint, a failed one is retried by its cause.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.core.errors import UserError
from dlm.core.lease import live_holder
from dlm.core.recipe import accumulation
from dlm.record.outcomes import State
from dlm.record.run import run_directory
from dlm.submit.job import Job, Resources
from dlm.submit.ledger import CellNow, CellRecord, Ledger, write_max_gpu_hours
from dlm.submit.local import Event, LocalPool
from dlm.submit.resources import (
    cell_resources,
    dividing_micro_batch,
    num_devices,
    smaller_micro_batch,
    trainer_overrides,
)
from dlm.submit.retry import failures_since_progress, is_host_oom, why_not
from dlm.submit.slurm import Slurm, live_state
from dlm.submit.state import cells_now, reconciled
from dlm.submit.submission import Submission, override, quote, submit_jobs, submitting

if TYPE_CHECKING:
    from dlm.plan.cells import Cell, Plan


def cell_overrides(cell_id: str, *, sweep_dir: Path, data_dir: Path, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """The overrides of `python -m dlm.launch` that run one planned cell; ``extra`` ones come last and win."""
    sweep_dir = sweep_dir.absolute()
    return (
        f"+cell={cell_id}",
        f"hydra.searchpath=[{quote(f'file://{sweep_dir}')}]",
        override("sweep", sweep_dir.name),
        override("paths.workdir", str(sweep_dir.parent)),
        override("paths.data_dir", str(data_dir.absolute())),
        *extra,
    )


def submit_plan(
    plan: Plan,
    sweep_dir: Path,
    *,
    cluster: LocalPool | Slurm,
    data_dir: Path,
    extra: Sequence[str] = (),
    retry_failed: bool = False,
    max_gpu_hours: float | None = None,
    now: Mapping[str, CellNow] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Submission:
    """Submit every cell of a plan that is worth starting; see ``why_not`` for the others.

    Args:
        max_gpu_hours: Jobs on SLURM, those too that wait already, end at once when they begin and the sweep has used
            as many GPU-hours.
        now: The state of the cells where the caller has just read it with ``cells_now``, so that it is not read again.
            On SLURM only finished cells are taken from it: another submission may have taken the others since.
    """
    steps = {cell.cell_id: cell.steps for cell in plan.cells}
    with submitting(cluster, sweep_dir, list(steps)):
        if isinstance(cluster, Slurm):
            write_max_gpu_hours(sweep_dir, max_gpu_hours)
        known = {} if now is None else dict(now)
        if isinstance(cluster, Slurm):
            known = {name: cell for name, cell in known.items() if cell.state is State.DONE}
        known |= cells_now([(name, last) for name, last in steps.items() if name not in known], sweep_dir)[0]
        jobs, skipped = _worth_starting(
            plan, sweep_dir, known, cluster=cluster, data_dir=data_dir, extra=extra, retry_failed=retry_failed
        )
        done = submit_jobs(
            jobs,
            cluster=cluster,
            sweep_dir=sweep_dir,
            was={name: cell for name, cell in known.items() if cell.state != State.PLANNED},
            steps=steps,
            on_event=on_event,
            on_tick=on_tick,
        )
    return dataclasses.replace(done, skipped=skipped)


def _worth_starting(
    plan: Plan,
    sweep_dir: Path,
    now: Mapping[str, CellNow],
    *,
    cluster: LocalPool | Slurm,
    data_dir: Path,
    extra: Sequence[str],
    retry_failed: bool,
) -> tuple[list[Job], dict[str, str]]:
    """(jobs, cell -> why there is none)."""
    records = Ledger(sweep_dir).read()
    max_time_min = cluster.max_time_min() if isinstance(cluster, Slurm) else None
    skipped: dict[str, str] = {}
    jobs = []
    for cell in plan.cells:
        name = cell.cell_id
        record = records.get(name, CellRecord())
        reason = why_not(now[name], failures=failures_since_progress(record, now[name]), retry_failed=retry_failed)
        if isinstance(cluster, LocalPool) and now[name].state == State.RUNNING and runs_on(sweep_dir, name):
            reason = None  # the pool waits for it, and looks again when it has ended
        if reason is not None:
            skipped[name] = reason
            continue
        settings = cluster.settings if isinstance(cluster, Slurm) else None
        resources = cell_resources(cell, settings, max_time_min=max_time_min)
        micro = record.micro_batch
        if now[name].state is State.OUT_OF_MEMORY and not retry_failed and is_host_oom(now[name], resources, settings):
            skipped[name] = f"{now[name].reason}: that is memory of the host, raise hydra.launcher.mem_gb"
            continue
        if now[name].state is State.OUT_OF_MEMORY:
            smaller = smaller_micro_batch(cell, resources, micro)
            if smaller is None and not retry_failed:
                skipped[name] = f"out of memory ({now[name].reason}) with one sequence at a time: use more devices"
                continue
            micro = smaller or 1
        if micro is not None:
            micro = dividing_micro_batch(cell, resources, at_most=micro)
        jobs.append(_cell_job(cell, sweep_dir, resources=resources, micro=micro, data_dir=data_dir, extra=extra))
    return jobs, skipped


def runs_on(sweep_dir: Path, cell_id: str) -> bool:
    """Whether a process holds the cell."""
    return live_holder(run_directory(sweep_dir, cell_id)) is not None


def _cell_job(
    cell: Cell, sweep_dir: Path, *, resources: Resources, micro: int | None, data_dir: Path, extra: Sequence[str]
) -> Job:
    accumulation(  # a batch that the devices do not divide is refused before anything waits in a queue
        batch_size=cell.global_batch_size,
        micro_batch_size=None,
        world_size=num_devices(resources),
        num_params=cell.num_params,
    )
    group = str(cell.groups.get("trainer", "cpu"))
    chosen = any(item.lstrip("+~").startswith("trainer=") for item in extra)
    smaller = () if micro is None else (f"data.micro_batch_size={micro}",)
    return Job(
        name=cell.cell_id,
        overrides=cell_overrides(
            cell.cell_id,
            sweep_dir=sweep_dir,
            data_dir=data_dir,
            extra=(*(() if chosen else trainer_overrides(resources, group)), *extra, *smaller),
        ),
        run_dir=run_directory(sweep_dir.absolute(), cell.cell_id),
        resources=resources,
        micro_batch=micro,
    )


def cancel(cell_ids: Sequence[str], sweep_dir: Path, *, states: Sequence[State] = ()) -> dict[str, str]:
    """Stop cells that run or wait: scancel, or SIGTERM to the process on this machine; cell -> what was done.

    With ``states`` only those that are in one of them.

    A `dlm sweep` on this machine sees the ledger: it ends what it has just started and passes over what waits.
    """
    now, _ = cells_now([(name, None) for name in cell_ids], sweep_dir)
    cell_ids = [name for name in cell_ids if not states or now[name].state in states]
    live = [name for name in cell_ids if now[name].state in (State.RUNNING, State.SUBMITTED)]
    records, answer, _ = reconciled(sweep_dir, cell_ids)
    known = {name: records.get(name, CellRecord()) for name in cell_ids}
    if answer.silent and any(known[name].cluster == "slurm" for name in live):
        raise UserError("SLURM does not answer, so its jobs cannot be stopped: nothing was cancelled, try again later")
    waiting = [
        name for name in cell_ids if name not in live and known[name].waits_here and now[name].state != State.DONE
    ]
    jobs = {
        name: job_id  # of those that SLURM has; another job ran, and somebody runs the cell by hand since
        for name in live
        if (job_id := known[name].job_id) is not None and live_state(answer.states.get(job_id)) is not None
    }
    Slurm().cancel(list(jobs.values()))  # what it refuses is not written down as done
    if live or waiting:
        Ledger(sweep_dir).cancelled([*live, *waiting])
    done = dict.fromkeys(waiting, "taken off the list of the sweep here")
    for name in live:
        holder = live_holder(run_directory(sweep_dir, name))
        if name in jobs:
            done[name] = f"scancel {jobs[name]}"
        elif holder is not None and holder["host"] == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(int(holder["pid"]), signal.SIGTERM)
            done[name] = f"SIGTERM to process {holder['pid']}"
        elif holder is not None:
            done[name] = f"runs as process {holder['pid']} on {holder['host']}: stop it there"
    return done
