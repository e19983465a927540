"""submit: Plan -> jobs for the submission core; cancel. Called by cli.

Submitting twice submits nothing twice: a finished cell is skipped, one that runs or waits is left alone, a partial
one goes on from its checkpoint, a failed one is retried by its cause.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.cluster import Job, Resources, Slurm, SlurmSettings
from dlm.dispatch import Submission, override, quote, submit_jobs
from dlm.files import live_holder
from dlm.ledger import CellNow, Ledger, cells_now, run_directory
from dlm.pool import Event, LocalPool
from dlm.recipe import accumulation
from dlm.record import State

if TYPE_CHECKING:
    from dlm.plan import Cell, Plan

MAX_FAILURES = 3  # a cell that failed this often of an unknown cause is left alone
# States whose cause a second try does not remove.
NOT_AGAIN = {
    State.DIVERGED: "lower optimizer.lr",
    State.BAD_CONFIG: "mend the definition",
    State.OUT_OF_MEMORY: "lower data.micro_batch_size or use more devices",
}


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
        return ()
    fitting = "multi_node" if nodes > 1 else "multi_gpu" if gpus > 1 else "single_gpu"
    chosen = (f"trainer={fitting}",) if group == "cpu" else ()
    return (*chosen, f"trainer.devices={gpus}", f"trainer.num_nodes={nodes}")


def cell_resources(cell: Cell, settings: SlurmSettings | None = None, *, cpus_per_task: int = 1) -> Resources:
    """What a planned cell needs: the launcher's keys where they are set, else the plan's estimate."""
    settings = settings or SlurmSettings()
    gpus = settings.gpus_per_node if settings.gpus_per_node is not None else cell.gpus_per_node or 0
    return Resources(
        nodes=settings.nodes or cell.nodes or 1,
        tasks_per_node=settings.tasks_per_node or max(1, gpus),
        gpus_per_node=gpus,
        cpus_per_task=settings.cpus_per_task or cpus_per_task,
        mem_gib=settings.mem_gb,
        time_min=settings.timeout_min or time_limit_min(cell.hours),
    )


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
        return f"failed {failures + 1} times ({now.reason}): see its log.txt, or --retry-failed"
    return None


def submit_plan(
    plan: Plan,
    sweep_dir: Path,
    *,
    cluster: LocalPool | Slurm,
    data_dir: Path,
    extra: Sequence[str] = (),
    retry_failed: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Submission:
    """Submit every cell of a plan that is worth starting; see ``why_not`` for the others."""
    steps = {cell.cell_id: cell.steps for cell in plan.cells}
    local = isinstance(cluster, LocalPool)
    now, _ = cells_now(list(steps.items()), sweep_dir)
    records = Ledger(sweep_dir).read()
    skipped: dict[str, str] = {}
    jobs = []
    for cell in plan.cells:
        name = cell.cell_id
        failures = records[name].failures if name in records else 0
        reason = why_not(now[name], failures=failures, retry_failed=retry_failed)
        if local and now[name].state == State.RUNNING and live_holder(run_directory(sweep_dir, name)):
            reason = None  # the pool waits for it, and looks again when it has ended
        if reason is not None:
            skipped[name] = reason
            continue
        jobs.append(_cell_job(cell, sweep_dir, cluster=cluster, data_dir=data_dir, extra=extra))
    was = {name: cell.state for name, cell in now.items() if cell.state != State.PLANNED}
    done = submit_jobs(
        jobs, cluster=cluster, sweep_dir=sweep_dir, was=was, steps=steps, on_event=on_event, on_tick=on_tick
    )
    return dataclasses.replace(done, skipped=skipped)


def _cell_job(cell: Cell, sweep_dir: Path, *, cluster: LocalPool | Slurm, data_dir: Path, extra: Sequence[str]) -> Job:
    settings = cluster.settings if isinstance(cluster, Slurm) else None
    resources = cell_resources(cell, settings)
    accumulation(  # a batch that the devices do not divide is refused before anything waits in a queue
        batch_size=cell.global_batch_size,
        micro_batch_size=None,
        world_size=max(resources.gpus_per_node * resources.nodes, 1),
        num_params=cell.num_params,
    )
    group = str(cell.groups.get("trainer", "cpu"))
    chosen = any(item.lstrip("+~").startswith("trainer") for item in extra)
    return Job(
        name=cell.cell_id,
        overrides=cell_overrides(
            cell.cell_id,
            sweep_dir=sweep_dir,
            data_dir=data_dir,
            extra=(*(() if chosen else trainer_overrides(resources, group)), *extra),
        ),
        run_dir=run_directory(sweep_dir.absolute(), cell.cell_id),
        resources=resources,
    )


def cancel(cell_ids: Sequence[str], sweep_dir: Path) -> dict[str, str]:
    """Stop cells that run or wait: scancel, or SIGTERM to the process on this machine; cell -> what was done.

    A `dlm sweep` on this machine sees the ledger: it ends what it has just started and passes over what waits.
    """
    now, _ = cells_now([(name, None) for name in cell_ids], sweep_dir)
    live = [name for name in cell_ids if now[name].state in (State.RUNNING, State.SUBMITTED)]
    ledger, done = Ledger(sweep_dir), dict[str, str]()
    records = ledger.read()
    waiting = [
        name
        for name in cell_ids
        if name not in live and name in records and records[name].waits_here and now[name].state != State.DONE
    ]
    if live or waiting:
        ledger.cancelled([*live, *waiting])
    done |= dict.fromkeys(waiting, "taken off the list of the sweep here")
    for name in live:
        job_id = records[name].job_id if name in records else None
        holder = live_holder(run_directory(sweep_dir, name))
        if job_id is not None:
            done[name] = f"scancel {job_id}"
        elif holder is not None and holder["host"] == socket.gethostname():
            os.kill(int(holder["pid"]), signal.SIGTERM)
            done[name] = f"SIGTERM to process {holder['pid']}"
        elif holder is not None:
            done[name] = f"runs as process {holder['pid']} on {holder['host']}: stop it there"
    Slurm().cancel([word.split()[1] for word in done.values() if word.startswith("scancel")])
    return done
