"""Make sure that the data of a sweep are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from dlm.cli.targets import warn

if TYPE_CHECKING:
    from dlm.data.manifest import DataSet
    from dlm.plan.cells import Plan


def data_nodes(plan: Plan) -> list[dict[str, Any]]:
    """The resolved config nodes of the data that the cells read, each once."""
    from dlm.plan.grid import data_node

    nodes = [data_node(cell.groups, cell.overrides) for cell in plan.cells]
    return list({repr(node): node for node in nodes}.values())


def read_or_prepare(node: Mapping[str, Any]) -> DataSet | None:
    """The data of a node. Missing data that dlm can make itself, which takes seconds, are made first."""
    from dlm.data.manifest import read_data, unprepared

    if node.get("prepare") is not None:
        for folder in unprepared(node):
            print(f"preparing {node['name']} ...", flush=True)
            run_prepare([node["prepare"], str(folder)])
    return read_data(node)


def run_prepare(arguments: list[str]) -> None:
    """Run `dlm prepare`. When it fails, it has said why: the command ends with its exit code."""
    from dlm.data.prepare.command import main

    if code := main(arguments):
        raise typer.Exit(code)


def warn_unprepared(plan: Plan) -> None:
    """Warn when a plan was made without its data."""
    from dlm.data.manifest import unprepared

    nodes = data_nodes(plan) if plan.data_hash is None else []
    missing = [(node, folder) for node in nodes for folder in unprepared(node)]
    if missing:
        node, folder = missing[0]
        warn(
            f"the data {node['name']} are not prepared in {folder}: epochs are unknown and the cell ids are a "
            f"preview; prepare them with `dlm prepare {node.get('prepare') or 'packed DIR'}`"
        )
