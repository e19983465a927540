"""chain: target -> plan, price, question, jobs, and on this machine all the way to the report. Called by cli.

Everything slow is imported by the function that needs it.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.errors import ExitCode, UserError, unknown

if TYPE_CHECKING:
    from dlm.cluster import Slurm
    from dlm.collect import Collected
    from dlm.plan import Cell, Plan
    from dlm.sweep import SweepSpec


class Stop(Exception):
    """End the command with this exit code; everything has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


MIN_SIZES = 4  # of one budget: fewer make no isoFLOP parabola with an error
LAUNCHERS = ("auto", "submitit_slurm", "submitit_local")
LAUNCHER_KEY = "hydra.launcher."


@dataclass(frozen=True)
class Chosen:
    """What a target stands for: the folder, the definition, and the plan that is to be carried out."""

    sweep_dir: Path
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class How:
    """What `dlm submit` and `dlm sweep` are told beside the plan."""

    launcher: str = "auto"
    yes: bool = False
    retry_failed: bool = False
    allow_dirty: bool = False
    max_gpu_hours: float | None = None  # None: the definition's
    extra: Sequence[str] = ()  # Hydra overrides of every job


def by_name(target: str) -> str:
    """A sweep in workdir/ by its name alone, where no definition has that name; else ``target`` as it is."""
    from dlm import locate

    folder = locate.workdir() / target
    is_name = Path(target).name == target and not (locate.sweeps_dir() / f"{target}.yaml").is_file()
    return str(folder) if is_name and is_sweep_dir(str(folder)) else target


def check_overrides(words: Sequence[str]) -> None:
    """Raise UserError for an override of every job that would change what a planned cell is, or how it is launched."""
    from dlm.plan import DECIDING

    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key == "hydra/launcher":
            raise UserError(f"--override {word}: choose the launcher with --launcher")
        top = key.split(".")[0]
        decides = top in (*DECIDING, "training", "validation", "seed", "recipe") or key == "trainer.precision"
        if decides and key not in ("data.micro_batch_size", "data.num_workers", "data.data_dir"):
            raise UserError(f"--override {word} would change the result of planned cells: use --set {word.lstrip('+')}")


def is_sweep_dir(target: str) -> bool:
    return (Path(target) / "plan.json").is_file()


def _definition(
    target: str, budgets: Sequence[str] | None, top: str | None, settings: Sequence[str] | None
) -> SweepSpec:
    from dlm.flops import check_budget
    from dlm.sweep import find_definition, load_sweep

    if Path(target).is_dir():
        raise UserError(f"{target} holds no plan.json: give a definition (sweeps/*.yaml) or a sweep's folder")
    spec = load_sweep(find_definition(target), settings or ())
    if budgets and top is not None:
        raise UserError("--budget and --top-budget exclude each other: give one of them")
    if budgets:
        spec = spec.with_budgets(check_budget(budget, "--budget") for budget in budgets)
    if top is not None:
        highest = check_budget(top, "the top budget (BUDGET, --top-budget)")
        spec = spec.with_budgets(highest * fraction for fraction in spec.budget_fractions)
    return spec


def choose(
    target: str,
    budgets: Sequence[str] | None = None,
    top: str | None = None,
    settings: Sequence[str] | None = None,
) -> Chosen:
    """Plan a definition, or read the plan of a folder."""
    from dlm import locate
    from dlm.plan import make_plan, read_plan, with_estimates

    target = by_name(target)
    if is_sweep_dir(target):
        if budgets or top is not None or settings:
            raise UserError(f"{target} is planned already: give its definition to change --budget or --set")
        return Chosen(Path(target), with_estimates(read_plan(Path(target))))
    spec = _definition(target, budgets, top, settings)
    return Chosen(locate.workdir() / spec.name, with_estimates(make_plan(spec)))


def existing(target: str) -> Chosen:
    """The sweep folder behind a target, for the verbs that come after planning."""
    from dlm import locate
    from dlm.plan import read_plan

    target = by_name(target)
    sweep_dir = Path(target)
    if not is_sweep_dir(target) and not sweep_dir.is_dir():
        sweep_dir = locate.workdir() / _definition(target, None, None, None).name
    return Chosen(sweep_dir, read_plan(sweep_dir))


def run_folder(target: str) -> Path:
    """The folder behind a target that may hold runs without a plan: those that `python -m dlm.launch` started."""
    folder = Path(by_name(target))
    return folder if (folder / "runs").is_dir() else existing(target).sweep_dir


