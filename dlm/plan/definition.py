"""Read and check the definition of a sweep: sweeps/*.yaml -> SweepSpec."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from dlm.core.configs import load_base, load_mapping, parse_setting
from dlm.core.errors import UserError, unknown
from dlm.core.flops import PEAK_FLOPS, Convention, check_budget
from dlm.core.identity import SWEEP_NAME
from dlm.core.paths import sweeps_dir


def _number(value: object) -> object:
    """Convert a fraction such as '1/3' to a float. Return other values unchanged, for pydantic to check."""
    if isinstance(value, str) and "/" in value:
        with contextlib.suppress(ValueError, ZeroDivisionError):
            return float(Fraction(value))
    return value


Number = Annotated[float, BeforeValidator(_number)]
Share = Annotated[Number, Field(gt=0, le=1)]


# The fields of a definition that select which cells exist and decide nothing about a cell. A sweep may grow in them.
LISTS_OF_CELLS = ("budgets", "models", "seeds")
LIMITS_OF_CELLS = ("tokens_per_param", "sizes_per_budget", "max_epochs", "replicates")
# Fields that earlier versions lack; plan.json has them only if they are set.
NEW_FIELDS = ("proof", "replicates", "branches", "launcher")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hardware(_Frozen):
    """The devices that one cell runs on. They determine its estimate and the resources of its job."""

    device: str = "H100"  # cpu, or a key of flops.PEAK_FLOPS
    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=8, ge=0)
    mfu: float = Field(default=0.4, gt=0, le=1)  # assumed share of the peak, counted in full_masked_head FLOPs

    @field_validator("device")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "cpu" and value not in PEAK_FLOPS:
            raise unknown("hardware.device", value, ["cpu", *PEAK_FLOPS])
        return value


class Proof(_Frozen):
    """The proof run: the compute-optimal model above the top budget, whose loss is predicted before it is trained."""

    factor: Annotated[Number, Field(ge=1, allow_inf_nan=False)] = 3.0  # its budget over the top budget
    sizes: Literal[1, 3] = 1  # 3: also half and twice the best size; the minimum of the three tests N* itself


class Replicates(_Frozen):
    """A rule for further runs of cells.

    Short runs vary more between seeds than long ones, and cost less. The smallest and the largest size of a budget say
    most about where its minimum lies.
    """

    below: Annotated[Number, Field(gt=0, allow_inf_nan=False)]  # the rule holds below this multiple of the top budget
    runs: int = Field(ge=2, le=100)  # how often each of these cells is trained, each time with another seed
    sizes: Literal["all", "ends"] = "all"  # ends: only the smallest and the largest size of each budget

    @model_serializer(mode="wrap")
    def _plain(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the rule as plain values, without `sizes` if it is the default, which earlier versions do not know."""
        plain: dict[str, Any] = dump(self)
        return plain if self.sizes == "ends" else {key: value for key, value in plain.items() if key != "sizes"}


