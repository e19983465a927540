"""Count the runs that a multirun of Hydra asks for, before Hydra makes a list of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from hydra.errors import HydraException

from dlm.core.configs import choices
from dlm.core.errors import UserError
from dlm.core.limits import MOST_CELLS


def check_combinations(words: Iterable[str]) -> None:
    """Raise UserError if the overrides of a multirun have more combinations of values than a plan may have cells."""
    parser = OverridesParser.create()
    numbers = dict[str, int]()
    for word in words:
        try:
            numbers[word] = _num_values(parser.parse_override(word))
        except HydraException:  # an option of Hydra, or a mistake that Hydra describes
            continue
    number = math.prod(numbers.values())
    if number > MOST_CELLS:
        longest = max(numbers, key=lambda word: numbers[word])
        raise UserError(
            f"-m asks for {number:,} runs, and at most {MOST_CELLS:,} are allowed: shorten {longest}, or give several "
            "commands"
        )


def _num_values(override: Override) -> int:
    """Return how many values an override has, without making a list of them."""
    value = override.value() if override.is_sweep_override() else None
    if isinstance(value, RangeSweep):
        if not value.step or value.start is None or value.stop is None:
            return 1
        number = (float(value.stop) - float(value.start)) / value.step
        return max(0, math.ceil(number)) if math.isfinite(number) else MOST_CELLS + 1
    if isinstance(value, Glob):
        return len(value.filter(choices(override.key_or_group)))
    return len(value.list) if isinstance(value, ChoiceSweep) else 1