def warn(line: str) -> None:
    print(f"dlm: warning: {line}", file=sys.stderr)


def data_nodes(plan: Plan) -> list[dict[str, Any]]:
    """The data that the cells read, each once."""
    from dlm.plan import data_node

    nodes = [data_node(cell.groups, cell.overrides) for cell in plan.cells]
    return list({repr(node): node for node in nodes}.values())


def warn_unprepared(plan: Plan) -> None:
    from dlm.manifest import unprepared

    nodes = data_nodes(plan) if plan.data_hash is None else []
    missing = [(node, folder) for node in nodes for folder in unprepared(node)]
    if missing:
        node, folder = missing[0]
        warn(
            f"the data {node['name']} are not prepared in {folder}: epochs are unknown and the cell ids "
            f"are a preview; `dlm prepare {node.get('prepare') or 'packed DIR'}` makes them"
        )


def _launcher(name: str) -> str:
    """submitit_slurm or submitit_local; auto asks for a controller."""
    if name not in LAUNCHERS:
        raise unknown("launcher", name, LAUNCHERS)
    if name != "auto":
        return name
    from dlm.cluster import slurm_answers

    return "submitit_slurm" if slurm_answers() else "submitit_local"


def _slurm(how: How) -> Slurm:
    """The cluster of configs/hydra/launcher/submitit_slurm.yaml with ``hydra.launcher.KEY=VALUE`` over it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from dlm.cluster import Slurm, slurm_settings
    from dlm.groups import load_choice

    words = [word for word in how.extra if word.startswith(LAUNCHER_KEY)]
    try:
        given = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(words)}
    except HydraException as error:
        raise UserError(f"{' '.join(words)} is not in Hydra's grammar: {' '.join(str(error).split())}") from error
    facts = OmegaConf.create(dict(load_choice("hydra/launcher", "submitit_slurm")))
    for key, value in given.items():
        OmegaConf.update(facts, key.removeprefix(LAUNCHER_KEY), value)
    values: dict[str, Any] = OmegaConf.to_container(facts)  # type: ignore[assignment]
    return Slurm(slurm_settings({**values, **({"allow_dirty": True} if how.allow_dirty else {})}))


def _prepared(chosen: Chosen) -> Chosen:
    """Make sure of the data, and plan again where their hash has changed the ids. Raises UserError."""
    from dlm.manifest import unprepared
    from dlm.plan import make_plan, with_estimates

    for node in data_nodes(chosen.plan):
        for folder in unprepared(node):
            _prepare_data(node, folder)
    if chosen.plan.data_hash is not None:
        return chosen
    return Chosen(chosen.sweep_dir, with_estimates(make_plan(chosen.plan.spec)))


def _prepare_what_dlm_can(chosen: Chosen) -> Chosen:
    """Make missing data that dlm makes itself, in seconds, so that the plan shown has the ids that will run."""
    if chosen.plan.data_hash is None and all(node.get("prepare") for node in data_nodes(chosen.plan)):
        return _prepared(chosen)
    return chosen


def _prepare_data(node: Mapping[str, Any], folder: Path) -> None:
    if node.get("prepare") is None:
        raise UserError(
            f"the data {node['name']} are not prepared in {folder}: prepare text with `dlm prepare text SOURCE --out "
            f"{folder}`, or put LITPKDS files there and run `dlm prepare packed {folder}`, or choose other data "
            "(groups.data)"
        )
    print(f"preparing {node['name']} ...", flush=True)
    code = training_command("dlm.datamodules.prepare", [node["prepare"], str(folder)])
    if code:
        raise Stop(code)


def training_command(module: str, arguments: Sequence[str]) -> int:
    """Run a command of the training half in a process of its own: that half is never imported here."""
    return subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode


def _measured(plan: Plan) -> dict[str, float]:
    """Training FLOP/s of one core of this machine, measured now: model -> rate."""
    from dlm.estimate import measure_flops_per_sec, measured_models

    models = measured_models([cell.model for cell in plan.cells])
    rates = measure_flops_per_sec(models, block_size=max(cell.block_size for cell in plan.cells))
    shown = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in rates.items())
    print(f"measured here, one core: {shown} GFLOP/s", flush=True)
    return rates


def left_to_do(chosen: Chosen) -> list[Cell]:
    """The cells without the result of their planned last step."""
    from dlm.ledger import finished, run_directory

    return [
        cell
        for cell in chosen.plan.cells
        if finished(run_directory(chosen.sweep_dir, cell.cell_id), cell.cell_id, cell.steps) is None
    ]


def _local_hours(cells: Sequence[Cell], at_once: int) -> float:
    """Wall hours of ``cells``, ``at_once`` at a time."""
    hours = [cell.hours or 0.0 for cell in cells]
    return max(sum(hours) / at_once, *hours)


def _refuse_unpayable(chosen: Chosen, on_cluster: Plan, at_once: int) -> None:
    """Raise UserError when this machine would take longer than the definition allows; says what would do."""
    from dlm.identity import format_flops
    from dlm.screen import duration

    spec, hours = chosen.plan.spec, _local_hours(left_to_do(chosen), at_once)
    if hours <= spec.max_local_hours:
        return
    gpu_hours = sum(cell.gpu_hours or 0 for cell in on_cluster.cells)
    there = f" (about {gpu_hours:,.3g} GPU-hours on {spec.hardware.device})" if gpu_hours else ""
    smaller = max(spec.budgets) * spec.max_local_hours / hours
    unprepared = f" ({chosen.plan.data} has to be prepared first)" if chosen.plan.data_hash is None else ""
    raise UserError(
        f"this machine would train {len(chosen.plan.cells)} cells of up to {format_flops(max(spec.budgets))} FLOPs for "
        f"about {duration(hours)}, {at_once} at a time at the rate measured just now; max_local_hours is "
        f"{spec.max_local_hours:g}. Nothing was started. What would do: a SLURM cluster{there} with "
        f"LAUNCHER=submitit_slurm{unprepared}, or a smaller budget: {_smaller_budget(spec, smaller)}"
    )


def _smaller_budget(spec: SweepSpec, budget: float) -> str:
    """A budget of this definition that can be paid here and still gives a law; else the demo."""
    from dlm.identity import format_flops
    from dlm.plan import make_plan

    rounded = float(f"{budget:.0e}")
    try:
        plan = make_plan(spec.with_budgets(rounded * fraction for fraction in spec.budget_fractions))
        curves = Counter(cell.budget_flops for cell in plan.cells)
    except UserError:  # no cell is left
        curves = Counter()
    if sum(sizes >= MIN_SIZES for sizes in curves.values()) < 2:  # a line through isoFLOP minima needs two
        return f"`make sweep` alone runs the demo (the models of {spec.name} need more than what is payable here)"
    return f"BUDGET={format_flops(rounded)}, or `make sweep` alone for the demo"


def _agree(chosen: Chosen, how: How) -> float | None:
    """Ask on a terminal; without one go ahead within max_gpu_hours. The GPU-hours that the sweep may then use.

    Raises UserError for what costs more than it may.
    """
    from dlm.record import gpu_hours_used

    spec = chosen.plan.spec
    used = gpu_hours_used(chosen.sweep_dir)
    gpu_hours = used + sum((cell.gpu_hours or 0) * _share_left(chosen, cell) for cell in left_to_do(chosen))
    if how.max_gpu_hours is not None and not any(cell.gpu_hours for cell in chosen.plan.cells):
        warn("this plan asks for no GPUs, so --max-gpu-hours limits nothing")
    priced = f"{f'{used:,.4g} used and ' if used else ''}{gpu_hours - used:,.4g} GPU-hours to go"
    if how.max_gpu_hours is not None and gpu_hours > how.max_gpu_hours:
        raise UserError(
            f"{priced} are more than --max-gpu-hours {how.max_gpu_hours:,.4g}: raise it, or lower the budget"
        )
    beyond = spec.max_gpu_hours is not None and gpu_hours > spec.max_gpu_hours
    if not how.yes and sys.stdin.isatty() and sys.stdout.isatty():
        import typer

        typer.confirm("Start it?", default=True, abort=True)
    elif not how.yes and beyond and how.max_gpu_hours is None:
        raise UserError(
            f"the plan costs {gpu_hours:,.4g} GPU-hours, max_gpu_hours is {spec.max_gpu_hours:,.4g}: "
            "confirm with YES=1 (--yes), lower the budget or raise max_gpu_hours"
        )
    if how.max_gpu_hours is not None:
        return how.max_gpu_hours
    return None if beyond else spec.max_gpu_hours


def _share_left(chosen: Chosen, cell: Cell) -> float:
    """Of a cell's steps, the share that is still to be done: the rest is in the GPU-hours used."""
    from dlm.ledger import run_directory
    from dlm.record import read_status

    status = read_status(run_directory(chosen.sweep_dir, cell.cell_id))
    return 1.0 if status is None else 1 - min(status.step, cell.steps) / cell.steps