class LauncherRule(_Frozen):
    """Keys of hydra.launcher for the jobs of some cells, such as another partition for large models."""

    at_least: Annotated[Number, Field(ge=0)] = 0.0  # N; the rule holds for models from this size
    below: Annotated[Number, Field(gt=0)] = math.inf  # N; and for models smaller than this
    set: dict[str, Any] = Field(min_length=1)  # key of hydra.launcher -> value

    def holds_for(self, num_params: int) -> bool:
        """Whether the rule holds for a model with ``num_params`` parameters, embeddings not counted."""
        return self.at_least <= num_params < self.below

    @model_serializer(mode="wrap")
    def _plain(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the rule as plain values, without an infinite size, which JSON cannot hold."""
        plain: dict[str, Any] = dump(self)
        return {key: value for key, value in plain.items() if key != "below" or self.below < math.inf}


def _rules(value: object) -> object:
    """Convert null to no rule, and one rule to a list of rules."""
    if value is None or isinstance(value, dict | Replicates | LauncherRule):
        return () if value is None else (value,)
    if not isinstance(value, list | tuple):
        raise ValueError("give a rule, {KEY: VALUE, ...}, or a list of rules")
    return value


SEED_STEP = 1000  # the further runs of a cell with seed s have the seeds s + 1000, s + 2000, ...


class SweepSpec(_Frozen):
    """A sweep definition: the cells to train, and the settings that they share."""

    name: str = Field(pattern=f"^{SWEEP_NAME}$")
    description: str = ""
    budgets: tuple[Number, ...] = Field(min_length=1)  # target FLOPs of a cell
    budget_fractions: tuple[Share, ...] = Field(default=(1.0, 1 / 3, 0.1, 1 / 30), min_length=1)  # shares of top budget
    convention: Convention = "6n"
    models: tuple[str, ...] = Field(min_length=1)
    tokens_per_param: tuple[Number, Number] | None = None  # (lowest, highest); cells outside are dropped
    sizes_per_budget: int | None = Field(default=None, ge=1)  # sizes to keep, evenly spread
    objectives: tuple[str, ...] = Field(default=("masked_diffusion",), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    groups: dict[str, str] = Field(default_factory=dict)  # Hydra group -> choice, for every cell
    set: dict[str, Any] = Field(default_factory=dict)  # config key -> value, for every cell
    vary: dict[str, tuple[Any, ...]] = Field(default_factory=dict)  # key or group -> values; one cell per combination
    branches: bool = False  # cells of lower budgets start from checkpoints of the cell with the highest
    max_epochs: float = Field(default=4.0, gt=0)  # cells that read their data more often are dropped
    max_gpu_hours: float | None = Field(default=None, gt=0)  # a plan that costs more needs YES=1
    max_local_hours: float = Field(default=24.0, gt=0)  # a longer sweep is not started on this machine
    hardware: Hardware = Hardware()
    proof: Proof | None = None  # the run that tests the law of the sweep; null leaves it out
    replicates: Annotated[tuple[Replicates, ...], BeforeValidator(_rules)] = ()  # a rule, or a list of rules
    launcher: Annotated[tuple[LauncherRule, ...], BeforeValidator(_rules)] = ()  # later rules take precedence

    def plain(self) -> dict[str, Any]:
        """Return the definition as plain values, as plan.json holds it. A key of NEW_FIELDS is absent if not set."""
        plain = self.model_dump(mode="json", exclude={key for key in NEW_FIELDS if not getattr(self, key)})
        if len(self.replicates) == 1:  # as earlier versions read it
            (plain["replicates"],) = plain["replicates"]
        return plain

    def seeds_at(self, budget: float, *, is_end: bool = True) -> tuple[int, ...]:
        """Return the seeds of the cells at a budget, with those that the rules of ``replicates`` add.

        Args:
            budget: FLOPs.
            is_end: Whether the size of the cells is the smallest or the largest of the budget.
        """
        top = max(self.budgets)
        rules = [rule for rule in self.replicates if budget < rule.below * top and (is_end or rule.sizes == "all")]
        runs = max((rule.runs for rule in rules), default=1)
        return tuple(seed + SEED_STEP * k for k in range(runs) for seed in self.seeds)

    def identity(self) -> dict[str, Any]:
        """Return the fields that all definitions of one sweep must share.

        The fields that only select which cells exist may grow, and the description, the limits on the cost, the
        hardware, the proof run, the sharing of trunks and the rules for the launcher may change.
        """
        cost = {"max_gpu_hours", "max_local_hours", "hardware"}
        others = {"budget_fractions", "description", "proof", "branches", "launcher"}
        without = {*cost, *others, *LISTS_OF_CELLS, *LIMITS_OF_CELLS}
        return {key: value for key, value in self.plain().items() if key not in without}

    def with_budgets(self, budgets: Iterable[float]) -> SweepSpec:
        """Return this definition with other budgets (target FLOPs), sorted and without duplicates."""
        return self.model_copy(update={"budgets": tuple(sorted(set(budgets)))})


def find_definition(name: str) -> Path:
    """Find the file of a sweep definition.

    Args:
        name: The path of a YAML file, or the name of a definition in sweeps/.

    Raises:
        UserError: There is no such definition. The message names close matches.
    """
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
    """Read a definition from a file.

    Args:
        path: The YAML file.
        settings: Changes of the form KEY=VALUE, with dotted keys and YAML values, as --set takes them.

    Raises:
        UserError: The file or a setting cannot be read, or the definition is invalid.
    """
    content = load_mapping(path)
    for setting in settings:
        _set(content, setting)
    return parse_sweep(content, str(path))


def with_settings(spec: SweepSpec, settings: Iterable[str]) -> SweepSpec:
    """Return a definition with changes of the form KEY=VALUE, as --set takes them."""
    content = spec.plain()
    for setting in settings:
        _set(content, setting)
    return parse_sweep(content, spec.name)


def _set(content: dict[str, Any], setting: str) -> None:
    key, value = parse_setting(setting, "--set")
    top, _, rest = key.partition(".")
    if top in ("set", "vary", "groups", "hardware", "proof", "replicates") and rest:
        node = content.get(top) or {}
        if isinstance(node, list) and len(node) == 1:  # a list of one rule is that rule
            (node,) = node
        if not isinstance(node, dict):
            raise UserError(f"--set {setting}: {top} is {node}: set all of it, --set {top}=...")
        content[top] = {**node, rest: value}
    elif top in SweepSpec.model_fields:
        content[key] = value
    elif "." not in key and key not in load_base():
        raise unknown("key in --set", key, [*SweepSpec.model_fields, "groups.GROUP", "GROUP.KEY"])
    else:  # a config key, for every cell
        content["set"] = {**(content.get("set") or {}), key: value}


def parse_sweep(content: dict[str, Any], source: str) -> SweepSpec:
    """Make a SweepSpec from plain values.

    Raises UserError for the first mistake; the message names ``source`` and the key.
    """
    try:
        spec = SweepSpec(**content)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from error
    for budget in spec.budgets:
        check_budget(budget, "budgets")
    window = spec.tokens_per_param
    if window is not None and not 0 < window[0] < window[1] < math.inf:
        raise UserError(f"{source}: tokens_per_param is {list(window)}: it must be [lowest, highest], both above zero")
    return spec


def _explain(error: ValidationError) -> str:
    """Describe the first mistake that pydantic found, in one line."""
    first = error.errors(include_url=False)[0]
    *groups, key = map(str, first["loc"])
    name = ".".join([*groups, key])
    if first["type"] == "extra_forbidden":
        kinds: dict[str, type[BaseModel]] = {
            "hardware": Hardware,
            "proof": Proof,
            "replicates": Replicates,
            "launcher": LauncherRule,
        }
        nodes = {name: kind.model_fields for name, kind in kinds.items()}
        where, fields = (f"key of {'.'.join(groups)}", nodes[groups[0]]) if groups else ("key", SweepSpec.model_fields)
        return str(unknown(where, key, fields))
    if first["type"] == "missing":
        return f"{name} is missing"
    return f"{name} is {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
