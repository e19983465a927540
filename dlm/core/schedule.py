"""schedule: step -> learning-rate multiplier, pure functions. Called by recipe and optim.

Every schedule warms up linearly from 0 to 1 and ends at ``min_ratio`` on the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dlm.core.errors import unknown


def cosine(progress: float, *, min_ratio: float, decay_fraction: float) -> float:
    """Half a cosine from 1 to ``min_ratio`` (SMDM, TinyLlama). ``progress`` in [0, 1] after the warm-up."""
    del decay_fraction
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, *, min_ratio: float, decay_fraction: float) -> float:
    """A straight line from 1 to ``min_ratio``."""
    del decay_fraction
    return 1 - (1 - min_ratio) * progress


def wsd(progress: float, *, min_ratio: float, decay_fraction: float) -> float:
    """Constant, then 1 - sqrt over the last ``decay_fraction`` (Haegele et al. 2405.18392)."""
    into_decay = (progress - (1 - decay_fraction)) / decay_fraction
    return 1 - (1 - min_ratio) * math.sqrt(max(into_decay, 0.0))


SHAPES: dict[str, Callable[..., float]] = {"cosine": cosine, "linear": linear, "wsd": wsd}


def warmup_steps(steps: int, *, fraction: float, minimum: int) -> int:
    """Warm-up of a run: ``fraction`` of it, at least ``minimum`` (SMDM: 1 %, 100), at most half of it."""
    return min(max(math.ceil(fraction * steps), minimum), steps // 2)


def multiplier(
    step: int, *, name: str, steps: int, warmup: int, min_ratio: float, decay_fraction: float = 0.1
) -> float:
    """The factor on the peak learning rate for optimiser step ``step`` (0 is the first) of ``steps``."""
    if name not in SHAPES:
        raise unknown("scheduler.name", name, SHAPES)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
    return SHAPES[name](progress, min_ratio=min_ratio, decay_fraction=decay_fraction)
