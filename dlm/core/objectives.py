"""The training objectives that dlm knows, in one table that needs no torch.

Plans, FLOPs, ids, training, weights files and the report look here for everything that differs between objectives.
CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from dlm.core.errors import unknown

# The mean masking rate of the linear schedule p = (1 - eps) t + eps with eps = 1e-3 (SMDM) and t ~ U(0, 1).
MEAN_MASK_RATE = Fraction(1001, 2000)


@dataclass(frozen=True, kw_only=True)
class ObjectiveInfo:
    """What the rest of dlm has to know about one training objective."""

    target: str  # import path of its class, a subclass of dlm.train.objectives.Objective
    id_head: str  # the first word of its cell ids
    label: str  # its name in the report
    keys: tuple[str, ...] = ()  # of its config, besides ``name``: the keyword arguments of its class
    causal: bool  # True: a token attends to earlier ones only, and the embedding has no row for a mask token
    is_bound: bool  # True: the loss estimates an upper bound on -log p by sampling; False: it is -log p itself
    head_share: Fraction = Fraction(1)  # of the positions, on average: where the output head computes logits


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
    """The row of an objective. Raises UserError for a name that is not in the table."""
    if name not in OBJECTIVES:
        raise unknown("objective.name", name, OBJECTIVES)
    return OBJECTIVES[name]
