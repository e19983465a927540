"""Start a sweep: prepare its data, plan it, find the states of its cells, estimate the cost, ask, and run or submit.

The verbs import this file only when they start something, so its own imports may be slow.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from dlm.cli.launcher import LAUNCHER_KEY, chosen, is_local, pool_of, slurm_of
from dlm.cli.options import StartOptions
from dlm.cli.price import agree_on_cost, price_here
from dlm.cli.progress import LocalProgress, alone_line
from dlm.cli.proof import missing_forecasts, waits_for, with_proof
from dlm.cli.screen import show_plan
from dlm.cli.table import say
from dlm.cli.targets import Sweep, check_classes, data_nodes, planned, read_or_prepare, warn
from dlm.core import paths, text
from dlm.core.configs import load_base
from dlm.core.errors import ExitCode, UserError, unknown
from dlm.core.limits import check_override_extents
from dlm.data.prepare.command import ensure_data
from dlm.plan import cost, grid
from dlm.plan.cells import Plan
from dlm.plan.grid import DECIDING
from dlm.plan.proof import expected_proof
from dlm.plan.store import read_plan, with_earlier_cells, with_proof_cells, write_plan
from dlm.record.outcomes import OUTCOMES, State
from dlm.submit.cell_now import CellNow
from dlm.submit.cells import submit_plan
from dlm.submit.cluster import Event, Submission
from dlm.submit.job import SETTING_NAMES, with_changes
from dlm.submit.ledger import Ledger
from dlm.submit.local import LocalPool
from dlm.submit.state import cells_now

HARMLESS_DATA_KEYS = ("data.micro_batch_size", "data.num_workers", "data.data_dir")


@dataclass(frozen=True, kw_only=True)
class Started:
    """What a command has started."""

    sweep: Sweep
    ran_here: bool  # on this machine, to the end
    code: int  # the exit code with which the command must end
    postponed: bool = False  # cells wait for something before they can be submitted


def start(
    options: StartOptions, *, unattended: bool = False, before_first: Callable[[Path], None] = lambda folder: None
) -> Started:
    """Plan a sweep, show its cost, ask for confirmation, and start the cells that are not done.

    When the other cells are done, the forecast of the proof run is frozen and the proof run is started, on this machine
    at once, and through SLURM at the next start.

    Args:
        options: The options of the command.
        unattended: The follower of the sweep starts it, and nobody has asked for it now; see ``retry.why_not``.
        before_first: Called with the folder of the sweep before its first job is put into a queue.
    """
    launcher = chosen(options.launcher)
    is_here = is_local(launcher)
    if is_here and options.max_gpus is not None:
        raise UserError("--max-gpus is for SLURM, and this would run here: set the launcher to submitit_slurm")
    overrides, settings = _split(options.overrides, is_here)
    sweep = _planned_with_data(options)
    sweep = Sweep(sweep.folder, with_earlier_cells(sweep.folder, sweep.plan))
    check_classes(sweep.plan, options, overrides)
    now = look(sweep)
    # Other cells come before the proof run.
    is_first = bool(waits_for(sweep, now, retry_failed=options.retry_failed, unattended=unattended))
    if not is_first:
        sweep = with_proof(sweep, now)
        now |= look(sweep, known=now)
    only = _cells_of(options, sweep.plan)
    if not is_here:  # checked before anybody has to agree on the cost
        cluster = slurm_of(settings, allow_dirty=options.allow_dirty, launcher=launcher, sweep=sweep.folder)
        for rule in sweep.plan.spec.launcher:
            with_changes(cluster.settings, rule.set)
    plan, more, max_gpu_hours = _agreed(sweep, now, options, is_here, only, shows_plan=not unattended)
    sweep = Sweep(sweep.folder, write_plan(sweep.folder, plan))
    now |= look(sweep, known=now)  # the states of the cells that the sweep keeps from an earlier plan
    submit = functools.partial(
        submit_plan,
        data_dir=paths.data_dir(),
        extra=[*more, *overrides],
        retry_failed=options.retry_failed,
        unattended=unattended,
        only=only,
        pilot=options.pilot,
        max_gpu_hours=max_gpu_hours,
    )
    if not is_here:
        announce = functools.partial(before_first, sweep.folder)
        done = submit(sweep.plan, sweep.folder, cluster=cluster, now=now, before_first=announce, on_event=_show_alone)
        _show_submitted(done, sweep.folder)
        if is_first and missing_forecasts(sweep):
            say("the proof run follows: run the same command again when these cells are done")
        return Started(sweep=sweep, ran_here=False, code=_code_of_rest(done, now), postponed=bool(done.postponed))
    has_more = any(cell.result is None for cell in now.values())
    pool = pool_of(launcher, sweep.folder) if has_more else LocalPool()
    code = _run_here(sweep, now, submit, pool)
    if not is_first or not missing_forecasts(sweep):
        return Started(sweep=sweep, ran_here=True, code=code)
    now = look(sweep)
    if waiting := waits_for(sweep, now):
        say(f"the proof run waits for cells that are not done ({', '.join(waiting)}): run the same command again")
        return Started(sweep=sweep, ran_here=True, code=code)
    sweep = with_proof(sweep, now)
    now |= look(sweep, known=now)
    if any(cell.is_proof for cell in sweep.plan.cells):
        code = _run_here(sweep, now, functools.partial(submit, retry_failed=False), pool) or code
    return Started(sweep=sweep, ran_here=True, code=code)


def _cells_of(options: StartOptions, plan: Plan) -> set[str]:
    """Return the ids of the cells that --cell names, and of the trunks they branch from; empty for all cells.

    Raises UserError for a word that names no cell, or several.
    """
    found = set[str]()
    for word in options.cell or ():
        cells = [cell for cell in plan.cells if word == cell.cell_id] or [c for c in plan.cells if word in c.cell_id]
        if len(cells) != 1:
            ids = [cell.cell_id for cell in plan.cells]
            if not cells:
                raise unknown("cell", word, ids)
            some = ", ".join(cell.cell_id for cell in cells[:3])
            raise UserError(f"--cell {word} names {len(cells)} cells ({some}, ...): give more of the id")
        found |= {name for name in (cells[0].cell_id, cells[0].parent) if name is not None}
    return found


def _run_here(sweep: Sweep, now: Mapping[str, CellNow], submit: Callable[..., Submission], pool: LocalPool) -> int:
    """Run the cells of a sweep that are not done on this machine, and return the exit code of the command."""
    ledger = Ledger(sweep.folder)
    before, plan = ledger.cancelled_now(), sweep.plan
    while True:
        with LocalProgress(sweep, now) as progress:
            done = submit(
                plan,
                sweep.folder,
                cluster=pool,
                now=now,
                on_event=progress.on_event,
                on_tick=progress.on_tick,
            )
        code = _exit_code(done) or _code_of_rest(done, now)
        if code or not done.postponed or not done.submitted:
            return code
        now = look(sweep)  # the pilot is done
        cancelled = ledger.cancelled_now() - before  # while they were postponed
        plan = dataclasses.replace(plan, cells=tuple(cell for cell in plan.cells if cell.cell_id not in cancelled))


def _agreed(
    sweep: Sweep,
    now: Mapping[str, CellNow],
    options: StartOptions,
    is_here: bool,
    only: Collection[str],
    *,
    shows_plan: bool,
) -> tuple[Plan, list[str], float | None]:
    """Show the cost of the chosen cells that are not done on the launcher, and ask whether to start them.

    Without ``shows_plan``, one line says how far the sweep is and which cells are new: the follower of a sweep looks
    every few minutes, and its log would repeat the plan each time.

    Returns:
        (the plan with its estimates, the overrides that the jobs need on this machine, the GPU-hours that the sweep may
        use in total or None for no limit).
    """
    left = {name: cell for name, cell in now.items() if cell.result is None and (not only or name in only)}
    if not left:
        say(f"every cell of {sweep.folder} is done: nothing to train")
        return cost.with_estimates(sweep.plan), [], None
    hours = None
    if is_here:
        plan, overrides, hours = price_here(sweep.plan, left=left)
    else:
        plan, overrides = cost.with_estimates(sweep.plan), []
        if shows_plan:
            show_plan(plan, proof=cost.estimated(expected_proof(plan), plan.spec.hardware))
        else:
            _show_change(sweep, now)
    for node in data_nodes(plan):
        ensure_data(node)
    return plan, overrides, agree_on_cost(plan, sweep.folder, options, left=left, local_hours=hours)


def _show_change(sweep: Sweep, now: Mapping[str, CellNow]) -> None:
    """Print how many cells are in which state, and the ids of the cells that the stored plan does not have."""
    states = ", ".join(f"{count} {state}" for state, count in Counter(str(cell.state) for cell in now.values()).items())
    say(f"{sweep.plan.spec.name}: {text.counted(len(now), 'cell')}: {states}")
    known = {cell.cell_id for cell in read_plan(sweep.folder).cells}
    for cell in sweep.plan.cells:
        if cell.cell_id not in known:
            print(f"new: {cell.cell_id}")


def check_overrides(words: Sequence[str]) -> None:
    """Raise UserError for an override that would change the result of a planned cell or that chooses the launcher."""
    check_override_extents(words)
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key == "hydra/launcher":
            raise UserError(f"--override {word}: choose the launcher with --launcher")
        if key in SETTING_NAMES and key not in load_base():
            raise UserError(f"--override {word}: no run has such a key; did you mean hydra.launcher.{word}?")
        group = key.split(".")[0]
        is_deciding = group in (*DECIDING, "training", "validation", "seed", "recipe") or key == "trainer.precision"
        if is_deciding and key not in HARMLESS_DATA_KEYS:
            raise UserError(f"--override {word} would change the result of planned cells: use --set {word.lstrip('+')}")


def _split(words: Sequence[str], is_here: bool) -> tuple[list[str], list[str]]:
    """Divide the words of --override into (overrides for the jobs, settings of the SLURM launcher).

    Raises UserError for an override that ``check_overrides`` refuses, and for a setting of SLURM if the cells run on
    this machine.
    """
    check_overrides(words)
    settings = [word.lstrip("+") for word in words if word.lstrip("+").startswith(LAUNCHER_KEY)]
    if is_here and settings:
        raise UserError(f"{settings[0]} is for SLURM, and this would run here: set the launcher to submitit_slurm")
    return [word for word in words if not word.lstrip("+").startswith(LAUNCHER_KEY)], settings


def _planned_with_data(options: StartOptions) -> Sweep:
    """Plan a sweep after preparing the data that dlm can make itself, so that the cells have their final ids."""
    sweep = planned(options, prepare=True)
    data = [read_or_prepare(node) for node in data_nodes(sweep.plan)]
    if sweep.plan.data_hash is None and None not in data:  # a stored plan that was made before its data
        sweep = Sweep(sweep.folder, grid.make_plan(sweep.plan.spec))
    return Sweep(sweep.folder, with_proof_cells(sweep.folder, sweep.plan))


def look(sweep: Sweep, known: Iterable[str] = ()) -> dict[str, CellNow]:
    """Return the current states of the cells of a sweep by cell id, without the cells that are ``known``."""
    asked = [(cell.cell_id, cell.steps) for cell in sweep.plan.cells if cell.cell_id not in known]
    return cells_now(asked, sweep.folder)[0]


def _exit_code(done: Submission) -> int:
    """Warn of cells that were not started or failed on this machine, and return the exit code of the command.

    Raises typer.Exit with ExitCode.PREEMPTED if the run was interrupted.

    Returns:
        The first exit code of a cell that is not 0, as a shell would report it (128 + n for signal n), otherwise 0.
    """
    for name, cause in done.skipped.items():
        if cause != "done":
            warn(f"not started: {name}: {cause}")
    for name, (state, reason) in done.failed.items():
        warn(f"{name} is {state}: {reason}")
    if done.interrupted:
        print("stopped; the same command continues from the checkpoints", file=sys.stderr)
        raise typer.Exit(ExitCode.PREEMPTED)
    code = next((code for code in done.exit_codes.values() if code), ExitCode.DONE)
    return code if code >= 0 else 128 - code


def _code_of_rest(done: Submission, now: Mapping[str, CellNow]) -> int:
    """Return 0 if anything is left of what the command was to start: a cell that is done, waits, runs or is to start.

    Otherwise every cell has failed and is not to be tried again; the exit code is that of the first failure.

    Args:
        done: The outcome of the submission.
        now: The states of all cells before it.
    """
    left = [now[name] for name in done.skipped]
    if done.submitted or done.postponed or any(cell.state is State.DONE or cell.is_live for cell in left):
        return ExitCode.DONE
    return next((code for cell in left if (code := OUTCOMES[cell.state].exit_code)), ExitCode.DONE)


def _show_alone(event: Event) -> None:
    if event.kind == "alone" and event.job.awaits is not None:
        print(alone_line(event.job.run_dir, event.job.awaits))


def _show_submitted(done: Submission, folder: Path) -> None:
    """Print how many cells were submitted to SLURM, which cells were not and why, and what to do next."""
    for name, reason in done.skipped.items():
        print(f"not submitted: {name}: {reason}")
    for reason, count in Counter(done.postponed.values()).items():
        cells = "1 cell is" if count == 1 else f"{count} cells are"
        print(f"{cells} submitted later, by the job that looks after the sweep or by the same command: {reason}")
    as_arrays = f" as arrays {', '.join(done.arrays)}" if done.arrays else ""
    print(f"submitted {text.counted(len(done.submitted), 'cell')}{as_arrays}")
    if done.submitted or done.postponed:
        print(f"watch it with: dlm status {folder}; when it is done: dlm report {folder}")
