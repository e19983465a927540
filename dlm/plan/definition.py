"""Read and check the definition of a sweep: sweeps/*.yaml -> SweepSpec."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dlm.core.checks import MOST_OF, NAMES
from dlm.core.configs import load_base, load_mapping, parse_setting
from dlm.core.data_only import check_data, check_settings
from dlm.core.errors import UserError, hint, shown, unknown
from dlm.core.flops import PEAK_FLOPS, Convention, check_budget
from dlm.core.identity import SWEEP_NAME, SWEEP_NAME_WORDS
from dlm.core.limits import MOST_CELLS
from dlm.core.paths import sweeps_dir
from dlm.core.validation import validated
from dlm.plan.values import Extent, Factor, Frozen, Number, Share, Value, Whole, no_switch


def _sweep_name(value: str) -> str:
    if not re.fullmatch(SWEEP_NAME, value):
        raise ValueError(SWEEP_NAME_WORDS)
    return value


# The fields of a definition that select which cells exist and decide nothing about a cell. A sweep may grow in them.
LISTS_OF_CELLS = ("budgets", "models", "seeds")
LIMITS_OF_CELLS = ("tokens_per_param", "sizes_per_budget", "max_epochs", "replicates", "tune")
LATER_HARDWARE = ("peak_flops", "price_per_gpu_hour")  # keys of GPUs; plan.json has them only if they are set
# Fields that earlier versions lack; plan.json has them only if they differ from their defaults.
NEW_FIELDS = ("proof", "replicates", "branches", "launcher", "max_cells", "tune", "recipe")


class Hardware(Frozen):
    """The devices that one cell runs on. They determine its estimate and the resources of its job."""

    device: str = "H100"  # cpu, a key of flops.PEAK_FLOPS, or another GPU with its peak_flops
    nodes: Annotated[Whole, Field(ge=1, le=10**6)] = 1
    gpus_per_node: Annotated[Whole, Field(ge=0, le=10**6)] = 8
    # Assumed share of the peak, counted in full_masked_head FLOPs; None: by size, device and compilation (speed.py).
    mfu: Annotated[Number, Field(ge=1e-6, le=1)] | None = None
    # Dense bf16 FLOP/s of one GPU; None: from PEAK_FLOPS.
    peak_flops: Annotated[Number, Field(ge=1, le=1e30)] | None = None
    # What one GPU costs in an hour, in the user's currency; None: plans show no price.
    price_per_gpu_hour: Annotated[Number, Field(ge=0, le=1e9)] | None = None

    @model_validator(mode="after")
    def _has_peak(self) -> Hardware:
        for key in LATER_HARDWARE:
            if self.device == "cpu" and getattr(self, key) is not None:
                raise UserError(f"hardware.{key} is for GPUs, and hardware.device is cpu: leave it out")
        if self.device != "cpu" and self.device not in PEAK_FLOPS and self.peak_flops is None:
            near = hint(self.device, ["cpu", *PEAK_FLOPS], otherwise="")
            raise UserError(
                f"hardware.device is {self.device!r}, whose peak speed dlm does not know: {near + ' ' if near else ''}"
                "add hardware.peak_flops, the dense bf16 FLOP/s of one such GPU, for instance 165e12; without it, "
                f"allowed are cpu, {', '.join(PEAK_FLOPS)}"
            )
        return self

    @property
    def peak(self) -> float:
        """The dense bf16 peak of one GPU in FLOP/s."""
        return PEAK_FLOPS[self.device] if self.peak_flops is None else self.peak_flops

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the hardware as plain values, without the LATER_HARDWARE that is not set, as earlier versions do."""
        plain: dict[str, Any] = dump(self)
        return {key: value for key, value in plain.items() if key not in LATER_HARDWARE or value is not None}


class Proof(Frozen):
    """The proof run: the compute-optimal model above the top budget, whose loss is predicted before it is trained."""

    factor: Annotated[Number, Field(ge=1, le=1e6)] = 3.0  # its budget over the top budget
    # 3: also half and twice the best size; the minimum of the three tests N* itself.
    sizes: Annotated[Literal[1, 3], BeforeValidator(no_switch)] = 1