def _run_local(chosen: Chosen, how: How) -> int:
    """Train every cell here; the exit code of the first that did not end well. Raises Stop when interrupted."""
    from dlm import locate
    from dlm.pool import LocalPool
    from dlm.screen import LocalProgress
    from dlm.submit import submit_plan

    with LocalProgress(chosen.plan, chosen.sweep_dir) as progress:
        done = submit_plan(
            chosen.plan,
            chosen.sweep_dir,
            cluster=LocalPool(),
            data_dir=locate.data_dir(),
            extra=how.extra,
            retry_failed=how.retry_failed,
            on_event=progress.on_event,
            on_tick=progress.on_tick,
        )
    skipped = [f"{name}: {reason}" for name, reason in done.skipped.items() if reason != "done"]
    for line in skipped:
        warn(f"not started: {line}")
    for name, (state, reason) in done.failed.items():
        warn(f"{name} is {state}: {reason}")
    if done.interrupted:
        print("stopped; the same command goes on from the checkpoints", file=sys.stderr)
        raise Stop(ExitCode.PREEMPTED)
    code = next((code for code in done.exit_codes.values() if code), ExitCode.DONE)
    return code if code >= 0 else 128 - code


def _submit_slurm(chosen: Chosen, how: How, max_gpu_hours: float | None) -> int:
    from dlm import locate
    from dlm.submit import submit_plan

    done = submit_plan(
        chosen.plan,
        chosen.sweep_dir,
        cluster=_slurm(how),
        data_dir=locate.data_dir(),
        extra=[word for word in how.extra if not word.startswith(LAUNCHER_KEY)],
        retry_failed=how.retry_failed,
        max_gpu_hours=max_gpu_hours,
    )
    for name, reason in done.skipped.items():
        print(f"not submitted: {name}: {reason}")
    arrays = sorted({int(job_id.split("_")[0]) for job_id in done.job_ids.values()})
    print(f"submitted {len(done.submitted)} cells{' as arrays ' + ', '.join(map(str, arrays)) if arrays else ''}")
    print(f"watch it with: dlm status {chosen.sweep_dir}; when it is done: dlm report {chosen.sweep_dir}")
    return ExitCode.DONE


