"""Read a mapping file, which tells how W&B runs that dlm did not launch become rows of runs.csv, and check its names.

A mapping (`dlm collect --wandb ENTITY/PROJECT --mapping FILE --out DIR`) is a YAML file:

    columns:                       # columns of runs.csv, by default from the config of a run
      params: model.non_embedding  # a config key; a dot leads into a nested dictionary
      tokens: {product: [train.steps, train.batch, train.length]}
      steps: train.steps           # the planned last step, if it is known; shorter runs are left out
      step_offset: 1               # how many steps the last logged step lacks: 1 for runs that count from 0
      objective: {value: masked_diffusion}
      budget: {summary: total_flops, scale: 1e12}   # a key of the summary, and a factor
    history:                       # columns of the history, and the names under which runs log them
      step: trainer/global_step    # the optimiser step; by default W&B's own step
      val/loss: {metric: eval/nll, scale: 1.0}      # in nats per token after scaling
      train/loss: loss
    convention: 6n                 # how FLOPs are counted: 6n is computed, any other needs columns.flops
    require: {data.name: [slimpajama]}              # allowed config values; runs with other values are left out
    cell: [model.name, train.steps, seed]           # required config keys; of runs with equal values, the latest counts

Lightning and Levanter count steps from 0, so the last step of 40 is logged as 39. Without step_offset, a run that W&B
says is finished is whole if its validation is at the planned last step or one before it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from dlm.collect.dotted import dotted_names, spellings
from dlm.collect.history import NUMBERS, number
from dlm.collect.row import COLUMN_TYPES
from dlm.collect.wandb_file import WandbRun
from dlm.core import configs
from dlm.core.errors import UserError, hint, shown, unknown
from dlm.core.flops import CONVENTIONS
from dlm.core.identity import content_hash
from dlm.core.validation import validated

OFFSET = "step_offset"  # is mapped like a column, and is in no table
# The columns that a mapping may fill; dlm itself fills in the others.
COLUMNS = (
    *(
        name
        for name in COLUMN_TYPES
        if name not in ("run_id", "sweep", "loss", "loss_se", "source", "status", "convention")
    ),
    OFFSET,
)
READING = 1  # increase it when the same mapping reads a history differently
WHOLE = ("step", "tokens")  # metrics that are whole numbers
METRICS = (*WHOLE, *NUMBERS)


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
    """The origin of a column: exactly one of config, summary, product (of config keys) and value, times scale.

    A bare number is short for ``{value: number}``.
    """

    short = "config"
    config: str | None = None
    summary: str | None = None
    product: tuple[str, ...] | None = None
    value: Any = None

    @model_validator(mode="before")
    @classmethod
    def _expand_number(cls, given: Any) -> Any:
        return {"value": given} if isinstance(given, int | float) and not isinstance(given, bool) else given

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
        return content_hash([READING, self.model_dump()["history"]])[:8]


def load_mapping(path: Path) -> RunMapping:
    """Read a mapping file. Raises UserError, which names the faulty key and what is allowed."""
    mapping = validated(RunMapping, configs.load_mapping(path), str(path))
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
    _check_offset(mapping, path)
    return mapping


def _check_offset(mapping: RunMapping, path: Path) -> None:
    """Raise UserError for a step_offset without steps, or with a value that is no whole number."""
    offset = mapping.columns.get(OFFSET)
    if offset is None:
        return
    if "steps" not in mapping.columns:
        raise UserError(f"{path}: columns.{OFFSET} needs columns.steps, the planned last step that it is counted from")
    value = offset.value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and float(value * offset.scale).is_integer()):
        raise UserError(f"{path}: columns.{OFFSET} is {value!r}: give a whole number, such as 1")


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
    """Raise UserError for a name in ``mapping.history`` under which no run logs a number.

    The histories of all runs must be read.
    """
    rows = [row for run in runs for row in run.history]
    for ours, theirs in mapping.history.items():
        name, place = theirs.metric, f"history.{ours}"
        _check_key("metric", name, place, rows, where)
        if rows and not any(number(value) is not None for row in rows for value in spellings(row, name)):
            first = next(value for row in rows for value in spellings(row, name))
            others = {other for row in rows for other in dotted_names(row)} - {name}
            advice = _advice(name, others)
            raise UserError(
                f"the metric '{name}' ({place} of the mapping) is no number in {where}, but {shown(first)}: {advice}"
            )


def _check_key(what: str, key: str | None, place: str, found: Sequence[Mapping[str, Any]], where: str) -> None:
    if key is not None and found and not any(any(True for _ in spellings(values, key)) for values in found):
        names = {name for values in found for name in dotted_names(values)}
        raise UserError(f"no run of {where} has the {what} '{key}' ({place} of the mapping): {_advice(key, names)}")


def _advice(key: str, names: Collection[str]) -> str:
    """Suggest the names that a user may have meant: similar ones, or those with the key as a part."""
    longer = sorted(name for name in names if f"/{key}/" in f"/{name.replace('.', '/')}/")[:3]
    return f"did you mean {' or '.join(longer)}?" if longer else hint(key, names, otherwise="see one of them in W&B")
