"""Read a mapping file and turn W&B runs that dlm did not launch into rows of runs.csv.

A mapping (`dlm collect --wandb ENTITY/PROJECT --mapping FILE --out DIR`) is a YAML file:

    columns:                       # columns of runs.csv, by default from the config of a run
      params: model.non_embedding  # a config key; a dot leads into a nested dictionary
      tokens: {product: [train.steps, train.batch, train.length]}
      steps: train.steps           # the planned last step, if it is known; shorter runs are left out
      objective: {value: masked_diffusion}
      budget: {summary: total_flops, scale: 1e12}   # a key of the summary, and a factor
    history:                       # columns of the history, and the names under which runs log them
      step: trainer/global_step    # the optimiser step; by default W&B's own step
      val/loss: {metric: eval/nll, scale: 1.0}      # in nats per token after scaling
      train/loss: loss
    convention: 6n                 # how FLOPs are counted: 6n is computed, any other needs columns.flops
    require: {data.name: [slimpajama]}              # allowed config values; runs with other values are left out
    cell: [model.name, train.steps, seed]           # required config keys; of runs with equal values, the latest counts
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from dlm.collect.exclusion import Cause, Excluded
from dlm.collect.history import NUMBERS, History, from_rows, number
from dlm.collect.row import COLUMN_TYPES
from dlm.collect.sources import WANDB_STATES
from dlm.collect.wandb_file import WandbRun
from dlm.core.configs import load_yaml
from dlm.core.errors import UserError, hint, unknown
from dlm.core.flops import CONVENTIONS
from dlm.core.identity import content_hash
from dlm.record.outcomes import State

# The columns that a mapping may fill; dlm itself fills in the others.
COLUMNS = tuple(
    name
    for name in COLUMN_TYPES
    if name not in ("run_id", "sweep", "loss", "loss_se", "source", "status", "convention")
)
METRICS = ("step", "tokens", *NUMBERS)
Row = dict[str, Any]


def _factor(value: float) -> float:
    if not math.isfinite(value) or value == 0:
        raise ValueError(f"{value:g} cannot be a factor: give a finite number other than 0")
    return value


class _Scaled(BaseModel):
    """The origin of a value, and a factor. A bare string is short for ``{short: string}``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    short: ClassVar[str]
    scale: Annotated[float, AfterValidator(_factor)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        return {cls.short: given} if isinstance(given, str) else given


class Column(_Scaled):
    """The origin of a column: exactly one of config, summary, product (of config keys) and value, times scale."""

    short = "config"
    config: str | None = None
    summary: str | None = None
    product: tuple[str, ...] | None = None
    value: Any = None

    @model_validator(mode="after")
    def _one_source(self) -> Column:
        if sum(item is not None for item in (self.config, self.summary, self.product, self.value)) != 1:
            raise ValueError("give exactly one of config, summary, product, value")
        return self


class Metric(_Scaled):
    """The name under which runs log a number of the history, and a factor for the logged number."""

    short = "metric"
    metric: str


# The values that ``require`` allows for a key: a list or a single value. null allows runs without the key.
_Values = Annotated[list[Any], BeforeValidator(lambda given: given if isinstance(given, list) else [given])]


class RunMapping(BaseModel):
    """The content of a mapping file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    columns: dict[str, Column]
    history: dict[str, Metric]
    convention: str = "6n"
    require: dict[str, _Values] = {}
    cell: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """A hash of ``history``, which changes when histories would be read differently."""
        return content_hash(self.model_dump()["history"])[:8]


def load_mapping(path: Path) -> RunMapping:
    """Read a mapping file. Raises UserError, which names the faulty key and what is allowed."""
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping: it needs the keys columns and history")
    try:
        mapping = RunMapping.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error
    for what, names, allowed in (
        ("column", mapping.columns, COLUMNS),
        ("history", mapping.history, METRICS),
        ("convention", [mapping.convention], CONVENTIONS),
    ):
        for name in names:
            if name not in allowed:
                raise unknown(f"{what} in {path}:", name, allowed)
    for name in ("params", "tokens"):
        if name not in mapping.columns:
            raise UserError(f"{path} maps no column {name}: add columns.{name}")
    if "val/loss" not in mapping.history:
        raise UserError(f"{path} maps no validation loss: add history.val/loss")
    if mapping.convention != "6n" and "flops" not in mapping.columns:
        raise UserError(f"{path}: convention {mapping.convention} needs columns.flops; only 6n is computed")
    return mapping


def check_keys(mapping: RunMapping, runs: Collection[WandbRun], where: str) -> None:
    """Raise UserError for a config or summary key of the mapping that no run has, as it would exclude every run.

    Args:
        mapping: The mapping.
        runs: All runs, with their configs and summaries.
        where: The name of the project, for the message.
    """
    configs, summaries = [run.config for run in runs], [run.summary for run in runs]
    for name, column in mapping.columns.items():
        for key in (column.config, *(column.product or ())):
            _check_key("config key", key, f"columns.{name}", configs, where)
        _check_key("summary key", column.summary, f"columns.{name}", summaries, where)
    for key, wanted in mapping.require.items():
        if None not in wanted:
            _check_key("config key", key, "require", configs, where)
    for key in mapping.cell:
        _check_key("config key", key, "cell", configs, where)


def check_metrics(mapping: RunMapping, runs: Iterable[WandbRun], where: str) -> None:
    """Raise UserError for a name in ``mapping.history`` that no run logs. The histories of all runs must be read."""
    rows = [row for run in runs for row in run.history]
    for ours, theirs in mapping.history.items():
        _check_key("metric", theirs.metric, f"history.{ours}", rows, where)


def _check_key(what: str, key: str | None, place: str, found: Sequence[Mapping[str, Any]], where: str) -> None:
    if key is not None and found and all(_look_up(values, key) is None for values in found):
        names = {name for values in found for name in _dotted(values)}
        advice = hint(key, names, otherwise="see one of them in W&B")
        raise UserError(f"no run of {where} has the {what} '{key}' ({place} of the mapping): {advice}")


def _dotted(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Yield the keys of nested dictionaries, joined by dots."""
    for key, value in values.items():
        yield f"{before}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{before}{key}.")


