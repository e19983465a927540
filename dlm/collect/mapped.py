"""Turn W&B runs that dlm did not launch into rows of runs.csv, as a mapping file says, or state why one is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlm.collect.dotted import TwoValuesError, look_up
from dlm.collect.exclusion import Cause, Excluded
from dlm.collect.history import History, from_rows, number
from dlm.collect.mapping import OFFSET, WHOLE, Column, Metric, RunMapping
from dlm.collect.row import COLUMN_TYPES
from dlm.collect.sources import WANDB_STATES
from dlm.collect.wandb_file import WandbRun
from dlm.core.errors import shown
from dlm.record.outcomes import State

Row = dict[str, Any]


@dataclass(kw_only=True)
class MappedRun:
    """A run that dlm did not launch, as a row of runs.csv or excluded.csv."""

    row: Row
    excluded: Excluded | None  # why the run is not in runs.csv; None: it is
    cell: tuple[str, ...] | None  # equal for runs of one cell; None: not compared with other runs
    heartbeat: str  # the time of the last heartbeat of the run, ISO 8601
    is_one_short: bool = False  # whether it is whole although its last step is one below the planned last step


def map_history(run: WandbRun, mapping: RunMapping) -> History:
    """Return the history of a run under dlm's names, merged on the optimiser step.

    A history with two values for one metric of a row is not used; ``run.unread`` then states the reason.
    """
    names = {"step": Metric(metric="_step"), **mapping.history}
    rows = []
    try:
        for row in run.history:
            found = {ours: number(look_up(row, theirs.metric)) for ours, theirs in names.items()}
            values = {ours: value * names[ours].scale for ours, value in found.items() if value is not None}
            rows.append({ours: _rounded(value) if ours in WHOLE else value for ours, value in values.items()})
    except TwoValuesError as error:
        run.unread = f"the row {row.get('_step', len(rows))} of its history has {error}"
        rows = []
    return from_rows(rows, str(run.run_id), run.key(mapping.hash), _repeated(rows))


def _repeated(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Return a warning if the last step has several different validation losses, of which the last one counts.

    A program that loads its best checkpoint at the end validates that one, and logs it under the last step.
    """
    validated = [(row["step"], row["val/loss"]) for row in rows if "step" in row and "val/loss" in row]
    last = max((step for step, _ in validated), default=None)
    losses = [loss for step, loss in validated if step == last]
    if len(set(losses)) < 2:
        return []
    said = f"val/loss at step {last:g} was logged {len(losses)} times, first {losses[0]:g}, last {losses[-1]:g}"
    return [f"{said}: the last counts, which may be that of an earlier checkpoint that was loaded again"]


def map_run(run: WandbRun, history: History, mapping: RunMapping) -> MappedRun:
    """Turn one run into a row of runs.csv, or find out why the run is excluded."""
    source = "wandb_api" if run.path is None else "wandb"  # as in WandbSource
    row: Row = {"run_id": run.run_id, "sweep": run.group, "source": source, "status": run.state}
    excluded = cell = None
    is_one_short = False
    try:
        _check_config(run, mapping)
        cell = tuple(str(_require(run.config, key, "config")) for key in mapping.cell) or None
        columns = {name: _as_column(name, _value(run, column)) for name, column in mapping.columns.items()}
        offset = columns.pop(OFFSET, None)
        row |= columns
        row |= _flops(row, mapping)
        last = _last_step(run, row.get("steps"), offset, history)
        is_one_short = offset is None and last < row.get("steps", last)
        row |= _loss_at(last, history) | {"status": str(State.DONE)}
    except Excluded as reason:
        excluded, cell = reason, None
    heartbeat = run.version.split("@")[1]
    return MappedRun(row=row, excluded=excluded, cell=cell, heartbeat=heartbeat, is_one_short=is_one_short)


def mark_duplicates(mapped: Sequence[MappedRun]) -> None:
    """Exclude all but the latest of several runs of one cell."""
    in_order = sorted((one for one in mapped if one.cell is not None), key=lambda one: one.heartbeat)
    latest = {one.cell: one.row["run_id"] for one in in_order}
    for one in in_order:
        if one.row["run_id"] != latest[one.cell]:
            one.excluded = Excluded(Cause.DUPLICATE, f"the same cell as {latest[one.cell]}, which is later")


def _check_config(run: WandbRun, mapping: RunMapping) -> None:
    if WANDB_STATES.get(str(run.state)) in (State.RUNNING, State.SUBMITTED):
        raise Excluded(State.RUNNING, f"W&B says {run.state}; wait, then collect again")
    for key, wanted in mapping.require.items():
        found = _found(run.config, key, "config")
        if found not in wanted:
            details = f"{key} is {found!r}, required is {' or '.join(map(repr, wanted))}"
            raise Excluded(Cause.OTHER_CONFIG, details)


def _value(run: WandbRun, column: Column) -> Any:
    """Return the scaled value of a column, not yet converted to the type of the column. Raises Excluded."""
    if column.value is not None:
        return column.value
    if column.product is not None:
        value = math.prod(_as_number(_require(run.config, key, "config"), key) for key in column.product)
    elif column.summary is not None:
        value = _require(run.summary, column.summary, "summary")
    else:
        value = _require(run.config, str(column.config), "config")
    if column.scale == 1.0:
        return value
    return _as_number(_as_number(value, "a scaled value") * column.scale, "a scaled value")


