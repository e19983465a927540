"""Say how many tokens of text a definition needs if no cell is to read any twice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dlm.plan.data_sets import data_key
from dlm.plan.definition import SweepSpec
from dlm.plan.grid import data_node, make_plan
from dlm.plan.proof import expected_proof


@dataclass(frozen=True, kw_only=True)
class Need:
    """The data of some cells, and the tokens that the one of them that reads most needs."""

    data: dict[str, Any]  # the resolved ``data`` node
    tokens: int  # tokens of the training split, with those between the sequences


def tokens_needed(spec: SweepSpec) -> list[Need]:
    """Return what the cells of a definition need, for each data set that they read.

    Cells that are dropped because the data are too few count too, and so do the expected proof runs.
    """
    plan = make_plan(spec, read=lambda node: None)
    found: dict[str, Need] = {}
    for cell in (*plan.cells, *expected_proof(plan)):
        node = data_node(cell.groups, cell.overrides)
        limit = node.pop("unique_tokens", None)
        read = cell.tokens if limit is None else min(cell.tokens, limit)
        tokens = math.ceil(read / node["block_size"]) * node["stride"]
        before = found.get(data_key(node))
        if before is None or before.tokens < tokens:
            found[data_key(node)] = Need(data=node, tokens=tokens)
    return list(found.values())


def rounded_up(tokens: int) -> str:
    """Write a number of tokens with two digits, rounded up, as --tokens takes it: 25,442,123,776 -> '26e9'."""
    step = 10 ** max(len(str(tokens)) - 2, 0)
    value = math.ceil(tokens / step) * step
    exponent = next((size for size in (9, 6, 3) if value >= 10**size), 0)
    return f"{value / 10**exponent:g}e{exponent}"