@dataclass(kw_only=True)
class MappedRun:
    """A run that dlm did not launch, as a row of runs.csv or excluded.csv."""

    row: Row
    excluded: Excluded | None  # why the run is not in runs.csv; None: it is
    cell: tuple[str, ...] | None  # equal for runs of one cell; None: not compared with other runs
    heartbeat: str  # the time of the last heartbeat of the run, ISO 8601


def map_history(run: WandbRun, mapping: RunMapping) -> History:
    """Return the history of a run under dlm's names, merged on the optimiser step."""
    names = {"step": Metric(metric="_step"), **mapping.history}
    rows = []
    for row in run.history:
        values = {ours: number(row.get(theirs.metric)) for ours, theirs in names.items()}
        rows.append({ours: value * names[ours].scale for ours, value in values.items() if value is not None})
    return from_rows(rows, str(run.run_id), run.key(mapping.hash), [])


def map_run(run: WandbRun, history: History, mapping: RunMapping) -> MappedRun:
    """Turn one run into a row of runs.csv, or find out why the run is excluded."""
    row: Row = {"run_id": run.run_id, "sweep": run.group, "source": "wandb_api", "status": run.state}
    excluded = cell = None
    try:
        _check_config(run, mapping)
        cell = tuple(str(_require(run.config, key, "config")) for key in mapping.cell) or None
        row |= {name: _as_column(name, _value(run, column)) for name, column in mapping.columns.items()}
        row |= _flops(row, mapping)
        row |= _final_loss(run, row.get("steps"), history) | {"status": str(State.DONE)}
    except Excluded as reason:
        excluded, cell = reason, None
    return MappedRun(row=row, excluded=excluded, cell=cell, heartbeat=run.version.split("@")[1])


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
        found = _look_up(run.config, key)
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
        raise Excluded(Cause.OTHER_CONFIG, f"{key} is {_shown(value)}, not a number") from error
    if not math.isfinite(found):
        raise Excluded(Cause.OTHER_CONFIG, f"{key} is {_shown(value)}, not a finite number")
    return found


def _shown(value: Any) -> str:
    """Return the ``repr`` of a value, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require(values: Mapping[str, Any], key: str, where: str) -> Any:
    found = _look_up(values, key)
    if found is None:
        raise Excluded(Cause.OTHER_CONFIG, f"its {where} has no {key}")
    return found


def _look_up(values: Any, key: str) -> Any:
    """Return the value of a dotted key, which may be a literal key or a path through nested dictionaries."""
    if isinstance(values, dict) and key in values:
        return values[key]
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


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
    kind = COLUMN_TYPES[name]
    if "str" in kind:
        return str(value)
    found = _as_number(value, name)
    if "int" not in kind:
        return float(found)
    least = 1 if name in ("params", "tokens", "steps") else 0
    if found != int(found) or not least <= found < 2**63:
        details = f"{name} is {_shown(value)}, not a whole number of at least {least}"
        raise Excluded(Cause.OTHER_CONFIG, details)
    return int(found)


def _final_loss(run: WandbRun, steps: int | None, history: History) -> Row:
    """Return the validation loss at the planned last step, or at the last logged step if ``steps`` is not known.

    Raises Excluded for a run that is short, has diverged or lacks this loss.
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
    if steps and last < steps:
        raise Excluded(Cause.SHORT, f"step {last} of {steps} (W&B says {run.state})")
    if not steps and run.state != "finished":
        details = f"W&B says {run.state} at step {last}, and no columns.steps tells how far it was to go"
        raise Excluded(Cause.SHORT, details)
    loss, error = history.at(steps or last)
    if loss is None:
        where = f"step {steps}" if steps else f"the last step, {last}"
        raise Excluded(Cause.NO_VALIDATION, f"no val/loss at {where}")
    if not math.isfinite(loss):
        raise Excluded(State.DIVERGED, f"its validation loss is {loss}")
    return {"loss": loss, "loss_se": error}