def start(
    target: str,
    budget: Sequence[str] | None,
    top_budget: str | None,
    settings: Sequence[str] | None,
    how: How,
) -> tuple[Chosen, bool, int]:
    """Plan, show, price, ask, submit. Returns the sweep, whether it ran here, and the first bad exit code of a cell."""
    from dlm.plan import write_plan
    from dlm.screen import show_plan

    check_overrides(how.extra)
    local = _launcher(how.launcher) == "submitit_local"
    extra = tuple(word.lstrip("+") if word.lstrip("+").startswith(LAUNCHER_KEY) else word for word in how.extra)
    for word in extra:
        if local and word.startswith(LAUNCHER_KEY):
            raise UserError(f"{word} is for SLURM, and this would run here: set the launcher to submitit_slurm")
    chosen = _prepare_what_dlm_can(choose(target, budget, top_budget, settings))
    if not left_to_do(chosen):
        print(f"every cell of {chosen.sweep_dir} is done: nothing to train")
    elif local:
        chosen, on_cpu = _priced_here(chosen)
        extra = ("trainer=cpu", *extra) if on_cpu else extra
    else:
        show_plan(chosen.plan)
        chosen = _prepared(chosen)
    how = dataclasses.replace(how, extra=extra)
    max_gpu_hours = _agree(chosen, how) if left_to_do(chosen) else None
    chosen = Chosen(chosen.sweep_dir, write_plan(chosen.sweep_dir, chosen.plan))
    return chosen, local, _run_local(chosen, how) if local else _submit_slurm(chosen, how, max_gpu_hours)


