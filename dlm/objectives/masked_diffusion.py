"""masked_diffusion: tokens and noise -> masked tokens with their weight -> a weighted cross-entropy.

p(t) = (1 - eps) t + eps; each token is masked independently with probability p. What the masked tokens' cross-entropy
is weighted with decides what the sum over a sequence of T tokens is, in nats per token:

* training, by ``weight``: `elbo` 1 / (p T), the bound itself (SMDM pretrain/train_mdm.py; MDLM 2406.07524); `low_var`
  1 / (E[p] T), alike for every t (Sahoo et al. 2602.15014); `realised_fraction` 1 / k for k masked tokens (MegaDLMs).
  A model that knows nothing pays log V under each, but for draws without a mask under the last, T / (T + 1) of it;
* validation, by ``estimator``: `mc` 1 / (p T), unbiased for the bound with eps; `exact_count` masks exactly k tokens, k
  uniform on 1..T, 1 / k, unbiased for the bound without eps (LLaDA 2502.09992, equation 6).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dlm.errors import UserError, unknown
from dlm.objectives import Batch
from dlm.recipe import NAMES


class MaskedDiffusion:
    """Predicts the masked tokens from all others, in both directions."""

    name = "masked_diffusion"
    causal = False

    def __init__(self, *, vocab_size: int, eps: float = 1e-3, weight: str = "elbo", estimator: str = "mc") -> None:
        if not 0 < eps < 1:
            raise UserError(f"objective.eps is {eps!r}: allowed is a number between 0 and 1")
        for key, name in (("objective.weight", weight), ("validation.estimator", estimator)):
            if name not in NAMES[key]:
                raise unknown(key, name, NAMES[key])
        self.mask_id = vocab_size  # the extra row of the embedding
        self.eps, self.weight, self.estimator = eps, weight, estimator

    def corrupt(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """For training: each token masked with probability p(t), weighted as ``weight`` says."""
        p_B = (1 - self.eps) * t_B + self.eps
        mask_BT = uniform_BT < p_B[:, None]
        length = tokens_BT.shape[1]
        if self.weight == "elbo":
            weight_B = 1 / (p_B * length)
        elif self.weight == "low_var":
            weight_B = np.full(len(p_B), 2 / ((1 + self.eps) * length))
        else:
            weight_B = 1 / np.maximum(mask_BT.sum(axis=1), 1)
        return _batch(tokens_BT, mask_BT, weight_B)

    def probe(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """For validation: masked and weighted so that the loss is unbiased for the bound that ``estimator`` names."""
        length = tokens_BT.shape[1]
        if self.estimator == "mc":
            p_B = (1 - self.eps) * t_B + self.eps
            return _batch(tokens_BT, uniform_BT < p_B[:, None], 1 / (p_B * length))
        count_B = np.floor(t_B * length).astype(np.int64) + 1  # t < 1
        rank_BT = uniform_BT.argsort(axis=1).argsort(axis=1)
        return _batch(tokens_BT, rank_BT < count_B[:, None], 1 / count_B)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """(B,) weighted sums of the masked tokens' cross-entropies, nats/token."""
        tokens_BT, mask_BT = batch["tokens"], batch["mask"]
        logits_MV = model(torch.where(mask_BT, self.mask_id, tokens_BT), select_BT=mask_BT)
        ce_M = F.cross_entropy(logits_MV.float(), tokens_BT[mask_BT], reduction="none")
        row_M = mask_BT.nonzero()[:, 0]
        total_B = torch.zeros_like(batch["weight"]).index_add(0, row_M, ce_M)
        result: torch.Tensor = total_B * batch["weight"]
        return result


def _batch(tokens_BT: np.ndarray, mask_BT: np.ndarray, weight_B: np.ndarray) -> Batch:
    return {"tokens": tokens_BT, "mask": mask_BT, "weight": weight_B.astype(np.float32)}