class Replicates(Frozen):
    """A rule for further runs of cells.

    Short runs vary more between seeds than long ones, and cost less. The smallest and the largest size of a budget say
    most about where its minimum lies.
    """

    below: Annotated[Number, Field(gt=0)]  # the rule holds below this multiple of the top budget
    runs: Annotated[Whole, Field(ge=2, le=100)]  # how often each of these cells is trained, each time with another seed
    sizes: Literal["all", "ends"] = "all"  # ends: only the smallest and the largest size of each budget

    @model_serializer(mode="wrap")
    def _plain(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the rule as plain values, without `sizes` if it is the default, which earlier versions do not know."""
        plain: dict[str, Any] = dump(self)
        return plain if self.sizes == "ends" else {key: value for key, value in plain.items() if key != "sizes"}


class Tune(Frozen):
    """Further cells that vary the learning rate and the batch at one size of some budgets."""

    lr: tuple[Factor, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)  # times the learning rate of the recipe
    batch: tuple[Factor, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)  # times its batch
    at: tuple[Literal["lowest", "highest"], ...] = Field(default=("lowest", "highest"), min_length=1)  # budgets
    # The size at each of these budgets, by its name; null: the middle one of the budget.
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    replicates: Annotated[Whole, Field(ge=0, le=100)] = 3  # how many of the cells are trained with a second seed too

    @model_validator(mode="after")
    def _fits_together(self) -> Tune:
        for name, factors in (("lr", self.lr), ("batch", self.batch)):
            if 1.0 not in factors:
                raise UserError(f"tune.{name} is {[*factors]}: it must hold 1, the recipe itself")
        if self.models is not None and len(self.models) != len(self.at):
            raise UserError(
                f"tune.models names {len(self.models)} sizes, and tune.at {len(self.at)} budgets: name one for each"
            )
        return self

    @model_serializer(mode="wrap")
    def _plain(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the plain values, without `models` if it is null."""
        plain: dict[str, Any] = dump(self)
        return {key: value for key, value in plain.items() if key != "models" or value is not None}


def _switched(value: object) -> object:
    """Convert `tune: true` to the defaults of Tune, and false to null."""
    return ({} if value else None) if isinstance(value, bool) else value


FITTED = "fitted"  # the recipe that was fitted to the tuning cells of the sweep


def _recipe_name(value: str) -> str:
    if value not in (*NAMES["recipe"], FITTED) and not value.endswith(".json"):
        raise ValueError(f"allowed are {', '.join(NAMES['recipe'])}, {FITTED}, and the path of a recipe.json")
    return value


class LauncherRule(Frozen):
    """Keys of hydra.launcher for the jobs of some cells, such as another partition for large models."""

    at_least: Annotated[Number, Field(ge=0)] = 0.0  # N; the rule holds for models from this size
    below: Annotated[Extent, Field(gt=0)] = math.inf  # N; and for models smaller than this
    set: dict[str, Value] = Field(min_length=1)  # key of hydra.launcher -> value

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


class SweepSpec(Frozen):
    """A sweep definition: the cells to train, and the settings that they share."""

    name: Annotated[str, AfterValidator(_sweep_name)]
    description: str = ""
    budgets: tuple[Number, ...] = Field(min_length=1)  # target FLOPs of a cell
    budget_fractions: tuple[Share, ...] = Field(default=(1.0, 1 / 3, 0.1, 1 / 30), min_length=1)  # shares of top budget
    convention: Convention = "6n"
    models: tuple[str, ...] = Field(min_length=1)
    tokens_per_param: tuple[Number, Number] | None = None  # (lowest, highest); cells outside are dropped
    sizes_per_budget: Annotated[Whole, Field(ge=1)] | None = None  # sizes to keep, evenly spread
    objectives: tuple[str, ...] = Field(default=("masked_diffusion",), min_length=1)
    seeds: tuple[Annotated[Whole, Field(ge=0, le=MOST_OF["seed"])], ...] = Field(default=(0,), min_length=1)
    groups: dict[str, str] = Field(default_factory=dict)  # Hydra group -> choice, for every cell
    set: dict[str, Value] = Field(default_factory=dict)  # config key -> value, for every cell
    # Key or group -> values; one cell per combination.
    vary: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(default_factory=dict)
    branches: bool = False  # cells of lower budgets start from checkpoints of the cell with the highest
    max_epochs: Annotated[Number, Field(gt=0)] = 4.0  # cells that read their data more often are dropped
    max_cells: Annotated[Whole, Field(ge=1)] = (
        MOST_CELLS  # a definition with more combinations of values is not planned
    )
    max_gpu_hours: Annotated[Number, Field(gt=0)] | None = None  # a plan that costs more needs YES=1
    max_local_hours: Annotated[Number, Field(gt=0)] = 24.0  # a longer sweep is not started on this machine
    hardware: Hardware = Hardware()
    proof: Proof | None = None  # the run that tests the law of the sweep; null leaves it out
    replicates: Annotated[tuple[Replicates, ...], BeforeValidator(_rules)] = ()  # a rule, or a list of rules
    launcher: Annotated[tuple[LauncherRule, ...], BeforeValidator(_rules)] = ()  # later rules take precedence
    tune: Annotated[Tune | None, BeforeValidator(_switched)] = None  # true: as Tune has it
    # smdm, power_law, fitted, or the path of a recipe.json; null: the `recipe` of the config keys.
    recipe: Annotated[str, AfterValidator(_recipe_name)] | None = None

    def plain(self) -> dict[str, Any]:
        """Return the definition as plain values, as plan.json holds it, without the NEW_FIELDS that are as usual."""
        usual = type(self).model_fields
        plain = self.model_dump(
            mode="json", exclude={key for key in NEW_FIELDS if getattr(self, key) == usual[key].default}
        )
        if len(self.replicates) == 1:  # as earlier versions read it
            (plain["replicates"],) = plain["replicates"]
        return plain

    def seeds_at(self, budget: float, *, is_end: bool = True) -> tuple[int, ...]:
        """Return the seeds of the cells at a budget, with those that the rules of ``replicates`` add.

        Args:
            budget: FLOPs.
            is_end: Whether the size of the cells is the smallest or the largest of the budget.
        """
        return tuple(seed + SEED_STEP * k for k in range(self._runs_at(budget, is_end)) for seed in self.seeds)

    def _runs_at(self, budget: float, is_end: bool) -> int:
        top = max(self.budgets)
        rules = [rule for rule in self.replicates if budget < rule.below * top and (is_end or rule.sizes == "all")]
        return max((rule.runs for rule in rules), default=1)

    def num_combinations(self) -> int:
        """Return the number of combinations of the values, each of which is a cell or is dropped; it makes none."""
        seeds = sum(len(self.seeds) * self._runs_at(budget, True) for budget in self.budgets)
        tune = self.tune
        tuning = 0 if tune is None else len(tune.at) * len(tune.lr) * len(tune.batch) + tune.replicates
        grid = math.prod(map(len, self.vary.values())) * len(self.models) * seeds
        return len(self.objectives) * (grid + tuning)

    def identity(self) -> dict[str, Any]:
        """Return the fields that all definitions of one sweep must share.

        The fields that only select which cells exist may grow, and the description, the limits on the cost, the
        hardware, the proof run, the sharing of trunks and the rules for the launcher may change.
        """
        cost = {"max_cells", "max_gpu_hours", "max_local_hours", "hardware"}
        others = {"budget_fractions", "description", "proof", "branches", "launcher"}
        without = {*cost, *others, *LISTS_OF_CELLS, *LIMITS_OF_CELLS}
        plain = self.plain()
        if self.recipe in NAMES["recipe"]:  # earlier versions have it under `set`
            plain["set"] = {**plain["set"], "recipe": plain.pop("recipe")}
        return {key: value for key, value in plain.items() if key not in without}

    def with_budgets(self, budgets: Iterable[float]) -> SweepSpec:
        """Return this definition with other budgets (target FLOPs), sorted and without duplicates."""
        return self.model_copy(update={"budgets": tuple(sorted(set(budgets)))})


def find_definition(name: str, others: Callable[[], Iterable[str]] = tuple) -> Path:
    """Find the file of a sweep definition.

    Args:
        name: The path of a YAML file, or the name of a definition in sweeps/.
        others: Returns other names that a user may have meant.

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
    shipped_names = sorted(path.stem for path in sweeps_dir().glob("*.yaml"))
    raise unknown("sweep", name, dict.fromkeys([*others(), *shipped_names]))


def load_sweep(path: Path, settings: Iterable[str] = ()) -> SweepSpec:
    """Read a definition from a file.

    Args:
        path: The YAML file.
        settings: Changes of the form KEY=VALUE, with dotted keys and YAML values, as --set takes them.

    Raises:
        UserError: The file or a setting cannot be read, or the definition is invalid.
    """
    content = load_mapping(path)
    for where in ("set", "groups"):
        for key in _keys_of(content, where):
            if key in _keys_of(content, "vary"):
                raise UserError(f"{path}: {where} and vary both have {key}, and only vary counts: remove one of them")
    for setting in settings:
        _set(content, setting)
    return parse_sweep(content, str(path))


def with_settings(spec: SweepSpec, settings: Iterable[str]) -> SweepSpec:
    """Return a definition with changes of the form KEY=VALUE, as --set takes them."""
    content = spec.plain()
    for setting in settings:
        _set(content, setting)
    return parse_sweep(content, spec.name)


def _keys_of(content: dict[str, Any], top: str) -> list[Any]:
    """Return the keys below a key of a definition that is not checked yet."""
    node = content.get(top)
    return list(node) if isinstance(node, dict) else []


def _set(content: dict[str, Any], setting: str) -> None:
    key, value = parse_setting(setting, "--set")
    top, _, rest = key.partition(".")
    config_key = rest if top in ("set", "groups") and rest else key
    if config_key in _keys_of(content, "vary"):
        raise UserError(
            f"--set {setting} would change nothing, because the definition varies {config_key}: "
            f"use --set vary.{config_key}=[{shown(value)}]"
        )
    if top in ("set", "vary", "groups", "hardware", "proof", "replicates", "tune") and rest:
        node = content.get(top) or {}
        if top == "tune" and node is True:
            node = {}
        if isinstance(node, list) and len(node) == 1:  # a list of one rule is that rule
            (node,) = node
        if not isinstance(node, dict):
            raise UserError(f"--set {setting}: {top} is {node}: set all of it, --set {top}=...")
        content[top] = {**node, rest: value}
    elif top in SweepSpec.model_fields:
        if key == "recipe" and isinstance(content.get("set"), dict):  # the key of the definition replaces that of cells
            content["set"] = {name: one for name, one in content["set"].items() if name != "recipe"}
        content[key] = value
    elif "." not in key and key not in load_base():
        raise unknown("key in --set", key, [*SweepSpec.model_fields, "groups.GROUP", "GROUP.KEY"])
    else:  # a config key, for every cell
        content["set"] = {**(content.get("set") or {}), key: value}


def parse_sweep(content: dict[str, Any], source: str) -> SweepSpec:
    """Make a SweepSpec from plain values.

    Raises UserError for the first mistake; the message names ``source`` and the key.
    """
    for key in content:
        _check_not_dotted(key, source)
    check_data({key: value for key, value in content.items() if key != "description"}, source)
    for where in ("set", "vary", "groups"):
        check_settings(content.get(where), source)
    spec = validated(SweepSpec, content, source)
    for budget in spec.budgets:
        check_budget(budget, f"{source}: a value of budgets")
    if spec.recipe is not None and "recipe" in {**spec.set, **spec.vary}:
        raise UserError(f"{source}: recipe stands at the top and under set or vary: remove one of them")
    window = spec.tokens_per_param
    if window is not None and not 0 < window[0] < window[1]:
        raise UserError(
            f"{source}: tokens_per_param is {shown(content['tokens_per_param'])}: it must be [lowest, highest], both "
            "above zero"
        )
    return spec


def _check_not_dotted(key: object, source: str) -> None:
    """Raise UserError for a dotted key at the top of a definition, which belongs below `set` or another key."""
    top, dot, rest = str(key).partition(".")
    if dot:
        place = f"{top}: {{{rest}: ...}}" if top in SweepSpec.model_fields else f"set: {{{key}: ...}}"
        raise UserError(f"{source}: unknown key '{key}': a definition has no dotted keys at the top; write {place}")
