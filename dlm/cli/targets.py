"""Find the sweep that a command line names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.core.errors import UserError

if TYPE_CHECKING:
    from dlm.plan.cells import Plan
    from dlm.plan.definition import SweepSpec


@dataclass(frozen=True)
class Chosen:
    """What a target stands for: the folder, the definition, and the plan that is to be carried out."""

    sweep_dir: Path
    plan: Plan


def by_name(target: str) -> str:
    """A sweep in workdir/ by its name alone, where no definition has that name; else ``target`` as it is."""
    from dlm.core import paths

    folder = paths.workdir() / target
    is_name = Path(target).name == target and not (paths.sweeps_dir() / f"{target}.yaml").is_file()
    return str(folder) if is_name and is_sweep_dir(str(folder)) else target


def is_sweep_dir(target: str) -> bool:
    return (Path(target) / "plan.json").is_file()


def _definition(
    target: str, budgets: Sequence[str] | None, top: str | None, settings: Sequence[str] | None
) -> SweepSpec:
    from dlm.core.flops import check_budget
    from dlm.plan.definition import find_definition, load_sweep

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
    from dlm.core import paths
    from dlm.plan.cost import with_estimates
    from dlm.plan.grid import make_plan
    from dlm.plan.store import read_plan

    target = by_name(target)
    if is_sweep_dir(target):
        if budgets or top is not None or settings:
            raise UserError(f"{target} is planned already: give its definition to change --budget or --set")
        return Chosen(Path(target), with_estimates(read_plan(Path(target))))
    spec = _definition(target, budgets, top, settings)
    return Chosen(paths.workdir() / spec.name, with_estimates(make_plan(spec)))


def existing(target: str) -> Chosen:
    """The sweep folder behind a target, for the verbs that come after planning."""
    from dlm.core import paths
    from dlm.plan.store import read_plan

    target = by_name(target)
    sweep_dir = Path(target)
    if not is_sweep_dir(target) and not sweep_dir.is_dir():
        sweep_dir = paths.workdir() / _definition(target, None, None, None).name
    return Chosen(sweep_dir, read_plan(sweep_dir))


def run_folder(target: str) -> Path:
    """The folder behind a target that may hold runs without a plan: those that `python -m dlm.launch` started."""
    folder = Path(by_name(target))
    return folder if (folder / "runs").is_dir() else existing(target).sweep_dir


def warn(line: str) -> None:
    print(f"dlm: warning: {line}", file=sys.stderr)
