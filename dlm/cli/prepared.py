"""Make sure that the data of a sweep are prepared."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.cli.targets import Chosen, warn
from dlm.core.errors import UserError

if TYPE_CHECKING:
    from dlm.plan.cells import Plan


class Stop(Exception):
    """End the command with this exit code; everything has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def data_nodes(plan: Plan) -> list[dict[str, Any]]:
    """The data that the cells read, each once."""
    from dlm.plan.grid import data_node

    nodes = [data_node(cell.groups, cell.overrides) for cell in plan.cells]
    return list({repr(node): node for node in nodes}.values())


def warn_unprepared(plan: Plan) -> None:
    from dlm.data.manifest import unprepared

    nodes = data_nodes(plan) if plan.data_hash is None else []
    missing = [(node, folder) for node in nodes for folder in unprepared(node)]
    if missing:
        node, folder = missing[0]
        warn(
            f"the data {node['name']} are not prepared in {folder}: epochs are unknown and the cell ids "
            f"are a preview; `dlm prepare {node.get('prepare') or 'packed DIR'}` makes them"
        )


def make_data_ready(chosen: Chosen) -> Chosen:
    """Make sure of the data, and plan again where their hash has changed the ids. Raises UserError."""
    from dlm.data.manifest import unprepared
    from dlm.plan.cost import with_estimates
    from dlm.plan.grid import make_plan

    for node in data_nodes(chosen.plan):
        for folder in unprepared(node):
            _prepare_data(node, folder)
    if chosen.plan.data_hash is not None:
        return chosen
    return Chosen(chosen.sweep_dir, with_estimates(make_plan(chosen.plan.spec)))


def prepare_own_data(chosen: Chosen) -> Chosen:
    """Make missing data that dlm makes itself, in seconds, so that the plan shown has the ids that will run."""
    if chosen.plan.data_hash is None and all(node.get("prepare") for node in data_nodes(chosen.plan)):
        return make_data_ready(chosen)
    return chosen


def _prepare_data(node: Mapping[str, Any], folder: Path) -> None:
    if node.get("prepare") is None:
        raise UserError(
            f"the data {node['name']} are not prepared in {folder}: prepare text with `dlm prepare text SOURCE --out "
            f"{folder}`, or put LITPKDS files there and run `dlm prepare packed {folder}`, or choose other data "
            "(groups.data)"
        )
    print(f"preparing {node['name']} ...", flush=True)
    code = training_command("dlm.data.prepare.command", [node["prepare"], str(folder)])
    if code:
        raise Stop(code)


def training_command(module: str, arguments: Sequence[str]) -> int:
    """Run a command of the training half in a process of its own: that half is never imported here."""
    return subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
