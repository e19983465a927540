"""Learning-rate schedules: the factor on the peak learning rate at each optimiser step.

Every schedule warms up linearly from 0 to 1 and ends at ``min_ratio`` on the last step. The argument ``progress``, in
[0, 1], is the completed share of the steps after the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dlm.core.errors import unknown


def cosine(progress: float, *, min_ratio: float, **_: float) -> float:
    """Decay as half a cosine from 1 to ``min_ratio`` (SMDM, TinyLlama)."""
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, *, min_ratio: float, **_: float) -> float:
    """Decay linearly from 1 to ``min_ratio``."""
    return 1 - (1 - min_ratio) * progress


def wsd(progress: float, *, min_ratio: float, decay_fraction: float) -> float:
    """Stay at 1, then decay as 1 - sqrt in the last ``decay_fraction`` of ``progress`` (Haegele et al. 2405.18392)."""
    into_decay = (progress - (1 - decay_fraction)) / decay_fraction
    return 1 - (1 - min_ratio) * math.sqrt(max(into_decay, 0.0))


SHAPES: dict[str, Callable[..., float]] = {"cosine": cosine, "linear": linear, "wsd": wsd}


def warmup_steps(steps: int, *, fraction: float, minimum: int) -> int:
    """Return the warm-up in steps: ``fraction`` of the run, at least ``minimum`` steps, at most half of the run.

    SMDM uses a fraction of 1 % and a minimum of 100 steps.
    """
    return min(max(math.ceil(fraction * steps), minimum), steps // 2)


def multiplier(
    step: int, *, name: str, steps: int, warmup: int, min_ratio: float, decay_fraction: float = 0.1
) -> float:
    """Return the factor on the peak learning rate at one optimiser step.

    Args:
        step: The step, counted from 0.
        name: The name of a schedule in SHAPES.
        steps: Steps of the complete run.
        warmup: Steps of the warm-up.
        min_ratio: The factor at the last step.
        decay_fraction: The share of the steps after the warm-up in which ``wsd`` decays.
    """
    if name not in SHAPES:
        raise unknown("scheduler.name", name, SHAPES)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
    return SHAPES[name](progress, min_ratio=min_ratio, decay_fraction=decay_fraction)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The learning-rate schedule of one run."""

    config: Mapping[str, Any]  # the config node ``scheduler``
    steps: int  # length of the run, in optimiser steps
    warmup: int  # length of the warm-up, in optimiser steps

    def multiplier(self, step: int) -> float:
        """Return the factor on the peak learning rate at one optimiser step, counted from 0."""
        shape = {key: self.config[key] for key in ("name", "min_ratio", "decay_fraction") if key in self.config}
        return multiplier(step, steps=self.steps, warmup=self.warmup, **shape)

    def holds(self, step: int) -> bool:
        """Return whether ``step`` is in the constant part of a wsd schedule."""
        return self.config["name"] == "wsd" and self.multiplier(step) == 1

    def last_held(self) -> int:
        """Return the last step of the constant part of a wsd schedule."""
        constant = (1 - self.config["decay_fraction"]) * (self.steps - 1 - self.warmup)
        guess = self.warmup + math.floor(constant) + 1  # one more than the exact value, or two
        return next(step for step in range(guess, -1, -1) if self.holds(step))


def rates_of(scheduler: Mapping[str, Any], *, steps: int, num_params: int, tokens_per_step: int) -> Rates:
    """Return the schedule of a run, of which the warm-up takes at most half.

    Args:
        scheduler: The config node ``scheduler``. If its ``warmup_tokens_per_param`` is set, the warm-up takes this many
            tokens per parameter, whatever the length of the run. Else ``warmup_steps`` applies.
        steps: Optimiser steps of the run.
        num_params: N, non-embedding.
        tokens_per_step: Tokens of an optimiser step.
    """
    per_param = scheduler.get("warmup_tokens_per_param")
    if per_param is None:
        warmup = warmup_steps(steps, fraction=scheduler["warmup_fraction"], minimum=scheduler["warmup_min_steps"])
    else:
        warmup = min(math.ceil(per_param * num_params / tokens_per_step), steps // 2)
    return Rates(config=scheduler, steps=steps, warmup=warmup)
