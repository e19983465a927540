"""sweep: one sweeps/*.yaml -> SweepSpec, validated and frozen. Called by cli and plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from dlm.core.configs import load_base, load_yaml, parse_yaml
from dlm.core.errors import UserError, close_matches, unknown
from dlm.core.flops import PEAK_FLOPS, Convention, check_budget
from dlm.core.identity import SWEEP_NAME
from dlm.core.paths import sweeps_dir


def _number(value: object) -> object:
    """1/3 and '1e19' as numbers; anything else is left for the validation to refuse."""
    if isinstance(value, str):
        try:
            return float(Fraction(value)) if "/" in value else float(value)
        except (ValueError, ZeroDivisionError):
            return value
    return value


Number = Annotated[float, BeforeValidator(_number)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hardware(_Frozen):
    """What one cell runs on, for the estimate and the job's resources."""

    device: str = "H100"  # cpu, or a name of flops.PEAK_FLOPS
    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=8, ge=0)
    mfu: float = Field(default=0.4, gt=0, le=1)  # assumed share of the peak, in true FLOPs

    @field_validator("device")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "cpu" and value not in PEAK_FLOPS:
            raise unknown("hardware.device", value, ["cpu", *PEAK_FLOPS])
        return value


class SweepSpec(_Frozen):
    """A sweep definition: which cells, and what they have in common."""

    name: str = Field(pattern=f"^{SWEEP_NAME}$")
    description: str = ""
    budgets: tuple[Number, ...]  # target FLOPs of one cell
    budget_fractions: tuple[Number, ...] = (1.0, 1 / 3, 0.1, 1 / 30)  # of the top budget, for make's BUDGET
    convention: Convention = "6n"
    models: tuple[str, ...]
    tokens_per_param: tuple[Number, Number] | None = None  # cells outside are dropped
    sizes_per_budget: int | None = Field(default=None, ge=1)  # of those inside, this many, evenly spread
    objectives: tuple[str, ...] = ("masked_diffusion",)
    seeds: tuple[int, ...] = (0,)
    groups: dict[str, str] = Field(default_factory=dict)  # choices of Hydra groups, for every cell
    set: dict[str, Any] = Field(default_factory=dict)  # values of config keys, for every cell
    vary: dict[str, tuple[Any, ...]] = Field(default_factory=dict)  # a cell for every combination
    max_epochs: float = Field(default=4.0, gt=0)
    max_gpu_hours: float | None = Field(default=None, gt=0)  # more needs YES=1
    max_local_hours: float = Field(default=24.0, gt=0)  # a sweep that takes longer on this machine is not started here
    hardware: Hardware = Hardware()

    @field_validator("budget_fractions")
    @classmethod
    def _fractions(cls, value: Sequence[float]) -> Sequence[float]:
        if not value or not all(0 < fraction <= 1 for fraction in value):
            raise ValueError("needs numbers above 0 and up to 1")
        return value

    @field_validator("models", "objectives", "seeds", "budgets")
    @classmethod
    def _not_empty(cls, value: Sequence[object]) -> Sequence[object]:
        if not value:
            raise ValueError("needs at least one value")
        return value

    def identity(self) -> dict[str, Any]:
        """The definition without what may grow or is about this machine: equal for the same sweep."""
        changing = {"budgets", "budget_fractions", "description", "max_gpu_hours", "max_local_hours", "hardware"}
        return self.model_dump(mode="json", exclude=changing)

    def with_budgets(self, budgets: Iterable[float]) -> SweepSpec:
        """The same definition with other budgets, ascending and without repeats."""
        return self.model_copy(update={"budgets": tuple(sorted(set(budgets)))})


def find_definition(name: str) -> Path:
    """The file of a definition: a path, or a name in sweeps/. Raises UserError with the close matches."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        name = path.stem if path.parent in (Path(), Path("sweeps")) else str(path)
    shipped = sweeps_dir() / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    raise unknown("sweep definition", name, sorted(path.stem for path in sweeps_dir().glob("*.yaml")))


def load_sweep(path: Path, settings: Iterable[str] = ()) -> SweepSpec:
    """Read a definition; ``settings`` are KEY=VALUE (YAML values, dotted keys) that change it first."""
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of keys to values")
    for setting in settings:
        _set(content, setting)
    return parse_sweep(content, str(path))


def _set(content: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise UserError(f"--set {setting}: write it as KEY=VALUE")
    value = parse_yaml(text, f"--set {setting}")
    top, _, rest = key.partition(".")
    if top in ("set", "vary", "groups", "hardware") and rest:
        content[top] = {**(content.get(top) or {}), rest: value}
    elif top in SweepSpec.model_fields:
        content[key] = value
    elif "." not in key and key not in load_base():
        raise unknown("key in --set", key, [*SweepSpec.model_fields, "GROUP.KEY"])
    else:  # a config key: the same for every cell
        content["set"] = {**(content.get("set") or {}), key: value}


def parse_sweep(content: dict[str, Any], source: str) -> SweepSpec:
    """A SweepSpec from plain values; the first mistake is one line that names the key."""
    try:
        spec = SweepSpec(**content)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from error
    for budget in spec.budgets:
        check_budget(budget, "budgets")
    window = spec.tokens_per_param
    if window is not None and not 0 < window[0] < window[1] < math.inf:
        raise UserError(f"{source}: tokens_per_param is {list(window)}: give [lowest, highest]")
    return spec


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = close_matches(key, SweepSpec.model_fields)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return f"unknown key '{key}': {hint}allowed: {', '.join(SweepSpec.model_fields)}"
    return f"{key} is {first['input']!r}: {first['msg']}" if first["type"] != "missing" else f"{key} is missing"
