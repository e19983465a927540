"""Start a sweep: prepare its data, plan it, find the states of its cells, estimate the cost, ask, and run or submit.

The verbs import this file only when they start something, so its own imports may be slow.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import typer

from dlm.cli.options import StartOptions
from dlm.cli.price import agree_on_cost, price_here
from dlm.cli.proof import missing_forecasts, waits_for, with_proof
from dlm.cli.screen import LocalProgress, show_plan
from dlm.cli.targets import Sweep, data_nodes, planned, read_or_prepare, warn
from dlm.core import paths
from dlm.core.configs import load_choice, merge, nest
from dlm.core.errors import ExitCode, UserError, unknown
from dlm.data.prepare.command import ensure_data
from dlm.plan import cost, grid
from dlm.plan.cells import Plan
from dlm.plan.grid import DECIDING
from dlm.plan.proof import expected_proof
from dlm.plan.store import with_earlier_cells, with_proof_cells, write_plan
from dlm.submit.cell_now import CellNow
from dlm.submit.cells import submit_plan
from dlm.submit.cluster import Submission
from dlm.submit.job import slurm_settings
from dlm.submit.local import LocalPool
from dlm.submit.slurm import Slurm, slurm_answers
from dlm.submit.state import cells_now

LAUNCHERS = ("auto", "submitit_slurm", "submitit_local")
LAUNCHER_KEY = "hydra.launcher."
HARMLESS_DATA_KEYS = ("data.micro_batch_size", "data.num_workers", "data.data_dir")


def start(options: StartOptions, *, unattended: bool = False) -> tuple[Sweep, bool, int]:
    """Plan a sweep, show its cost, ask for confirmation, and start the cells that are not done.

    When the other cells are done, the forecast of the proof run is frozen and the proof run is started, on this machine
    at once, and through SLURM at the next start.

    Args:
        options: The options of the command.
        unattended: The follower of the sweep starts it, and nobody has asked for it now; see ``retry.why_not``.

    Returns:
        (the sweep, whether its cells ran on this machine, the exit code with which the command must end).
    """
    is_local = _is_local(options.launcher)
    overrides, settings = _split(options.override or (), is_local)
    sweep = _planned_with_data(options)
    sweep = Sweep(sweep.folder, with_earlier_cells(sweep.folder, sweep.plan))
    now = look(sweep)
    # Other cells come before the proof run.
    is_first = bool(waits_for(sweep, now, retry_failed=options.retry_failed, unattended=unattended))
    if not is_first:
        sweep = with_proof(sweep, now)
        now |= look(sweep, known=now)
    plan, more, max_gpu_hours = _agreed(sweep, now, options, is_local)
    sweep = Sweep(sweep.folder, write_plan(sweep.folder, plan))
    now |= look(sweep, known=now)  # the states of the cells that the sweep keeps from an earlier plan
    submit = functools.partial(
        submit_plan,
        data_dir=paths.data_dir(),
        extra=[*more, *overrides],
        retry_failed=options.retry_failed,
        unattended=unattended,
        max_gpu_hours=max_gpu_hours,
    )
    if not is_local:
        cluster = slurm_of(settings, allow_dirty=options.allow_dirty)
        done = submit(sweep.plan, sweep.folder, cluster=cluster, now=now)
        _show_submitted(done, sweep.folder)
        if is_first and missing_forecasts(sweep):
            print("the proof run follows: run the same command again when these cells are done")
        return sweep, False, ExitCode.DONE
    code = _run_here(sweep, now, submit)
    if not is_first or not missing_forecasts(sweep):
        return sweep, True, code
    now = look(sweep)
    if waiting := waits_for(sweep, now):
        print(f"the proof run waits for cells that are not done ({', '.join(waiting)}): run the same command again")
        return sweep, True, code
    sweep = with_proof(sweep, now)
    now |= look(sweep, known=now)
    if any(cell.is_proof for cell in sweep.plan.cells):
        code = _run_here(sweep, now, functools.partial(submit, retry_failed=False)) or code
    return sweep, True, code


def _run_here(sweep: Sweep, now: Mapping[str, CellNow], submit: Callable[..., Submission]) -> int:
    """Run the cells of a sweep that are not done on this machine, and return the exit code of the command."""
    with LocalProgress(sweep, now) as progress:
        done = submit(
            sweep.plan,
            sweep.folder,
            cluster=LocalPool(),
            now=now,
            on_event=progress.on_event,
            on_tick=progress.on_tick,
        )
    return _exit_code(done)


def _agreed(
    sweep: Sweep, now: Mapping[str, CellNow], options: StartOptions, is_local: bool
) -> tuple[Plan, list[str], float | None]:
    """Show the cost of the cells that are not done on the chosen launcher, and ask whether to start them.

    Returns:
        (the plan with its estimates, the overrides that the jobs need on this machine, the GPU-hours that the sweep may
        use in total or None for no limit).
    """
    left = {name: cell for name, cell in now.items() if cell.result is None}
    if not left:
        print(f"every cell of {sweep.folder} is done: nothing to train")
        return cost.with_estimates(sweep.plan), [], None
    hours = None
    if is_local:
        plan, overrides, hours = price_here(sweep.plan, left=left)
    else:
        plan, overrides = cost.with_estimates(sweep.plan), []
        show_plan(plan, proof=cost.estimated(expected_proof(plan), plan.spec.hardware))
    for node in data_nodes(plan):
        ensure_data(node)
    return plan, overrides, agree_on_cost(plan, sweep.folder, options, left=left, local_hours=hours)


def check_overrides(words: Sequence[str]) -> None:
    """Raise UserError for an override that would change the result of a planned cell or that chooses the launcher."""
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key == "hydra/launcher":
            raise UserError(f"--override {word}: choose the launcher with --launcher")
        group = key.split(".")[0]
        is_deciding = group in (*DECIDING, "training", "validation", "seed", "recipe") or key == "trainer.precision"
        if is_deciding and key not in HARMLESS_DATA_KEYS:
            raise UserError(f"--override {word} would change the result of planned cells: use --set {word.lstrip('+')}")


def _split(words: Sequence[str], is_local: bool) -> tuple[list[str], list[str]]:
    """Divide the words of --override into (overrides for the jobs, settings of the SLURM launcher).

    Raises UserError for an override that ``check_overrides`` refuses, and for a setting of SLURM if the cells run on
    this machine.
    """
    check_overrides(words)
    settings = [word.lstrip("+") for word in words if word.lstrip("+").startswith(LAUNCHER_KEY)]
    if is_local and settings:
        raise UserError(f"{settings[0]} is for SLURM, and this would run here: set the launcher to submitit_slurm")
    return [word for word in words if not word.lstrip("+").startswith(LAUNCHER_KEY)], settings


def _is_local(launcher: str) -> bool:
    """Whether the cells run on this machine; for ``auto``, this is the case if no SLURM controller answers."""
    if launcher not in LAUNCHERS:
        raise unknown("launcher", launcher, LAUNCHERS)
    return launcher == "submitit_local" or (launcher == "auto" and not slurm_answers())


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


def _show_submitted(done: Submission, folder: Path) -> None:
    """Print how many cells were submitted to SLURM, which cells were not and why, and what to do next."""
    for name, reason in done.skipped.items():
        print(f"not submitted: {name}: {reason}")
    arrays = sorted({int(job_id.split("_")[0]) for job_id in done.job_ids.values()})
    as_arrays = f" as arrays {', '.join(str(array) for array in arrays)}" if arrays else ""
    print(f"submitted {len(done.submitted)} cells{as_arrays}")
    print(f"watch it with: dlm status {folder}; when it is done: dlm report {folder}")


def slurm_of(words: Sequence[str], *, allow_dirty: bool) -> Slurm:
    """Return the SLURM cluster with the settings of configs/hydra/launcher/submitit_slurm.yaml.

    Args:
        words: Settings that take precedence, in the form ``hydra.launcher.KEY=VALUE``; other words are passed over.
        allow_dirty: Allow jobs with uncommitted code.

    Raises:
        UserError: A setting is not in Hydra's grammar, its key is unknown, or its value is not allowed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    words = [word.lstrip("+") for word in words if word.lstrip("+").startswith(LAUNCHER_KEY)]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise UserError(f"{' '.join(words)} is not in Hydra's grammar: {' '.join(str(error).split())}") from error
    given = nest({one.key_or_group.removeprefix(LAUNCHER_KEY): one.value() for one in overrides})
    if allow_dirty:
        given["allow_dirty"] = True
    return Slurm(slurm_settings(merge(load_choice("hydra/launcher", "submitit_slurm"), given)))
