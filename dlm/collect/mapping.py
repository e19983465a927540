"""mapping: W&B runs that dlm did not launch, and the names that they use -> rows of runs.csv. Called by collect.

A mapping (`dlm collect --wandb ENTITY/PROJECT --mapping FILE --out DIR`) is a YAML file:

    columns:                       # columns of runs.csv, from the config of a run
      params: model.non_embedding  # a config key; dots go into nested ones
      tokens: {product: [train.steps, train.batch, train.length]}
      steps: train.steps           # the planned last step, where it is known: shorter runs are left out
      objective: {value: masked_diffusion}
      budget: {summary: total_flops, scale: 1e12}   # from the summary, times a factor
    history:                       # numbers of a row of the history, by the names that runs log them under
      step: trainer/global_step    # the optimiser step; by default W&B's own
      val/loss: {metric: eval/nll, scale: 1.0}      # nats per token after the scale
      train/loss: loss
    convention: 6n                 # of the FLOPs; 6n computes them, any other needs columns.flops
    require: {data.name: [slimpajama]}              # config values; runs with others are left out
    cell: [model.name, train.steps, seed]           # every run needs these; the latest of those that agree counts
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from dlm.collect.history import NUMBERS, History, from_rows, number
from dlm.collect.wandb_file import WandbRun
from dlm.core.configs import load_yaml
from dlm.core.errors import UserError, close_matches, unknown
from dlm.core.flops import CONVENTIONS
from dlm.core.identity import content_hash
from dlm.record.columns import RUN_COLUMNS, RunRow
from dlm.record.outcomes import State

OURS = {"run_id", "sweep", "loss", "loss_se", "source", "status", "convention"}  # columns that are not to be mapped


NEEDED = ("params", "tokens")


KINDS = {item.name: str(item.type) for item in dataclasses.fields(RunRow)}


LIVE = ("running", "pending", "preempting")


def _factor(value: float) -> float:
    if not math.isfinite(value) or value == 0:
        raise ValueError(f"{value:g} is no factor: give a finite number that is not 0")
    return value


Scale = Annotated[float, AfterValidator(_factor)]


class Column(BaseModel):
    """Where a column comes from: exactly one of config, summary, product (of config keys) and value; times scale."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    config: str | None = None
    summary: str | None = None
    product: tuple[str, ...] | None = None
    value: Any = None
    scale: Scale = 1.0

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        return {"config": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_source(self) -> Column:
        if sum(item is not None for item in (self.config, self.summary, self.product, self.value)) != 1:
            raise ValueError("give exactly one of config, summary, product, value")
        return self


class Metric(BaseModel):
    """The name that a number of the history is logged under, and what to multiply it with."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    metric: str
    scale: Scale = 1.0

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        return {"metric": given} if isinstance(given, str) else given


class Mapping(BaseModel):
    """One mapping file, validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    columns: dict[str, Column]
    history: dict[str, Metric]
    convention: str = "6n"
    require: dict[str, Any] = {}
    cell: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Changes when a history would be read differently."""
        return content_hash(self.model_dump()["history"])[:8]


class _Left(Exception):
    """Why a run has no row."""


def load_mapping(path: Path) -> Mapping:
    """Read a mapping file. Raises UserError that names the key and what is allowed."""
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping: it needs the keys columns and history")
    try:
        mapping = Mapping.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error
    allowed = [name for name in RUN_COLUMNS if name not in OURS]
    for name in mapping.columns:
        if name not in allowed:
            raise unknown(f"column in {path}:", name, allowed)
    for name in mapping.history:
        if name not in ("step", "tokens", *NUMBERS):
            raise unknown(f"history in {path}:", name, ("step", "tokens", *NUMBERS))
    for name in NEEDED:
        if name not in mapping.columns:
            raise UserError(f"{path} maps no column {name}: add columns.{name}")
    if "val/loss" not in mapping.history:
        raise UserError(f"{path} maps no validation loss: add history.val/loss")
    if mapping.convention not in CONVENTIONS:
        raise unknown(f"convention in {path}:", mapping.convention, CONVENTIONS)
    if mapping.convention != "6n" and "flops" not in mapping.columns:
        raise UserError(f"{path}: convention {mapping.convention} needs columns.flops; only 6n is computed")
    return mapping


def check_keys(mapping: Mapping, runs: Iterable[WandbRun], where: str) -> None:
    """Raises UserError for a config key that the mapping names and no run has: it would leave all of them out."""
    named = [
        (f"columns.{name}", key)
        for name, column in mapping.columns.items()
        for key in (column.config, *(column.product or ()))
        if key is not None
    ]
    named += [("require", key) for key, wanted in mapping.require.items() if None not in _allowed(wanted)]
    named += [("cell", key) for key in mapping.cell]
    given = list(runs)
    for place, key in named:
        _check_key("config key", key, place, [run.config for run in given], where)
    for name, column in mapping.columns.items():
        if column.summary is not None:
            _check_key("summary key", column.summary, f"columns.{name}", [run.summary for run in given], where)


def check_metrics(mapping: Mapping, runs: Iterable[WandbRun], where: str) -> None:
    """The same for the names in ``history``, once all histories are there."""
    rows = [row for run in runs for row in run.history]
    for ours, theirs in mapping.history.items():
        _check_key("metric", theirs.metric, f"history.{ours}", rows, where)


def _check_key(what: str, key: str, place: str, found: Sequence[Dict[str, Any]], where: str) -> None:
    if found and all(_dig(values, key) is None for values in found):
        near = close_matches(key, {name for values in found for name in _dotted(values)})
        hint = f"did you mean {' or '.join(near)}?" if near else "see one of them in W&B"
        raise UserError(f"no run of {where} has the {what} '{key}' ({place} of the mapping): {hint}")


def _dotted(config: Dict[str, Any], before: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{before}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{before}{key}.")


@dataclass(kw_only=True)
class Mapped:
    """A run in dlm's terms: its row, and why it has no place in runs.csv (None: it has)."""

    row: dict[str, Any]
    history: History
    reason: str | None
    cell: tuple[Any, ...] | None
    version: str


def mapped_history(run: WandbRun, mapping: Mapping) -> History:
    """The history of a run under dlm's names, merged on the optimiser step."""
    names = {"step": Metric(metric="_step"), **mapping.history}
    rows = []
    for row in run.history:
        found = {ours: (number(row.get(theirs.metric)), theirs.scale) for ours, theirs in names.items()}
        rows.append({ours: value * scale for ours, (value, scale) in found.items() if value is not None})
    return from_rows(rows, str(run.run_id), history_key(run, mapping), [])


def history_key(run: WandbRun, mapping: Mapping) -> list[list[Any]]:
    """Changes when the run, or how it is read, does."""
    return [[run.version, mapping.hash, 0]] if run.unread is None else [["unread", mapping.hash, 0]]


def map_run(run: WandbRun, history: History, mapping: Mapping) -> Mapped:
    """One run as a row of runs.csv, or the reason why it is none."""
    row: dict[str, Any] = {"run_id": run.run_id, "sweep": run.group, "source": "wandb_api", "status": run.state}
    reason = cell = None
    try:
        _check_config(run, mapping)
        cell = tuple(str(_there(run.config, key, "config")) for key in mapping.cell) or None
        row |= {name: _typed(name, _column(run, column)) for name, column in mapping.columns.items()}
        row |= _flops(row, mapping)
        row |= _final(run, row, history) | {"status": str(State.DONE)}
    except _Left as left:
        reason, cell = str(left), None
    return Mapped(row=row, history=history, reason=reason, cell=cell, version=run.version)


def without_duplicates(mapped: list[Mapped]) -> None:
    """Of runs that are one cell the latest stays; the others are named duplicates."""
    latest: dict[tuple[Any, ...], Mapped] = {}
    for one in mapped:
        if one.cell is None:
            continue
        before = latest.get(one.cell)
        newest = one if before is None or _heartbeat(one) >= _heartbeat(before) else before
        for other in (one, before):
            if other is not None and other is not newest:
                other.reason = f"duplicate: the same cell as {newest.row['run_id']}, which is later"
        latest[one.cell] = newest


def _heartbeat(mapped: Mapped) -> str:
    return mapped.version.split("@")[1]  # ISO 8601: as text in the order of time


def _check_config(run: WandbRun, mapping: Mapping) -> None:
    if run.state in LIVE:
        raise _Left(f"running: W&B says {run.state}; wait, then collect again")
    for key, wanted in mapping.require.items():
        allowed, found = _allowed(wanted), _dig(run.config, key)
        if found not in allowed:
            raise _Left(f"another config: {key} is {found!r}, required is {' or '.join(map(repr, allowed))}")


def _allowed(wanted: Any) -> list[Any]:
    """The values that ``require`` lets through for a key; null is for runs without it."""
    return wanted if isinstance(wanted, list) else [wanted]


def _column(run: WandbRun, column: Column) -> Any:
    if column.value is not None:
        return column.value
    if column.product is not None:
        parts = [_as_number(_there(run.config, key, "config"), key) for key in column.product]
        return _scaled(math.prod(parts), column.scale)
    if column.summary is not None:
        return _scaled(_there(run.summary, column.summary, "summary"), column.scale)
    return _scaled(_there(run.config, str(column.config), "config"), column.scale)


def _scaled(value: Any, scale: float) -> Any:
    if scale == 1.0:
        return value
    return _as_number(_as_number(value, "a scaled value") * scale, "a scaled value")


def _as_number(value: Any, key: str) -> int | float:
    """A finite number; whole ones stay whole."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = value if isinstance(value, int) and abs(value) < 2**63 else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise _Left(f"another config: {key} is {_shown(value)}, no number") from error
    if not math.isfinite(found):
        raise _Left(f"another config: {key} is {_shown(value)}, no finite number")
    return found


def _shown(value: Any) -> str:
    """A value as a line can hold it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _there(values: Dict[str, Any], key: str, where: str) -> Any:
    found = _dig(values, key)
    if found is None:
        raise _Left(f"another config: its {where} has no {key}")
    return found


def _dig(values: Any, key: str) -> Any:
    """The value of a dotted key, in nested mappings or as it is."""
    if isinstance(values, dict) and key in values:
        return values[key]
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _flops(row: Dict[str, Any], mapping: Mapping) -> dict[str, Any]:
    """FLOPs in the stated convention; those of 6n by their definition."""
    six = 6.0 * row["params"] * row["tokens"]
    flops = row.get("flops", six)  # without columns.flops the convention is 6n (load_mapping)
    if not flops > 0:
        raise _Left(f"another config: flops is {flops:g}")
    if mapping.convention == "6n" and not math.isclose(flops, six, rel_tol=0.01):
        raise _Left(f"another convention: its flops are {flops:.4g}, 6 N D is {six:.4g}")
    return {"flops": flops, "convention": mapping.convention, "flops_6n": six, f"flops_{mapping.convention}": flops}


def _typed(name: str, value: Any) -> Any:
    """The value of a column as RunRow types it."""
    kind = KINDS[name]
    if value is None or "str" in kind:
        return None if value is None else str(value)
    found = _as_number(value, name)
    if "int" not in kind:
        return float(found)
    least = 1 if name in ("params", "tokens", "steps") else 0
    if found != int(found) or not least <= found < 2**63:
        raise _Left(f"another config: {name} is {_shown(value)}, no whole number of at least {least}")
    return int(found)


def _final(run: WandbRun, row: Dict[str, Any], history: History) -> dict[str, Any]:
    """The validation loss at the planned last step; at the last step that was logged where no plan is known."""
    last = history.last_step
    if run.unread is not None:
        raise _Left(f"missing validation: its history could not be read ({run.unread})")
    if last is None:
        raise _Left("missing validation: its history has none of the mapped metrics")
    loss, error = history.at(int(row.get("steps") or last))
    known = [value for _, value in sorted((step, value) for step, (value, _) in history.validations.items())]
    if known and not math.isfinite(known[-1]):
        raise _Left(f"diverged: its last validation loss is {known[-1]}")
    if row.get("steps") and last < row["steps"]:
        raise _Left(f"short: step {last} of {row['steps']} (W&B says {run.state})")
    if not row.get("steps") and run.state != "finished":
        raise _Left(f"short: W&B says {run.state} at step {last}, and no columns.steps tells how far it was to go")
    if loss is not None and not math.isfinite(loss):
        raise _Left(f"diverged: its validation loss is {loss}")
    if loss is None:
        where = f"step {row['steps']}" if row.get("steps") else f"the last step, {last}"
        raise _Left(f"missing validation: no val/loss at {where}")
    return {"loss": loss, "loss_se": error}
