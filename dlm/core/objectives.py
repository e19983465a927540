"""The training objectives of dlm, in one table that does not need torch.

Plans, FLOPs, ids, training, weights files and the report read all differences between objectives from this table.
CONTRIBUTING.md explains how to add an objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from dlm.core.errors import unknown

# The mean masking rate of the linear schedule p = (1 - eps) t + eps with eps = 1e-3 (SMDM) and t ~ U(0, 1).
MEAN_MASK_RATE = Fraction(1001, 2000)


@dataclass(frozen=True, kw_only=True)
class ObjectiveInfo:
    """The facts about one training objective that the rest of dlm needs."""

    target: str  # import path of the class, a subclass of dlm.train.objectives.Objective
    id_head: str  # the prefix of the cell ids
    label: str  # the name in the report
    keys: tuple[str, ...] = ()  # config keys besides ``name``: the keyword arguments of the class
    causal: bool  # True: tokens attend to earlier tokens only, and the embedding has no row for a mask token
    is_bound: bool  # True: the loss estimates an upper bound on -log p by sampling; False: it is -log p itself
    head_share: Fraction = Fraction(1)  # mean share of positions at which the head computes logits


OBJECTIVES = {
    "masked_diffusion": ObjectiveInfo(
        target="dlm.train.objectives.masked_diffusion.MaskedDiffusion",
        id_head="mdm",
        label="Masked diffusion",
        keys=("eps", "weight"),
        causal=False,
        is_bound=True,
        head_share=MEAN_MASK_RATE,
    ),
    "autoregressive": ObjectiveInfo(
        target="dlm.train.objectives.autoregressive.Autoregressive",
        id_head="ar",
        label="Autoregressive",
        causal=True,
        is_bound=False,
    ),
}


def objective_info(name: str) -> ObjectiveInfo:
    """Return the entry of an objective. Raises UserError for a name that is not in OBJECTIVES."""
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise unknown("objective.name", name, OBJECTIVES)
    return OBJECTIVES[name]
