"""Read and check the definition of a sweep: sweeps/*.yaml -> SweepSpec."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

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
from dlm.plan.rules import LauncherRule, Proof, Replicates, Tune
from dlm.plan.values import Frozen, Number, Share, Value, Whole


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

    device: str = "H100"
    """`cpu`, a GPU that dlm knows, such as `H100`, or another GPU with its `peak_flops`."""
    nodes: Annotated[Whole, Field(ge=1, le=10**6)] = 1
    """The nodes of a job."""
    gpus_per_node: Annotated[Whole, Field(ge=0, le=10**6)] = 8
    """The GPUs of each node."""
    mfu: Annotated[Number, Field(ge=1e-6, le=1)] | None = None
    """The assumed share of the peak speed, counted in `full_masked_head` FLOPs. Null: dlm assumes a share by size,
    device and compilation: 18 % for 6M and 40 % for 170M and above on an H100 with `trainer.compile=true`, 10 and 22 %
    without (from the memory traffic of a step, not measured)."""
    peak_flops: Annotated[Number, Field(ge=1, le=1e30)] | None = None
    """The dense bf16 FLOP/s of one GPU, for a GPU that dlm does not know, as in
    `{device: RTX4090, peak_flops: 165e12}`; its runs log an MFU if
    `callbacks.speed_monitor.peak_flops_per_device` is set too. Null: from dlm's table."""
    price_per_gpu_hour: Annotated[Number, Field(ge=0, le=1e9)] | None = None
    """What one GPU costs in an hour, in your currency. Null: plans show no price."""

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


def _switched(value: object) -> object:
    """Convert `tune: true` to the defaults of Tune, and false to null."""
    return ({} if value else None) if isinstance(value, bool) else value


FITTED = "fitted"  # the recipe that was fitted to the tuning cells of the sweep


def _recipe_name(value: str) -> str:
    if value not in (*NAMES["recipe"], FITTED) and not value.endswith(".json"):
        raise ValueError(f"allowed are {', '.join(NAMES['recipe'])}, {FITTED}, and the path of a recipe.json")
    return value


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
    """The folder in `workdir/`, and the W&B group."""
    description: str = ""
    """The title of the report."""
    budgets: tuple[Number, ...] = Field(min_length=1)
    """The target training FLOPs of the cells."""
    budget_fractions: tuple[Share, ...] = Field(default=(1.0, 1 / 3, 0.1, 1 / 30), min_length=1)
    """The budgets as shares of the top budget, for `--top-budget`."""
    convention: Convention = "6n"
    """How FLOPs are counted (docs/conventions.md)."""
    models: tuple[str, ...] = Field(min_length=1)
    """The model sizes, by their names in `configs/model` (docs/config_keys.md#model)."""
    tokens_per_param: tuple[Number, Number] | None = None
    """`[lowest, highest]`; cells outside this range are dropped. Null: no limit."""
    sizes_per_budget: Annotated[Whole, Field(ge=1)] | None = None
    """The number of sizes to keep at each budget, evenly spread over the sizes inside the limits. Null: all."""
    objectives: tuple[str, ...] = Field(default=("masked_diffusion",), min_length=1)
    """The training objectives: `masked_diffusion`, `autoregressive`."""
    seeds: tuple[Annotated[Whole, Field(ge=0, le=MOST_OF["seed"])], ...] = Field(default=(0,), min_length=1)
    """The random seeds; one cell for each."""
    groups: dict[str, str] = Field(default_factory=dict)
    """Choices of configuration groups for every cell, such as `data: stdlib` (docs/config_keys.md)."""
    set: dict[str, Value] = Field(default_factory=dict)
    """Values of configuration keys for every cell (docs/config_keys.md)."""
    vary: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Lists of values of configuration keys or groups; one cell for every combination."""
    branches: bool = False
    """Whether cells share trunks (docs/sweeps.md#shared-trunks); needs the scheduler `wsd`."""
    max_epochs: Annotated[Number, Field(gt=0)] = 4.0
    """Cells that would read their data more often are dropped; with `data.unique_tokens`, that much of their data
    (docs/repeated_text.md)."""
    max_cells: Annotated[Whole, Field(ge=1)] = MOST_CELLS
    """A definition with more combinations of values is refused before any cell is made."""
    max_gpu_hours: Annotated[Number, Field(gt=0)] | None = None
    """A plan that costs more needs `YES=1`. Null: no limit."""
    max_local_hours: Annotated[Number, Field(gt=0)] = 24.0
    """A sweep that would take longer on this machine is not started here."""
    hardware: Hardware = Hardware()
    """The devices that one cell runs on; they determine its estimated time and the resources of its job."""
    proof: Proof | None = None
    """The run that tests the law (docs/sweeps.md#the-proof-run). Null: no such run."""
    replicates: Annotated[tuple[Replicates, ...], BeforeValidator(_rules)] = ()
    """Further runs of cells, as a rule or a list of rules. Null: every cell is trained once."""
    launcher: Annotated[tuple[LauncherRule, ...], BeforeValidator(_rules)] = ()
    """Keys of `hydra.launcher` for the jobs of some cells, as a rule or a list of rules
    (docs/cluster.md#small-and-large-cells). Later rules take precedence."""
    tune: Annotated[Tune | None, BeforeValidator(_switched)] = None
    """Cells that vary the learning rate and the batch at one size of the lowest and the highest budget
    (docs/tuning.md#tune-in-a-definition); `true` takes the defaults below. Null: none."""
    recipe: Annotated[str, AfterValidator(_recipe_name)] | None = None
    """Where the learning rate and the batch of every cell are from: `smdm`, `power_law`, `fitted`, or the path of a
    recipe.json (docs/tuning.md#recipes). Null: by the configuration."""

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
