"""Compare records of one run from several sources, and describe where they disagree."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dlm.collect.history import History
from dlm.collect.sources import FoundCell
from dlm.core.configs import load_yaml
from dlm.core.errors import UserError
from dlm.record.run import Result, validated_loss

RELATIVE_TOLERANCE = 1e-9  # the run directory and W&B both store 64-bit numbers: allow for rounding only
COMPARED = ("train/loss", "val/loss", "val/loss_se", "lr", "grad_norm", "tokens")
Row = dict[str, Any]
Place = tuple[int, str]  # the step and the column of a number in a history


def check_sources_agree(cell: FoundCell, planned: Mapping[str, Any]) -> None:
    """Add a warning to a cell for every value on which its sources disagree.

    Args:
        cell: The cell with all its sources.
        planned: The facts in the plan, to compare with the facts that the run told W&B at its start.
    """
    for one in cell.in_wandb:
        cell.warn(*differing_values(planned, one.run.record, "the plan", one.where))
    histories = [("metrics.jsonl", cell.metrics)]
    histories += [(one.where, one.history) for one in cell.in_wandb if one.history.table is not None]
    histories = [(where, history) for where, history in histories if history.num_rows]
    if cell.now.result is not None:
        _check_result(cell, cell.now.result, histories)
    if len(histories) > 1:
        (first, trusted), *others = histories
        rows = trusted.read().to_pylist()
        for where, history in others:
            cell.warn(*differing_histories(rows, history.read().to_pylist(), first, where))


def _check_result(cell: FoundCell, result: Result, histories: list[tuple[str, History]]) -> None:
    """Compare the result that counts with the other results, and with the final validation in every history."""
    first = "result.json" if cell.source == "run_dir" else "the result in W&B"
    for one in cell.in_wandb:
        if one.source != cell.source and (other := one.result) is not None:
            cell.warn(*differing_values(_fields_of(result), _fields_of(other), first, one.where))
    step = cell.last_step
    names = (f"val/loss at step {step}", f"val/loss_se at step {step}")
    ours = dict(zip(names, (result.loss, result.loss_se), strict=True))
    for where, history in histories:
        cell.warn(*differing_values(ours, dict(zip(names, history.at(step), strict=True)), first, where))


def check_second_source(cell: FoundCell, row: Mapping[str, Any]) -> bool:
    """Compare the loss of a cell with validation.csv, and find out whether any second source has it.

    result.json and metrics.jsonl count as one source, because whoever changes one of them can change the other in the
    same way. A second source is validation.csv, whose mean is the loss, a .wandb file, or a server.

    Args:
        cell: The cell with all its sources. A warning is added if validation.csv gives another loss, and for each
            source that the run has written and that is missing.
        row: The row of the cell in runs.csv.

    Returns:
        Whether a second source has the final loss.
    """
    others = [one for one in cell.in_wandb if one.source != row["source"]]
    has_second = any(one.result is not None or one.history.at(cell.last_step)[0] is not None for one in others)
    if not cell.run_dir.is_dir():
        return has_second
    if not cell.in_wandb and _logs_to_wandb(cell):
        cell.warn("config.yaml says that the run logs to W&B, and its .wandb files are missing: nothing was compared")
    first = {"run_dir": "result.json", "wandb": "the W&B file", "wandb_api": "the W&B server"}[row["source"]]
    if not (cell.run_dir / "validation.csv").is_file():
        cell.warn(f"validation.csv is missing, which a run writes before its result: {first} was not compared with it")
        return has_second
    try:
        loss, error = validated_loss(cell.run_dir)
    except UserError as mistake:
        cell.warn(str(mistake))
        return has_second
    ours = {"loss": row["loss"], "loss_se": row["loss_se"]}
    cell.warn(*differing_values(ours, {"loss": loss, "loss_se": error}, first, "validation.csv"))
    return True


def _logs_to_wandb(cell: FoundCell) -> bool:
    """Whether the run of a cell keeps .wandb files, by its config.yaml."""
    path = cell.run_dir / "config.yaml"
    with contextlib.suppress(UserError):  # `run_row` has warned of it
        config = load_yaml(path) if path.is_file() else None
        logger = config.get("logger") if isinstance(config, Mapping) else None
        return isinstance(logger, Mapping) and logger.get("_target_") is not None  # null with `logger: none`
    return False


def _fields_of(result: Result) -> Row:
    return {f"{name}, of the result,": value for name, value in dataclasses.asdict(result).items()}


def disagree(first: Any, second: Any) -> bool:
    """Whether two records of a value differ by more than rounding. A missing value (None) disagrees with nothing."""
    if first is None or second is None:
        return False
    if not (_is_number(first) and _is_number(second)):
        return bool(first != second)
    if math.isnan(first) or math.isnan(second):
        return math.isnan(first) != math.isnan(second)
    return not math.isclose(first, second, rel_tol=RELATIVE_TOLERANCE)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else repr(value)


def differing_values(ours: Mapping[str, Any], theirs: Mapping[str, Any], first: str, where: str) -> Iterator[str]:
    """Yield a line for each value on which two records differ. Values that one record lacks are skipped.

    Args:
        ours: The record that counts.
        theirs: The other record.
        first: The name of the source of ``ours``, for the lines.
        where: The name of the source of ``theirs``, for the lines.
    """
    for what, mine in ours.items():
        if disagree(mine, theirs.get(what)):
            yield f"{what} is {_shown(mine)} in {first} and {_shown(theirs[what])} in {where}: {first} counts"


def differing_histories(ours: list[Row], theirs: list[Row], first: str, where: str) -> Iterator[str]:
    """Yield at most three lines: how many steps differ, and how many steps each source lacks.

    The arguments are those of ``differing_values``, with one row per step.
    """
    mine, its = _numbers(ours), _numbers(theirs)
    different = [place for place, number in mine.items() if disagree(number, its.get(place))]
    if different:
        step, key = different[0]
        yield (
            f"{_num_steps(different)} of {len(ours)} logged steps differ between {first} and {where}, first {key} at "
            f"step {step}: {_shown(mine[step, key])} and {_shown(its[step, key])}; {first} counts"
        )
    for numbers, others, rows, has, who in ((mine, its, ours, first, where), (its, mine, theirs, where, first)):
        lacking = [place for place in numbers if place not in others]
        if lacking:
            step, key = lacking[0]
            logged = f"{_num_steps(lacking)} of the {len(rows)} logged steps that {has} has"
            yield f"{who} lacks {logged}, first {key} at step {step}"


def _numbers(rows: list[Row]) -> dict[Place, Any]:
    """Return the numbers of a history by (step, column), in order, without missing numbers."""
    return {(row["step"], key): row[key] for row in rows for key in COMPARED if row.get(key) is not None}


def _num_steps(places: Iterable[Place]) -> int:
    return len({step for step, _ in places})
