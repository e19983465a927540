"""Submit the cells of a plan that are worth starting, and cancel cells.

A repeated submission starts no cell twice: a finished cell is skipped, a cell that runs or waits is left alone, a
partly trained cell continues from its checkpoint, and whether a failed cell is retried depends on the cause.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.core.errors import UserError
from dlm.core.lease import live_holder, stop_holder
from dlm.record.outcomes import OUTCOMES, Retry, State
from dlm.record.run import checkpoint_steps, run_directory
from dlm.submit.cell_now import CellNow
from dlm.submit.cluster import Cluster, Event, Submission
from dlm.submit.job import BranchPoint, Job, Resources, SlurmSettings, with_changes
from dlm.submit.ledger import Ledger, write_max_gpu_hours
from dlm.submit.overrides import cell_overrides, trainer_overrides
from dlm.submit.resources import cell_resources, dividing_micro_batch, largest_micro_batch, smaller_micro_batch
from dlm.submit.retry import why_memory_stays_short, why_not
from dlm.submit.state import cells_now, cluster_called
from dlm.submit.submission import submit_jobs, submitting

if TYPE_CHECKING:
    from dlm.plan.cells import Cell, Plan
    from dlm.plan.rules import LauncherRule


def submit_plan(
    plan: Plan,
    sweep_dir: Path,
    *,
    cluster: Cluster,
    data_dir: Path,
    extra: Sequence[str] = (),
    retry_failed: bool = False,
    unattended: bool = False,
    only: Collection[str] = (),
    pilot: bool = False,
    max_gpu_hours: float | None = None,
    now: Mapping[str, CellNow] | None = None,
    before_first: Callable[[], None] = lambda: None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Submission:
    """Submit every cell of a plan that is worth starting; ``why_not`` states why the other cells are skipped.

    Args:
        plan: The plan whose cells are submitted.
        sweep_dir: The folder of the sweep.
        cluster: Where the cells are to run.
        data_dir: The folder with the prepared data.
        extra: Hydra overrides for every job.
        retry_failed: Start failed cells again, whatever the cause of the failure.
        unattended: The follower of the sweep submits, and nobody has asked for it now; see ``why_not``.
        only: The ids of the cells to start; if empty, all cells.
        pilot: As long as no cell is done, start only the cheapest; the others are postponed.
        max_gpu_hours: The limit on the GPU-hours of the sweep. A queued job, also one that was queued earlier, ends at
            once if the sweep has used this many GPU-hours when the job begins.
        now: The cells as the caller has read them with ``cells_now``, so that no result is read twice. Only the
            finished cells count, because another command may have started the others in the meantime.
        before_first: Called before the first job is put into a queue.
        on_event: Called when a job on this machine starts or ends.
        on_tick: Called several times a second while jobs run on this machine.

    Raises:
        UserError: The cluster refuses the jobs, or a cell cannot run on the cluster.
    """
    with submitting(cluster, sweep_dir):
        if cluster.queues and not unattended:
            write_max_gpu_hours(sweep_dir, max_gpu_hours)
        known = {name: cell for name, cell in (now or {}).items() if cell.state is State.DONE}
        unknown = [(cell.cell_id, cell.steps) for cell in plan.cells if cell.cell_id not in known]
        known |= cells_now(unknown, sweep_dir, repair=cluster.queues)[0]
        starter = _Starter(
            sweep_dir=sweep_dir,
            data_dir=data_dir,
            cluster=cluster,
            extra=extra,
            retry_failed=retry_failed,
            unattended=unattended,
        )
        chosen = [cell for cell in plan.cells if not only or cell.cell_id in only]
        found = {cell.cell_id: starter.job_or_reason(cell, plan.spec.launcher, known) for cell in chosen}
        jobs = [job for job in found.values() if isinstance(job, Job)]
        if any(cell.parent is not None for cell in plan.cells):
            jobs = _trunks_first(jobs, plan)
        postponed, refused = dict[str, str](), dict[str, str]()
        if pilot:
            jobs, postponed, refused = _pilot_first(jobs, plan, known)
        live = [cell for cell in known.values() if cell.is_live]
        done = submit_jobs(
            jobs,
            cluster=cluster,
            sweep_dir=sweep_dir,
            live=live,
            before_first=before_first,
            on_event=on_event,
            on_tick=on_tick,
        )
    not_worth = {name: why for name, why in found.items() if isinstance(why, str)}
    return dataclasses.replace(
        done, skipped={**not_worth, **refused, **done.skipped}, postponed={**postponed, **done.postponed}
    )


def _pilot_first(
    jobs: Sequence[Job], plan: Plan, states: Mapping[str, CellNow]
) -> tuple[list[Job], dict[str, str], dict[str, str]]:
    """Return (the jobs to start now, why others are postponed, why others are not started at all).

    The pilot is the cheapest cell that starts from nothing. Once a cell is done, all start. While the pilot waits or
    runs, or if it has failed and is not to be tried again, no other cell starts.
    """
    if not jobs or any(cell.state is State.DONE for cell in states.values()):
        return list(jobs), {}, {}
    names = {job.name for job in jobs}
    live = [name for name, cell in states.items() if cell.is_live]
    failed = [name for name, cell in states.items() if cell.record.submissions and name not in names]
    if failed and not live:
        now = states[failed[0]]
        return [], {}, dict.fromkeys(names, f"the pilot {failed[0]} is {now.state} ({now.reason})")
    cost = _cost_in(plan)
    pilot = live[0] if live else min(jobs, key=lambda job: (job.awaits is not None, cost(job))).name
    first = [job for job in jobs if job.name == pilot]
    return first, {job.name: f"the pilot {pilot} comes first" for job in jobs if job.name != pilot}, {}


def _cost_in(plan: Plan) -> Callable[[Job], float]:
    """Return a function that gives the FLOPs of a job of the plan."""
    flops = {cell.cell_id: cell.flops["full_masked_head"] * cell.own_share for cell in plan.cells}
    return lambda job: flops[job.name]


def _trunks_first(jobs: Sequence[Job], plan: Plan) -> list[Job]:
    """Return the jobs in the order in which they start: first the cells that wait for no trunk, then the branches.

    Among each of these, the longest comes first. A long cell that begins last would leave the other cores idle.
    """
    cost = _cost_in(plan)
    return sorted(jobs, key=lambda job: (job.awaits is not None, -cost(job)))


@dataclass(frozen=True, kw_only=True)
class _Starter:
    """Decides for each cell of a submission whether to start it, and makes the job of the cell."""

    sweep_dir: Path
    data_dir: Path
    cluster: Cluster
    extra: Sequence[str]
    retry_failed: bool
    unattended: bool
    time_limits: dict[str | None, int | None] = field(default_factory=dict)  # by partition, in minutes

    def job_or_reason(self, cell: Cell, rules: Sequence[LauncherRule], states: Mapping[str, CellNow]) -> Job | str:
        """Return the job of a cell, or the reason why the cell is not started.

        Args:
            cell: The cell.
            rules: The rules of the definition for the launcher's keys.
            states: The states of all cells.
        """
        now = states[cell.cell_id]
        reason = why_not(now, retry_failed=self.retry_failed, unattended=self.unattended)
        if reason is not None and not self._can_be_waited_for(now, cell.cell_id):
            return reason
        mine = [rule.set for rule in rules if self.cluster.queues and rule.holds_for(cell.num_params)]
        changes = {key: value for rule in mine for key, value in rule.items()}
        settings = with_changes(self.cluster.settings, changes) if changes else self.cluster.settings
        micro_batch = now.record.micro_batch
        max_time_min = self._max_time_min(settings)
        resources = cell_resources(cell, settings, max_time_min=max_time_min, extra=self.extra)
        if OUTCOMES[now.state].retry is Retry.HALVE:
            smaller = smaller_micro_batch(cell, resources, micro_batch)
            reason = why_memory_stays_short(now, resources, settings, micro_batch=smaller)
            if reason is not None and not self.retry_failed:
                return reason
            micro_batch = smaller or 1
        return dataclasses.replace(
            self._job(cell, now, resources, micro_batch),
            awaits=self._awaited(cell, states.get(cell.parent or "")),
            settings=settings if changes else None,
        )

    def _max_time_min(self, settings: SlurmSettings) -> int | None:
        """Return the longest time limit of a job with these settings, and ask the cluster once for each partition."""
        if settings.partition not in self.time_limits:
            self.time_limits[settings.partition] = self.cluster.max_time_min(settings)
        return self.time_limits[settings.partition]

    def _awaited(self, cell: Cell, trunk: CellNow | None) -> BranchPoint | None:
        """Return what a branch has to wait for; None if the checkpoint to start from is there, its own or the trunk's.

        Args:
            cell: The cell.
            trunk: The state of its trunk; None for a cell that is no branch.
        """
        if cell.parent is None or cell.branch_step is None or trunk is None:
            return None
        has_own = checkpoint_steps(run_directory(self.sweep_dir, cell.cell_id))
        if has_own or cell.branch_step in checkpoint_steps(run_directory(self.sweep_dir, cell.parent)):
            return None
        job_id = trunk.record.job_id if trunk.job is not None and trunk.job.is_live else None
        return BranchPoint(trunk=cell.parent, step=cell.branch_step, job_id=job_id)

    def _can_be_waited_for(self, now: CellNow, cell_id: str) -> bool:
        """Whether a process runs the cell and the cluster waits for this process before it decides about the cell."""
        is_run_here = now.state is State.RUNNING and not self.cluster.queues
        return is_run_here and live_holder(run_directory(self.sweep_dir, cell_id)) is not None

    def _job(self, cell: Cell, now: CellNow, resources: Resources, micro_batch: int | None) -> Job:
        """Make the job of a cell; nothing is queued yet.

        Raises UserError when the number of devices does not divide the batch size of the cell.
        """
        largest_micro_batch(cell, resources)
        is_chosen = any(item.lstrip("+~").startswith("trainer=") for item in self.extra)
        trainer = () if is_chosen else trainer_overrides(resources, str(cell.groups.get("trainer", "cpu")))
        words = [*trainer, *self.extra]
        if cell.parent is not None:  # the plan may give the cell another trunk before the job starts
            words += [f"parent={cell.parent}", f"branch_step={cell.branch_step}"]
        if micro_batch is not None:  # the number of devices may differ from that of the job that ran out of memory
            micro_batch = dividing_micro_batch(cell, resources, at_most=micro_batch)
            words.append(f"data.micro_batch_size={micro_batch}")
        return Job(
            name=cell.cell_id,
            overrides=cell_overrides(cell.cell_id, sweep_dir=self.sweep_dir, data_dir=self.data_dir, extra=words),
            run_dir=run_directory(self.sweep_dir.absolute(), cell.cell_id),
            resources=resources,
            steps=cell.steps,
            was=None if now.state is State.PLANNED else now,
            micro_batch=micro_batch,
        )


def cancel(
    cell_ids: Sequence[str], sweep_dir: Path, *, states: Sequence[State] = (), by_name: bool = False
) -> dict[str, str]:
    """Stop cells that run or wait: cancel queued jobs, and send SIGTERM to processes on this machine.

    A `dlm sweep` on this machine learns of the cancellation from the ledger: it ends the cells that it has just started
    and skips those that still wait.

    Args:
        cell_ids: The ids of the cells to stop.
        sweep_dir: The folder of the sweep.
        states: Stop only cells in these states; if empty, cells in any state.
        by_name: The user names these cells. Those that neither run nor wait are then not submitted either by the job
            that looks after the sweep, or by a multirun.

    Returns:
        Cell id -> what was done, in words.

    Raises:
        UserError: A cluster does not answer or refuses, or the ledger is damaged. In this case the ledger records no
            cell as cancelled.
    """
    Ledger(sweep_dir).check()
    now = cells_now([(name, None) for name in cell_ids], sweep_dir)[0]
    chosen = {name: cell for name, cell in now.items() if not states or cell.state in states}
    live = {name: cell for name, cell in chosen.items() if cell.is_live}
    if any(cell.is_silent for cell in live.values()):
        raise UserError("SLURM does not answer, so its jobs cannot be stopped: nothing was cancelled, try again later")
    waiting = [name for name, cell in chosen.items() if cell.record.waits_here and not cell.is_live and not cell.result]
    queued = {name: cell.record for name, cell in live.items() if cell.job is not None and cell.job.is_live}
    for cluster in {record.cluster for record in queued.values()}:
        ids = [str(record.job_id) for record in queued.values() if record.cluster == cluster]
        cluster_called(cluster).cancel(ids)
    postponed = [
        name
        for name, cell in chosen.items()
        if by_name
        and not cell.is_live
        and name not in waiting
        and why_not(cell, retry_failed=False, unattended=True) is None
    ]
    if live or waiting or postponed:
        Ledger(sweep_dir).cancelled([*live, *waiting, *postponed])
    done = dict.fromkeys(waiting, "taken off the list of the sweep here")
    done |= dict.fromkeys(postponed, "neither ran nor waited; it is not submitted until you ask for it again")
    for name in live:
        if name in queued:
            done[name] = f"cancelled job {queued[name].job_id}"
        elif (words := stop_holder(run_directory(sweep_dir, name))) is not None:
            done[name] = words
    return done
