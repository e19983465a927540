"""Show plans, cell states and the progress of a local run on the terminal. rich is imported only when it is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlm.cli.check import FAILED, OK, WARNING, Check
from dlm.cli.table import WORDS, plain_lines, say, show_table
from dlm.core import terminal, text
from dlm.core.names import printable
from dlm.core.table import columns_of, wrapped
from dlm.core.terminal import console
from dlm.plan.sharing import own_flops, sharing

if TYPE_CHECKING:
    from dlm.plan.cells import Cell, Plan
    from dlm.plan.definition import SweepSpec

SHOWN_DROPPED = 5  # how many of the dropped cells are listed
# A narrow terminal lacks the first of these columns: of a plan, and of the states of a sweep.
EXPENDABLE = ("batch error %", "error %", "epochs", "GiB", "tokens/N", "GPU-h", "budget")
LESS_URGENT = ("redone", "attempts", "tokens/s")
CHECK_COLOURS = {OK: "green", WARNING: "yellow", FAILED: "bold red"}
CHECK_WIDTHS = (7, 14)  # of the state and the name of a check; what was found takes the rest
NARROW = 60  # a terminal with fewer columns shows what a check has found below its name


def show_plan(plan: Plan, *, proof: Sequence[Cell] = ()) -> None:
    """Print what each budget costs, the cells with their estimates, the first dropped cells, and the total cost.

    Cells that differ in their seed alone share a row. It shows the id and the time of the first, and how many they are.

    Args:
        plan: The plan.
        proof: The expected proof runs, with estimates; their cost is printed on a line of its own.
    """
    from dlm.plan.recipes import recipe_lines
    from dlm.plan.tuning import tuning_lines

    out = console()
    out.print(f"[bold]{plan.spec.name}[/]: {text.counted(len(plan.cells), 'cell')}, FLOPs counted as {plan.convention}")
    _show_summary(plan, proof, out.width)
    for line in (*_settings_lines(plan.spec), *recipe_lines(plan.spec, plan.recipe, plan.grid), *tuning_lines(plan)):
        say(line)
    show_table(_plan_rows(plan.cells), expendable=EXPENDABLE, whole="dlm plan --json")
    dropped = list(
        dict.fromkeys(f"{one['model']} at {text.flops(one['budget_flops'])}: {one['reason']}" for one in plan.dropped)
    )  # once for all seeds
    for line in dropped[:SHOWN_DROPPED]:
        say(f"dropped {line}")
    if len(dropped) > SHOWN_DROPPED:
        more = len(dropped) - SHOWN_DROPPED
        say(f"... and {more} more dropped; `dlm plan --json` lists them with their reasons")
    if plan.spec.branches:
        say(_sharing_line(plan))
    say(_cost_line(plan))
    if proof:
        say(_proof_line(proof))


def _show_summary(plan: Plan, proof: Sequence[Cell], width: int) -> None:
    """Print what each budget holds and costs, and the picture of the sizes."""
    from dlm.cli import plan_summary

    rows = plan_summary.summary_rows(plan, proof)
    show_table(rows, expendable=plan_summary.EXPENDABLE, whole="dlm plan --json")
    is_drawn = sys.stdout.isatty() and "utf" in (sys.stdout.encoding or "").lower()
    shapes = {"dot": "\N{BLACK CIRCLE}", "empty": "\N{MIDDLE DOT}"} if is_drawn else {}
    print(
        "\n".join(["", *plan_summary.picture(plan, proof, width=width, **shapes), plan_summary.legend(plan, proof), ""])
    )


def _settings_lines(spec: SweepSpec) -> list[str]:
    """Return what a definition sets and varies, and the keys of its rules for the launcher, in one line each."""
    parts = [("groups", spec.groups), ("sets", spec.set), ("varies", spec.vary)]
    parts += [("launcher", rule.set) for rule in spec.launcher]
    return [
        f"{head}: {', '.join(f'{key}={json.dumps(value)}' for key, value in values.items())}"
        for head, values in parts
        if values
    ]


def _plan_rows(cells: Iterable[Cell]) -> list[dict[str, str]]:
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        others = {key: value for key, value in cell.overrides.items() if key != "seed"}
        alike.setdefault(repr((sorted(cell.groups.items()), sorted(others.items(), key=str))), []).append(cell)
    several = any(len(same) > 1 for same in alike.values())
    shown = _recipe_columns([same[0] for same in alike.values()])
    return [
        _plan_row(same[0]) | columns | ({"runs": str(len(same))} if several else {})
        for same, columns in zip(alike.values(), shown, strict=True)
    ]


def _recipe_columns(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """Return the columns about the recipe, of which a plan shows those in which its cells differ."""
    columns = [
        {
            "rate": f"{cell.learning_rate:.3g}",
            "batch": str(cell.global_batch_size),
            "batch error %": "-" if cell.batch_error_pct is None else f"{cell.batch_error_pct:+.1f}",
            "role": cell.role or "-",
        }
        for cell in cells
    ]
    differ = [head for head in columns[0] if len({row[head] for row in columns}) > 1]
    return [{head: row[head] for head in differ} for row in columns]


def _plan_row(cell: Cell) -> dict[str, str]:
    estimate = cell.estimate
    return {
        "cell": cell.cell_id,
        "N": text.count(cell.num_params),
        "tokens": text.count(cell.tokens),
        "steps": f"{cell.steps:,}",
        "tokens/N": f"{cell.tokens_per_param:.3g}",
        "budget": text.flops(cell.budget_flops),
        "error %": f"{cell.budget_error_pct:+.3f}",
        "epochs": "-" if cell.epochs is None else f"{cell.epochs:.2f}",
        "time": text.duration(None if estimate.hours is None else 3600 * estimate.hours),
        "GPU-h": "-" if estimate.gpu_hours is None else f"{estimate.gpu_hours:.3g}",
        "GiB": "-" if estimate.memory_gib is None else f"{estimate.memory_gib:.2g}",
    }


def _sharing_line(plan: Plan) -> str:
    """Return what shared trunks save and cost."""
    found = sharing(plan.cells)
    if not found.branches:
        return "shared trunks: none, because no two cells differ in their budget alone"
    line = (
        f"shared trunks: {found.branches} of {len(plan.cells)} cells branch off {found.trunks} others and train "
        f"{found.flops:.0%} of the FLOPs without sharing"
    )
    if found.width is None or found.flops_at_equal_width is None:
        return f"{line}; too few cells to compute what the shared noise costs"
    wider = "wider" if found.width >= 1 else "narrower"
    return (
        f"{line}; the losses are the same. Against cells with a seed of their own each, the interval of N* at the top "
        f"budget is about {abs(found.width - 1):.0%} {wider}, and one of equal width takes "
        f"{found.flops_at_equal_width:.0%} of the FLOPs"
    )


def _cost_line(plan: Plan) -> str:
    line = f"{text.counted(len(plan.cells), 'cell')}, {text.flops(own_flops(plan.cells))} FLOPs ({plan.convention})"
    first = plan.cells[0].estimate
    if first.hours is None:
        return f"{line}; time: {first.basis}"
    gpu_hours = sum(cell.estimate.gpu_hours or 0 for cell in plan.cells)
    seconds = sum(3600 * (cell.estimate.hours or 0) for cell in plan.cells)
    price = f"{gpu_hours:,.4g} GPU-hours" if gpu_hours else f"{text.duration(seconds)} of one process"
    ends = (min(plan.cells, key=_size), max(plan.cells, key=_size))
    smallest, largest = (cell.estimate.basis for cell in ends)
    basis = smallest if smallest == largest else f"smallest cell: {smallest}; largest: {largest}"
    return f"{line}, {price} ({basis})"


def _size(cell: Cell) -> int:
    return cell.num_params


def _proof_line(proof: Sequence[Cell]) -> str:
    """State what the proof run will cost; its size follows from the law, so all of this is approximate."""
    sizes = text.listed(list(dict.fromkeys(text.count(cell.num_params, digits=2) for cell in proof)))
    hours = [cell.estimate.hours for cell in proof]
    gpu_hours = sum(cell.estimate.gpu_hours or 0.0 for cell in proof)
    seconds = None if None in hours else 3600 * sum(hour or 0.0 for hour in hours)
    price = f"{gpu_hours:,.3g} GPU-hours" if gpu_hours else text.duration(seconds)
    about = "" if price == "-" else f", about {price}"
    flops = text.flops(sum(cell.budget_flops for cell in proof))
    return f"then the proof run: {flops} FLOPs{about}; the law decides its size (expected: {sizes} parameters)"


def show_status(rows: Sequence[Mapping[str, Any]], summary: Sequence[str]) -> None:
    """Print the lines that sum up a sweep, then the table of ``status_rows`` with one line for each cell.

    Columns without any value are left out. If the reasons do not fit beside the other columns, they follow below, and
    the columns that still do not fit are left out.
    """
    say(*summary)
    if not rows:
        return
    filled = [head for head in rows[0] if head in WORDS[:2] or any(row[head] for row in rows)]
    shown = [{head: "-" if row[head] is None else printable(row[head]) for head in filled} for row in rows]
    below: list[str] = []
    width = terminal.width()
    if "reason" in filled and width is not None and any(columns_of(line) > width for line in plain_lines(shown)):
        below = [f"{row['cell']}: {row['reason']}" for row in rows if row["reason"]]
        shown = [{head: value for head, value in row.items() if head != "reason"} for row in shown]
    show_table(shown, expendable=LESS_URGENT, whole="dlm status --json")
    say(*below)


def show_check(check: Check) -> None:
    """Print a check of `dlm doctor`: its state, its name, what was found and what to do about it.

    Below NARROW columns, what was found stands under the state and the name.
    """
    from rich.text import Text

    out = console()
    heads = f"{check.state:<{CHECK_WIDTHS[0]}}  {check.name:<{CHECK_WIDTHS[1]}}"
    indent = sum(CHECK_WIDTHS) + 4 if out.width >= NARROW else 2
    said = [check.found, *([f"to do: {check.advice}"] if check.advice else [])]
    parts = [part.strip() for line in said for part in wrapped(printable(line), out.width - indent, indent=0)]
    lines = [" " * indent + part for part in parts]
    lines = [heads + lines[0][len(heads) :], *lines[1:]] if out.width >= NARROW else [heads.rstrip(), *lines]
    shown = Text("\n".join(lines))
    shown.stylize(CHECK_COLOURS[check.state], 0, len(check.state))
    out.print(shown, soft_wrap=True)
