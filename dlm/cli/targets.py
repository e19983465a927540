"""Find the sweep that a command line names: its folder, its definition, its plan and the data for its cells."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dlm.cli.table import say
from dlm.core import paths, text
from dlm.core.errors import UserError
from dlm.core.files import check_writable

if TYPE_CHECKING:
    from dlm.cli.options import DefinitionOptions
    from dlm.data.manifest import DataSet
    from dlm.plan.cells import Plan
    from dlm.plan.definition import SweepSpec
    from dlm.plan.needs import Need

DEFINITIONS = (".yaml", ".yml")  # the ends of the names of definitions


@dataclass(frozen=True)
class Sweep:
    """The folder of a sweep, and the plan that is carried out there."""

    folder: Path
    plan: Plan


def by_name(target: str) -> str:
    """Return the folder of a sweep if ``target`` is the name of a sweep in the work directory, otherwise ``target``.

    A definition of the same name in sweeps/ takes precedence; ``target`` is then returned unchanged.
    """
    folder = paths.workdir() / target
    is_name = Path(target).name == target and not (paths.sweeps_dir() / f"{target}.yaml").is_file()
    is_known = is_sweep_dir(folder) or (folder / "runs").is_dir() or is_collected(folder)
    return str(folder) if is_name and is_known else target


def own_sweeps() -> list[str]:
    """Return the names of the sweeps in the work directory."""
    return sorted({path.parent.name for pattern in ("*/plan.json", "*/runs") for path in paths.workdir().glob(pattern)})


def is_sweep_dir(folder: str | Path) -> bool:
    return (Path(folder) / "plan.json").is_file()


def is_collected(folder: Path) -> bool:
    """Whether a folder holds only tables, which `dlm collect --wandb ENTITY/PROJECT --out DIR` wrote."""
    return (folder / "runs.csv").is_file() and not is_sweep_dir(folder) and not (folder / "runs").is_dir()


def planned(options: DefinitionOptions, *, prepare: bool = False) -> Sweep:
    """Plan a definition, or read the existing plan if the target is the folder of a sweep and nothing is changed.

    Args:
        options: The target, and the options that change its definition.
        prepare: The sweep is to be started: check that its folder can be written to, and prepare missing data that dlm
            can make itself.

    Raises:
        UserError: The target is unknown, its definition is invalid, or its folder cannot be written to.
    """
    from dlm.data.manifest import read_data
    from dlm.plan.definition import with_settings
    from dlm.plan.grid import make_plan
    from dlm.plan.recipes import RECIPE_FILE
    from dlm.plan.store import read_plan

    target = by_name(options.target)
    folder = Path(target) if is_sweep_dir(target) else None
    if folder is not None and not changes_definition(options):
        if prepare:
            check_writable(folder)
        plan = read_plan(folder)
        if not (plan.waits_for_recipe and (folder / RECIPE_FILE).is_file()):
            return Sweep(folder, plan)
    if folder is None:
        spec = _definition(target, options.settings or ())
    else:
        spec = with_settings(read_plan(folder).spec, options.settings or ())
    spec = _with_budgets(spec, options)
    place = folder or paths.workdir() / spec.name
    if prepare:
        check_writable(place)
    plan = make_plan(spec, read=read_or_prepare if prepare else read_data)
    return Sweep(place, plan)


def changes_definition(options: DefinitionOptions) -> bool:
    """Whether the options change the definition that the target names."""
    return bool(options.budget or options.top_budget is not None or options.settings)


def existing(target: str) -> Sweep:
    """Return the sweep that a target names, for the verbs that need a plan.

    The plan of a folder of runs that no definition planned, such as workdir/adhoc, is made from these runs.

    Raises:
        UserError: There is neither a plan nor a run.
    """
    from dlm.plan.store import read_plan

    folder = Path(by_name(target))
    if folder.is_dir() and not is_sweep_dir(folder):
        from dlm.plan.adhoc import plan_of_runs
        from dlm.submit.ledger import Ledger

        started = [path.name for path in (folder / "runs").glob("[!.]*/")]  # a launcher's folder may be .submitit
        return Sweep(folder, plan_of_runs(folder, {*started, *Ledger(folder).read()}))
    if not folder.is_dir():
        folder = paths.workdir() / _definition(target).name
    return Sweep(folder, read_plan(folder))


def run_folder(target: str) -> Path:
    """Return the folder of the sweep that a target names.

    A folder with runs needs no plan.json: runs that were started with `python -m dlm.launch` have none.
    """
    folder = Path(by_name(target))
    return folder if (folder / "runs").is_dir() else existing(target).folder


def _definition(target: str, settings: Sequence[str] = ()) -> SweepSpec:
    from dlm.plan.definition import find_definition, load_sweep

    if Path(target).is_dir():
        raise UserError(f"{target} holds no plan.json: give a definition (sweeps/*.yaml) or a sweep's folder")
    return load_sweep(find_definition(target, own_sweeps), settings)


def _with_budgets(spec: SweepSpec, options: DefinitionOptions) -> SweepSpec:
    """Return the definition, with the budgets of --budget or --top-budget if one of these options is given."""
    from dlm.core.flops import check_budget

    if options.budget and options.top_budget is not None:
        raise UserError("--budget and --top-budget exclude each other: give one of them")
    if options.budget:
        return spec.with_budgets(check_budget(budget, "--budget") for budget in options.budget)
    if options.top_budget is not None:
        highest = check_budget(options.top_budget, "the top budget (BUDGET, --top-budget)")
        return spec.with_budgets(highest * fraction for fraction in spec.budget_fractions)
    return spec


def check_classes(plan: Plan, options: DefinitionOptions, overrides: Sequence[str] = ()) -> None:
    """Allow the classes that the options name, and check which classes the cells would make.

    Raises UserError for a callback or a logger that is not allowed; no job is needed to see it.

    Args:
        plan: The plan of the sweep.
        options: The options of the command, which may allow further classes.
        overrides: The overrides of all jobs.
    """
    from dlm.core import classes
    from dlm.core.configs import choices, load_choice
    from dlm.plan.grid import OTHER_GROUPS

    classes.allow(options.allow_target or ())
    classes.check_override_classes(overrides)
    given = {group: choice for group, _, choice in (word.lstrip("+").partition("=") for word in overrides)}
    for group in ("callbacks", "logger"):
        chosen = {given.get(group) or cell.groups.get(group, OTHER_GROUPS[group]) for cell in plan.cells}
        for choice in sorted(chosen & set(choices(group))):
            classes.check_classes(load_choice(group, choice), where=group, source=f"configs/{group}/{choice}.yaml")


def data_nodes(plan: Plan) -> list[dict[str, Any]]:
    """Return the resolved config nodes of the data that the cells read, without duplicates."""
    from dlm.plan.data_sets import data_key
    from dlm.plan.grid import data_node

    nodes = [data_node(cell.groups, cell.overrides) for cell in plan.cells]
    return list({data_key(node): node for node in nodes}.values())


def read_or_prepare(node: Mapping[str, Any]) -> DataSet | None:
    """Return the data of a config node, after preparing missing data that dlm can make itself within seconds.

    Returns None if the data are not prepared.
    """
    from dlm.data.manifest import read_data, unprepared

    if node.get("prepare") is not None:
        for folder in unprepared(node):
            print(f"preparing {node['name']} ...", flush=True)
            run_prepare([node["prepare"], str(folder)])
    return read_data(node)


def run_prepare(arguments: list[str]) -> None:
    """Run `dlm prepare`. If it fails, it prints the cause itself, and this command ends with its exit code."""
    from dlm.data.prepare.command import main

    if code := main(arguments):
        raise typer.Exit(code)


def warn_unprepared(plan: Plan) -> None:
    """Warn if the data of a plan are not prepared, or hold fewer tokens than a cell reads and the hub has more."""
    from dlm.data.manifest import read_data, unprepared
    from dlm.plan.needs import rounded_up

    for need in _needs(plan):
        node, tokens = need.data, text.count(need.tokens)
        missing, data = unprepared(node), read_data(node)
        if missing:
            told = "" if node.get("prepare") else f"; the largest cell needs {tokens} unique tokens"
            warn(
                f"the data {node['name']} are not prepared in {missing[0]}: epochs are unknown and the cell ids are a "
                f"preview{told}; prepare them with `{_prepare_command(need, missing[0])}`"
            )
            return
        held = data.sources[0].manifest.tokens("train") if data else 0
        if node.get("hub") and held < need.tokens:
            folder = f"{node['data_dir']}_{rounded_up(need.tokens)}"
            warn(
                f"the data {node['name']} hold {text.count(held)} training tokens, and the largest cell needs {tokens} "
                f"unique tokens; without more, cells read text again, or are dropped above max_epochs "
                f"{plan.spec.max_epochs:g}: prepare more with `{_prepare_command(need, folder)}`, and set data.data_dir"
            )


def _needs(plan: Plan) -> list[Need]:
    """Return what the data of a plan must hold. The list is empty if they are prepared and no hub has more."""
    from dlm.plan.needs import tokens_needed

    if plan.data_hash is not None and not any(node.get("hub") for node in data_nodes(plan)):
        return []
    return tokens_needed(plan.spec)


def _prepare_command(need: Need, folder: Path | str) -> str:
    """Return the command that prepares the data that cells need in ``folder``."""
    from dlm.plan.needs import rounded_up

    hub, prepare = need.data.get("hub"), need.data.get("prepare")
    if not hub:
        return f"dlm prepare {prepare or 'packed DIR'}"
    words = ("--tokens", rounded_up(need.tokens), "--tokenizer FILE", "--out", shlex.quote(str(folder)))
    return " ".join(("dlm prepare text", f"hf://{hub}", *words))


def warn(line: str) -> None:
    say(f"dlm: warning: {line}", to=sys.stderr)


def existing_sweep(target: str) -> Sweep:
    """Return the sweep that a target names; ``runs.csv`` in its folder names it, too."""
    path = Path(target)
    return existing(str(path.parent) if path.name == "runs.csv" and path.is_file() else target)


def table_of(target: str) -> Path | None:
    """Return the table of runs that a target names, or the folder of such tables; None if it names a sweep."""
    path = Path(target)
    if path.is_file() and path.suffix not in DEFINITIONS:
        if path.name != "runs.csv" or not _is_of_sweep(path.parent):
            return path
        return None
    folder = Path(by_name(target))
    return folder if is_collected(folder) else None


def _is_of_sweep(folder: Path) -> bool:
    return is_sweep_dir(folder) or (folder / "runs").is_dir()


def default_folder(table: Path) -> Path:
    """Return where the report of a table goes: into its folder if this holds dlm's tables, else beside the file."""
    if table.is_dir():
        return table
    return table.parent if table.name == "runs.csv" else table.with_name(f"{table.name.split('.')[0]}_report")
