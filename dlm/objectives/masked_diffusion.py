"""masked_diffusion: the 1/p-weighted bound of masked diffusion with the linear schedule.

p(t) = (1 - eps) t + eps; each token is masked independently with probability p; the loss of a sequence is
sum over masked tokens of CE / p, divided by T (SMDM pretrain/train_mdm.py; MDLM 2406.07524; LLaDA 2502.09992).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dlm.errors import UserError
from dlm.objectives import Batch


class MaskedDiffusion:
    """Predicts the masked tokens from all others, in both directions."""

    name = "masked_diffusion"
    causal = False
    estimator = "mc"

    def __init__(self, *, vocab_size: int, eps: float = 1e-3) -> None:
        if not 0 < eps < 1:
            raise UserError(f"objective.eps is {eps!r}: allowed is a number between 0 and 1")
        self.mask_id = vocab_size  # the extra row of the embedding
        self.eps = eps

    def corrupt(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """Mask each token with probability p(t)."""
        p_B = (1 - self.eps) * t_B + self.eps
        return {"tokens": tokens_BT, "mask": uniform_BT < p_B[:, None], "p": p_B.astype(np.float32)}

    def nll(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """(B,) sum of CE / p over the masked tokens, per token of the sequence."""
        tokens_BT, mask_BT = batch["tokens"], batch["mask"]
        logits_MV = model(torch.where(mask_BT, self.mask_id, tokens_BT), select_BT=mask_BT)
        ce_M = F.cross_entropy(logits_MV.float(), tokens_BT[mask_BT], reduction="none")
        row_M = mask_BT.nonzero()[:, 0]
        total_B = torch.zeros_like(batch["p"]).index_add(0, row_M, ce_M)
        result: torch.Tensor = total_B / batch["p"] / tokens_BT.shape[1]
        return result
