"""submit: Plan -> jobs for the submission core; cancel. Called by cli.

Submitting twice submits nothing twice: a finished cell is skipped, one that runs or waits is left alone, a partial
one goes on from its checkpoint, a failed one is retried by its cause.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.cluster import Job, Resources, Slurm, SlurmSettings, live_state
from dlm.dispatch import Submission, override, quote, submit_jobs, submitting
from dlm.errors import UserError
from dlm.estimate import GIB
from dlm.files import live_holder
from dlm.ledger import CellNow, CellRecord, Ledger, cells_now, reconciled, run_directory, write_max_gpu_hours
from dlm.pool import Event, LocalPool
from dlm.recipe import accumulation
from dlm.record import State

if TYPE_CHECKING:
    from dlm.plan import Cell, Plan

MAX_FAILURES = 3  # a cell that failed this often of an unknown cause, and got no further, is left alone
# States whose cause a second try does not remove.
NOT_AGAIN = {
    State.DIVERGED: "lower optimizer.lr",
    State.BAD_CONFIG: "mend the definition",
}
HOST_GIB = {False: 2, True: 8}  # memory of one process on the host: Python, torch, the loader; on a GPU CUDA's too


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


def trainer_overrides(resources: Resources, group: str) -> tuple[str, ...]:
    """The trainer that fits what a job is given; ``group`` is the cell's own, which stands unless it is cpu."""
    nodes, gpus = resources.nodes, resources.gpus_per_node
    if not gpus:
        several = resources.tasks_per_node * nodes > 1
        return (f"trainer.devices={resources.tasks_per_node}", f"trainer.num_nodes={nodes}") if several else ()
    fitting = "multi_node" if nodes > 1 else "multi_gpu" if gpus > 1 else "single_gpu"
    chosen = (f"trainer={fitting}",) if group == "cpu" else ()
    return (*chosen, f"trainer.devices={gpus}", f"trainer.num_nodes={nodes}")


def cell_resources(
    cell: Cell, settings: SlurmSettings | None = None, *, cpus_per_task: int = 1, max_time_min: int | None = None
) -> Resources:
    """What a planned cell needs: the launcher's keys where they are set, else the plan's estimate.

    A cell that needs longer than ``max_time_min``, the partition's limit, goes on in another job. Raises UserError for
    a hydra.launcher.timeout_min above it.
    """
    settings = settings or SlurmSettings()
    gpus = settings.gpus_per_node if settings.gpus_per_node is not None else cell.gpus_per_node or 0
    tasks = settings.tasks_per_node or gpus or cell.overrides.get("trainer.devices") or 1
    return Resources(
        nodes=settings.nodes or cell.overrides.get("trainer.num_nodes") or cell.nodes or 1,
        tasks_per_node=tasks,
        gpus_per_node=gpus,
        cpus_per_task=settings.cpus_per_task or cpus_per_task,
        mem_gib=settings.mem_gb or host_memory_gib(cell, tasks=tasks, on_gpu=gpus > 0),
        time_min=_time_limit(settings, time_limit_min(cell.hours), max_time_min),
    )


def _time_limit(settings: SlurmSettings, planned: int | None, allowed: int | None) -> int | None:
    asked = settings.timeout_min
    if asked is not None and allowed is not None and asked > allowed:
        raise UserError(
            f"hydra.launcher.timeout_min is {asked}, the partition {settings.partition or '(default)'} allows "
            f"{allowed} minutes: lower it; a longer cell goes on in the next job"
        )
    return min((limit for limit in (asked or planned, allowed) if limit is not None), default=None)


def host_memory_gib(cell: Cell, *, tasks: int, on_gpu: bool) -> int | None:
    """Host memory of a node, on a coarse grid so that arrays are few: what its processes are, and hold.

    On a CPU that is all of training; beside GPUs one process gathers the state for a checkpoint, and keeps a copy of it
    while that is written. None where the plan has no estimate.
    """
    if cell.memory_gib is None:
        return None
    state = 2 * 16 * cell.num_params_total / GIB
    needed = HOST_GIB[on_gpu] * tasks + (state if on_gpu else 1.5 * cell.memory_gib * tasks)
    power = 2 ** math.floor(math.log2(needed))
    return int(next(size for size in (power, 1.5 * power, 2 * power) if size >= needed))


def time_limit_min(hours: float | None) -> int | None:
    """A time limit from an estimate: half as much again and ten minutes, on a coarse grid so that arrays are few."""
    if hours is None:
        return None
    needed = hours * 60 * 1.5 + 10
    return int(30 * 2 ** max(0, math.ceil(math.log2(needed / 30))))