def _as_number(value: Any, key: str) -> int | float:
    """Convert to a finite number; integers remain integers. Raises Excluded."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = value if isinstance(value, int) and abs(value) < 2**63 else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Excluded(Cause.OTHER_CONFIG, f"{key} is {shown(value)}, not a number") from error
    if not math.isfinite(found):
        raise Excluded(Cause.OTHER_CONFIG, f"{key} is {shown(value)}, not a finite number")
    return found


def _require(values: Mapping[str, Any], key: str, where: str) -> Any:
    found = _found(values, key, where)
    if found is None:
        raise Excluded(Cause.OTHER_CONFIG, f"its {where} has no {key}")
    return found


def _found(values: Mapping[str, Any], key: str, where: str) -> Any:
    """Return the value of a dotted key, None without one. Raises Excluded if two spellings of it disagree."""
    try:
        return look_up(values, key)
    except TwoValuesError as error:
        raise Excluded(Cause.OTHER_CONFIG, f"its {where} has {error}") from error


def _flops(row: Mapping[str, Any], mapping: RunMapping) -> Row:
    """Return the FLOPs columns; 6n is computed as 6 N D. Raises Excluded unless they are positive and agree with 6n."""
    six = 6.0 * row["params"] * row["tokens"]
    flops = row.get("flops", six)  # without columns.flops the convention is 6n (load_mapping)
    if not flops > 0:
        raise Excluded(Cause.OTHER_CONFIG, f"flops is {flops:g}")
    if mapping.convention == "6n" and not math.isclose(flops, six, rel_tol=0.01):
        raise Excluded(Cause.OTHER_CONVENTION, f"its flops are {flops:.4g}, 6 N D is {six:.4g}")
    return {"flops": flops, "convention": mapping.convention, "flops_6n": six, f"flops_{mapping.convention}": flops}


def _as_column(name: str, value: Any) -> Any:
    """Convert the value of a column to the type of the field in RunRow. Raises Excluded."""
    if name == OFFSET:
        return _whole(name, value)
    kind = COLUMN_TYPES[name]
    if "str" in kind:
        return str(value)
    if "int" in kind:
        return _whole(name, value, least=1 if name in ("params", "tokens", "steps") else 0)
    return float(_as_number(value, name))


def _whole(name: str, value: Any, *, least: int | None = None) -> int:
    """Convert to a whole number of at most 64 bits. Raises Excluded."""
    found = _rounded(_as_number(value, name))
    if found != int(found) or abs(found) >= 2**63 or (least is not None and found < least):
        limit = "" if least is None else f" of at least {least}"
        raise Excluded(Cause.OTHER_CONFIG, f"{name} is {shown(value)}, not a whole number{limit}")
    return int(found)


def _rounded(value: float) -> float:
    """Undo the rounding error of a scaled whole number: 16.4 x 1e6 is 16399999.999999998 in floating point."""
    if not math.isfinite(value):
        return value
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-9) else value


def _last_step(run: WandbRun, steps: int | None, offset: int | None, history: History) -> int:
    """Return the step under which a run logged the end of its training.

    Args:
        run: The run.
        steps: The planned last step. If it is None, the last logged step counts.
        offset: How many steps the last logged step lacks. If it is None, a finished run may lack one.
        history: The history of the run.

    Raises:
        Excluded: The run is short, long, or has diverged.
    """
    last = history.last_step
    if run.unread is not None:
        raise Excluded(Cause.NO_VALIDATION, f"its history could not be read ({run.unread})")
    if last is None:
        raise Excluded(Cause.NO_VALIDATION, "its history has none of the mapped metrics")
    if history.validations:
        newest, _ = history.validations[max(history.validations)]
        if not math.isfinite(newest):
            raise Excluded(State.DIVERGED, f"its last validation loss is {newest}")
    if steps is None:
        if run.state != "finished":
            details = f"W&B says {run.state} at step {last}, and no columns.steps tells how far it was to go"
            raise Excluded(Cause.SHORT, details)
        return last
    if offset and last + offset > steps:
        details = f"step {last} and columns.{OFFSET} {offset} make {last + offset} of {steps}: lower columns.{OFFSET}"
        raise Excluded(Cause.LONG, details)
    may_be_one_short = offset is None and run.state == "finished" and steps not in history.validations
    if may_be_one_short and steps - 1 in history.validations:
        return steps - 1
    if last + (offset or 0) < steps:
        advice = f"; if it counts steps from 0, set columns.{OFFSET} to 1" if last == steps - 1 else ""
        raise Excluded(Cause.SHORT, f"step {last} of {steps} (W&B says {run.state}){advice}")
    return steps - (offset or 0)


def _loss_at(step: int, history: History) -> Row:
    """Return the validation loss at a step. Raises Excluded if there is none or the run has diverged."""
    loss, error = history.at(step)
    if loss is None:
        newest = f", the last one is at step {max(history.validations)}" if history.validations else ""
        raise Excluded(Cause.NO_VALIDATION, f"no val/loss at step {step}{newest}")
    if not math.isfinite(loss):
        raise Excluded(State.DIVERGED, f"its validation loss is {loss}")
    return {"loss": loss, "loss_se": error}