def _priced_here(chosen: Chosen) -> tuple[Chosen, bool]:
    """The plan at this machine's price, shown, its data made sure of; and whether GPU cells have to run on the CPU.

    Raises UserError for what this machine cannot pay.
    """
    from dlm.plan import with_estimates
    from dlm.pool import visible_gpus
    from dlm.screen import duration, show_plan

    hardware = chosen.plan.spec.hardware
    gpus = [] if hardware.device == "cpu" else visible_gpus()
    at_once = max(len(gpus) // max(hardware.gpus_per_node, 1), 1) if gpus else len(os.sched_getaffinity(0))
    rates = None if gpus else _measured(chosen.plan)
    priced = Chosen(chosen.sweep_dir, with_estimates(chosen.plan, rates=rates))
    show_plan(priced.plan)
    _refuse_unpayable(priced, chosen.plan, at_once)
    hours = duration(_local_hours(left_to_do(priced), at_once))
    print(f"about {hours} of training here, {at_once} cells at a time, and some seconds to start each")
    prepared = _prepared(chosen)
    return Chosen(chosen.sweep_dir, with_estimates(prepared.plan, rates=rates)), hardware.device != "cpu" and not gpus


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where `dlm collect` looks beside a sweep's folder."""

    project: str | None  # ENTITY/PROJECT on a W&B server
    filters: Sequence[str]  # KEY=VALUE
    mapping: Path | None
    out: Path | None


def collect(target: str | None, source: Source, *, verify: bool) -> tuple[Path, Collected]:
    """(folder, what was collected into it): of a sweep, of a W&B project, or of both."""
    from dlm.cells import sweep_names
    from dlm.collect import collect as collect_runs
    from dlm.collect import collect_mapped
    from dlm.groups import parse_yaml

    if source.project is None:
        for name, value in (("--mapping", source.mapping), ("--filter", source.filters), ("--out", source.out)):
            if value:
                raise UserError(f"{name} is for the runs of a W&B project: give --wandb ENTITY/PROJECT too")
    if source.mapping is not None and verify:
        raise UserError("--verify is for runs that dlm launched: with --mapping there is nothing to compare them with")
    if (target is None) != (source.out is not None) or (target and source.mapping):
        raise UserError(
            "give a sweep, or --wandb ENTITY/PROJECT with --out DIR (and --mapping FILE for runs that dlm did not "
            "launch)"
        )
    folder = run_folder(target) if target is not None else Path(str(source.out))
    if source.project is None:
        return folder, collect_runs(folder, verify=verify)
    _check_out(folder)
    filters = {"group": {"$in": sweep_names(folder)}} if target is not None else {}
    for word in source.filters:
        key, separator, value = word.partition("=")
        if not separator:
            raise UserError(f"--filter {word}: give KEY=VALUE, for instance state=finished")
        filters[key] = parse_yaml(value, f"--filter {word}")
    if source.mapping is not None:
        from dlm.mapping import check_keys, load_mapping

        mapping = load_mapping(source.mapping)
    from dlm.wandb_api import Project

    server = Project(source.project, filters=filters)
    if not server.runs and target is None:
        raise UserError(f"{source.project} has no run that {filters or 'it was asked for'} names: nothing was written")
    if source.mapping is not None:
        check_keys(mapping, server.runs.values(), source.project)
        return folder, collect_mapped(server, mapping, folder)
    return folder, collect_runs(folder, verify=verify, server=server)


def _check_out(folder: Path) -> None:
    """Raises UserError when the tables could not be written once everything has been asked for."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "no folder" if not there.is_dir() else "not writable"
        raise UserError(f"the tables were to go to {folder}, but {there} is {what}: give a folder to write to")


def report(sweep_dir: Path, *, bootstrap: int = 4000) -> Path:
    """Collect, fit and write the report; says what was left out and where the report is."""
    from dlm.collect import collect
    from dlm.fit.table import fit_sweep
    from dlm.plan import read_plan
    from dlm.report import write_fits, write_report

    plan = read_plan(sweep_dir)
    collected = collect(sweep_dir)
    for warning in collected.warnings:
        warn(warning)
    for row in collected.excluded.to_dict("records"):
        print(f"left out {row['run_id']}: {row['reason']}")
    print(f"collected {len(collected.runs)} runs, left out {len(collected.excluded)}: {sweep_dir / 'runs.csv'}")
    if collected.runs.empty:
        raise UserError(f"no run of {sweep_dir} can be used: see the reasons in {sweep_dir / 'excluded.csv'}")
    print("fitting ...", flush=True)
    fits = fit_sweep(collected.runs, bootstrap=bootstrap)
    write_fits(sweep_dir, fits)
    facts = {"budgets": len(plan.spec.budgets), "cells": len(plan.cells), "data": plan.data}
    path = write_report(
        sweep_dir,
        collected.runs,
        collected.excluded,
        fits,
        title=plan.spec.description or plan.spec.name,
        facts=facts,
    )
    for fit in fits.values():
        print(fit.report())
    print(f"report: {path}")
    return path