def why_not(now: CellNow, *, failures: int, retry_failed: bool, max_failures: int = MAX_FAILURES) -> str | None:
    """Why a cell in this state is not started, or None when it is."""
    if now.state == State.DONE:
        return "done"
    if now.state in (State.RUNNING, State.SUBMITTED):
        return f"{now.state}: {now.reason}"
    if retry_failed:
        return None
    if now.state in NOT_AGAIN:
        return f"{now.state} ({now.reason}): {NOT_AGAIN[now.state]}, or --retry-failed"
    if now.state == State.FAILED and failures + 1 >= max_failures:
        return f"failed {failures + 1} times ({now.reason}): see `dlm logs`, or --retry-failed"
    return None


def submit_plan(
    plan: Plan,
    sweep_dir: Path,
    *,
    cluster: LocalPool | Slurm,
    data_dir: Path,
    extra: Sequence[str] = (),
    retry_failed: bool = False,
    max_gpu_hours: float | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Submission:
    """Submit every cell of a plan that is worth starting; see ``why_not`` for the others.

    Jobs on SLURM, those too that wait already, end at once when they begin and the sweep has used ``max_gpu_hours``.
    """
    steps = {cell.cell_id: cell.steps for cell in plan.cells}
    with submitting(cluster, sweep_dir, list(steps)):
        if isinstance(cluster, Slurm):
            write_max_gpu_hours(sweep_dir, max_gpu_hours)
        now, _ = cells_now(list(steps.items()), sweep_dir)
        jobs, skipped = _worth_starting(
            plan, sweep_dir, now, cluster=cluster, data_dir=data_dir, extra=extra, retry_failed=retry_failed
        )
        done = submit_jobs(
            jobs,
            cluster=cluster,
            sweep_dir=sweep_dir,
            was={name: cell for name, cell in now.items() if cell.state != State.PLANNED},
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
        reason = why_not(now[name], failures=_failures(record, now[name]), retry_failed=retry_failed)
        if isinstance(cluster, LocalPool) and now[name].state == State.RUNNING and runs_on(sweep_dir, name):
            reason = None  # the pool waits for it, and looks again when it has ended
        if reason is not None:
            skipped[name] = reason
            continue
        settings = cluster.settings if isinstance(cluster, Slurm) else None
        resources = cell_resources(cell, settings, max_time_min=max_time_min)
        micro = record.micro_batch
        if now[name].state is State.OUT_OF_MEMORY and not retry_failed and _host_memory(now[name], resources, settings):
            skipped[name] = f"{now[name].reason}: that is memory of the host, raise hydra.launcher.mem_gb"
            continue
        if now[name].state is State.OUT_OF_MEMORY:
            smaller = _smaller_micro_batch(cell, resources, micro)
            if smaller is None and not retry_failed:
                skipped[name] = f"out of memory ({now[name].reason}) with one sequence at a time: use more devices"
                continue
            micro = smaller or 1
        if micro is not None:
            micro = _dividing(cell, resources, at_most=micro)
        jobs.append(_cell_job(cell, sweep_dir, resources=resources, micro=micro, data_dir=data_dir, extra=extra))
    return jobs, skipped


def runs_on(sweep_dir: Path, cell_id: str) -> bool:
    """Whether a process holds the cell."""
    return live_holder(run_directory(sweep_dir, cell_id)) is not None


def _failures(record: CellRecord, now: CellNow) -> int:
    """Earlier failures that count: those since the cell last got further."""
    step = now.status.step if now.status is not None else 0
    return record.failures if step <= record.failed_at else 0


def _devices(resources: Resources) -> int:
    return max(resources.gpus_per_node, resources.tasks_per_node) * resources.nodes


def _host_memory(now: CellNow, resources: Resources, settings: SlurmSettings | None) -> bool:
    """Whether a smaller micro-batch would not help: SLURM ended a job with GPUs, and got no other mem_gb since."""
    unchanged = settings is None or settings.mem_gb is None
    return resources.gpus_per_node > 0 and unchanged and str(now.reason).startswith("SLURM says OUT_OF_MEMORY")


def _dividing(cell: Cell, resources: Resources, *, at_most: int) -> int | None:
    """The largest micro-batch up to ``at_most`` that divides the share of a device; None when there is none."""
    share = cell.global_batch_size // _devices(resources)
    return max((size for size in range(1, at_most + 1) if share % size == 0), default=None)


def _smaller_micro_batch(cell: Cell, resources: Resources, before: int | None) -> int | None:
    """Half the micro-batch, the global batch kept; None when it is one sequence already."""
    devices = _devices(resources)
    if before is None:
        before, _ = accumulation(
            batch_size=cell.global_batch_size,
            micro_batch_size=cell.overrides.get("data.micro_batch_size"),
            world_size=devices,
            num_params=cell.num_params,
        )
    return _dividing(cell, resources, at_most=before // 2)


def _cell_job(
    cell: Cell, sweep_dir: Path, *, resources: Resources, micro: int | None, data_dir: Path, extra: Sequence[str]
) -> Job:
    accumulation(  # a batch that the devices do not divide is refused before anything waits in a queue
        batch_size=cell.global_batch_size,
        micro_batch_size=None,
        world_size=_devices(resources),
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
