"""Recipes that follow the size and the length of a run: power laws for the learning rate and the batch, from a file.

A file of format FORMAT states lr = exp(log) N^params D^tokens, the peak learning rate, and the tokens of an optimiser
step in the same form. N counts the parameters of the blocks (``params`` of runs.csv), D the training tokens. The range
of the runs to which the laws were fitted belongs to the recipe, because no power law holds far outside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dlm.core.errors import UserError, shown
from dlm.core.typed import read_typed

FORMAT = "dlm-recipe-1"
FARTHEST = 10.0  # a recipe is refused for a run that lies further outside its range than this factor
LARGEST_LOG, LARGEST_EXPONENT = 700.0, 10.0  # exp(700) is about the largest number that a float holds
DIGITS = 6  # of a learning rate, so that machines whose exp differs in the last digit plan the same cells


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """factor N^params D^tokens."""

    factor: float
    params: float
    tokens: float

    def at(self, num_params: float, tokens: float) -> float:
        """Return the value for a run, which is infinite if no float holds it."""
        try:
            return float(self.factor * num_params**self.params * tokens**self.tokens)
        except OverflowError:
            return math.inf


@dataclass(frozen=True, kw_only=True)
class PowerRecipe:
    """The learning rate and the batch of a run as functions of its size and its length. None: left as configured."""

    source: str  # where the laws are from
    lr: PowerLaw | None  # the peak learning rate
    batch_tokens: PowerLaw | None  # tokens of an optimiser step
    range_params: tuple[float, float]  # the lowest and the highest N of the runs
    range_tokens: tuple[float, float]  # of D
    objective: str | None = None  # None: any
    optimizer: str | None = None  # None: any
    runs: int | None = None  # how many runs the laws were fitted to

    def learning_rate(self, num_params: float, tokens: float) -> float | None:
        """Return the peak learning rate of a run, rounded to DIGITS; None if the recipe leaves it as configured."""
        return None if self.lr is None else float(f"{self.lr.at(num_params, tokens):.{DIGITS}g}")

    def factor_outside(self, num_params: float, tokens: float) -> float:
        """Return how far a run lies outside the range, as the larger factor of N and D; 1 inside."""
        pairs = ((num_params, self.range_params), (tokens, self.range_tokens))
        return max(max(low / value, value / high, 1.0) for value, (low, high) in pairs)

    def range_words(self) -> str:
        """Return the range as words: '1e3 to 4e4 parameters and 1e6 to 3e8 tokens'."""
        (least, most), (shortest, longest) = self.range_params, self.range_tokens
        return f"{least:.3g} to {most:.3g} parameters and {shortest:.3g} to {longest:.3g} tokens"


# The best batch of masked diffusion, von Ruette et al. 2512.10858.
BATCH_LAW = PowerLaw(factor=3.614e-3, params=0.0, tokens=0.8179)
# The best peak rate of autoregressive models, Step Law (Li et al. 2503.04715).
RATE_LAW = PowerLaw(factor=1.79, params=-0.713, tokens=0.307)
POWER_LAW = PowerRecipe(
    source="batch: von Ruette et al. 2512.10858 (masked diffusion); rate: Step Law, Li et al. 2503.04715",
    lr=RATE_LAW,
    batch_tokens=BATCH_LAW,
    range_params=(6e7, 1.07e9),  # those of Step Law's grid
    range_tokens=(2e9, 1e11),
)


@dataclass(frozen=True, kw_only=True)
class _Law:
    log: float
    params: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class _Range:
    params: tuple[float, float]
    tokens: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class _File:
    """The content of a file. Other keys, such as intervals, are for people and are not read."""

    format: str
    objective: str | None
    lr: _Law | None
    batch_tokens: _Law | None
    range: _Range
    runs: int
    source: str
    optimizer: str | None = None


def read_recipe(path: Path) -> PowerRecipe:
    """Read a recipe from a file.

    Raises:
        UserError: The file is missing, or it is no recipe, or a value in it cannot be one.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: `dlm hparams RUNS.csv --out {path}` fits a recipe to runs")
    again = "fit it again with `dlm hparams`"
    stored = read_typed(path, _File, what="recipe", otherwise=again)
    if stored.format != FORMAT:
        raise UserError(f"{path}: format is {shown(stored.format)}, and this version reads {FORMAT}: {again}")
    laws = {name: getattr(stored, name) for name in ("lr", "batch_tokens")}
    for name, law in laws.items():
        if law is not None and not abs(law.log) <= LARGEST_LOG:
            raise UserError(
                f"{path}: {name}.log is {law.log:g}: it must be a number from {-LARGEST_LOG:g} to {LARGEST_LOG:g}: "
                f"{again}"
            )
    recipe = PowerRecipe(
        source=stored.source,
        lr=_law(stored.lr),
        batch_tokens=_law(stored.batch_tokens),
        range_params=stored.range.params,
        range_tokens=stored.range.tokens,
        objective=stored.objective,
        optimizer=stored.optimizer,
        runs=stored.runs,
    )
    check_recipe(recipe, str(path), again)
    return recipe


def _law(law: _Law | None) -> PowerLaw | None:
    return None if law is None else PowerLaw(factor=math.exp(law.log), params=law.params, tokens=law.tokens)


def check_recipe(recipe: PowerRecipe, source: str, advice: str) -> None:
    """Raise UserError, which names the file ``source`` and ends with ``advice``, for values that no recipe has."""
    if recipe.lr is None and recipe.batch_tokens is None:
        raise UserError(f"{source} gives neither lr nor batch_tokens, so it decides nothing: {advice}")
    for name, (low, high) in (("params", recipe.range_params), ("tokens", recipe.range_tokens)):
        if not 0 < low <= high < math.inf:
            raise UserError(
                f"{source}: range.{name} is [{low:g}, {high:g}]: it must be [lowest, highest], above 0: {advice}"
            )
    for name, law in (("lr", recipe.lr), ("batch_tokens", recipe.batch_tokens)):
        for key in ("params", "tokens") if law is not None else ():
            if not abs(getattr(law, key)) <= LARGEST_EXPONENT:
                raise UserError(
                    f"{source}: {name}.{key} is {getattr(law, key):g}: it must be a number from {-LARGEST_EXPONENT:g} "
                    f"to {LARGEST_EXPONENT:g}: {advice}"
                )
