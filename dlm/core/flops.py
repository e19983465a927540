"""FLOPs per token under each named convention, and the steps that a budget pays for.

The conventions, with N the non-embedding parameters, d the width, L the layers, T the tokens of a sequence and V the
size of the vocabulary:

    6n                6 N                                    SMDM, the default
    6n_total          6 (N + input embedding + head)
    full              6 N + 12 L d T (causal: half) + 6 V d  body, attention scores and values, head
    full_masked_head  like full, but with the head on masked positions only, as dlm computes masked diffusion

full_masked_head counts (1 + eps) / 2 of the positions with SMDM's eps = 1e-3, for every value of objective.eps. The
number per token does not depend on eps, so plans and tables can be compared. At eps = 0.1, the head computes 10 % more
than this convention counts.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, get_args

from dlm.core.errors import UserError, shown, unknown
from dlm.core.objectives import ObjectiveInfo
from dlm.core.shape import ModelShape

Convention = Literal["6n", "6n_total", "full", "full_masked_head"]


MOST_FLOPS = 1e40  # the highest budget: far above every computer, and far below where a float overflows


CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


def check_convention(name: str) -> Convention:
    """Return ``name`` as a Convention. Raises UserError, with the close matches, for an unknown name."""
    if name not in CONVENTIONS:
        raise unknown("training.convention", name, CONVENTIONS)
    return name


def flops_per_token(
    shape: ModelShape, *, convention: Convention, block_size: int, objective: ObjectiveInfo
) -> Fraction:
    """Return training FLOPs (forward and backward, a multiply-add is 2) per token of a ``block_size`` sequence."""
    body = Fraction(6 * shape.num_params)
    if convention == "6n":
        return body
    if convention == "6n_total":
        return Fraction(6 * shape.num_params_total(causal=objective.causal))
    attention = (6 if objective.causal else 12) * shape.n_layer * shape.n_embd * block_size
    head = Fraction(6 * shape.vocab_size * shape.n_embd)
    if convention == "full_masked_head":
        head *= objective.head_share
    return body + attention + head


def all_conventions(
    shape: ModelShape, *, tokens: int, block_size: int, objective: ObjectiveInfo
) -> dict[Convention, float]:
    """Return the training FLOPs of ``tokens`` tokens under every convention."""
    return {
        name: float(tokens * flops_per_token(shape, convention=name, block_size=block_size, objective=objective))
        for name in CONVENTIONS
    }


def check_budget(value: object, key: str = "training.budget") -> float:
    """Return ``value`` as a budget in FLOPs. Raises UserError about ``key`` if it is not in (0, MOST_FLOPS]."""
    try:
        budget = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        budget = math.nan
    if not 0 < budget <= MOST_FLOPS or isinstance(value, bool):
        allowed = f"a number of FLOPs above zero, at most {MOST_FLOPS:g}, such as 1e19"
        raise UserError(f"{key} is {shown(value)}: it must be {allowed}")
    return budget


def budget_to_steps(budget_flops: float, per_token: Fraction, tokens_per_step: int) -> int:
    """Return the exact number of steps that a budget C pays for: floor(C / (FLOPs per token x tokens per step))."""
    return int(Fraction(budget_flops) / (per_token * tokens_per_step))


# The dense bf16 peak in FLOP/s, without sparsity, from the data sheets of the manufacturers.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100": 312e12,
    "L40S": 362e12,
}
