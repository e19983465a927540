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

import math

import numpy as np
import torch
import torch.nn.functional as F

from dlm.core.checks import NAMES
from dlm.core.errors import UserError, unknown
from dlm.train.objectives import Batch

IGNORED = -100  # a target that cross_entropy leaves out


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
        return self.masked(tokens_BT, mask_BT, weight_B)

    def probe(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """For validation: masked and weighted so that the loss is unbiased for the bound that ``estimator`` names."""
        length = tokens_BT.shape[1]
        if self.estimator == "mc":
            p_B = (1 - self.eps) * t_B + self.eps
            return self.masked(tokens_BT, uniform_BT < p_B[:, None], 1 / (p_B * length))
        count_B = np.floor(t_B * length).astype(np.int64) + 1  # t < 1
        rank_BT = uniform_BT.argsort(axis=1).argsort(axis=1)
        return self.masked(tokens_BT, rank_BT < count_B[:, None], 1 / count_B)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """(B,) weighted sums of the masked tokens' cross-entropies, nats/token; the head sees masked positions only."""
        input_BT, index_M = batch["tokens"], batch["index"]
        logits_MV = model(input_BT, index_M)
        ce_M = F.cross_entropy(logits_MV.float(), batch["target"], reduction="none") * batch["weight"]
        # places are distinct but for the filling, which adds zeros: the sum has one order, on any device
        ce_BT = ce_M.new_zeros(input_BT.shape).view(-1).index_add(0, index_M, ce_M).view_as(input_BT)
        return ce_BT.sum(dim=1)

    def masked(self, tokens_BT: np.ndarray, mask_BT: np.ndarray, weight_B: np.ndarray) -> Batch:
        """The masked text, and of every masked position its index in the flattened text, its token and its weight.

        Filled up to the capacity with places that are ignored. Where more are masked (``overflow``) it is filled to a
        multiple of the capacity: none is dropped.
        """
        index_M = np.flatnonzero(mask_BT)
        slots = capacity(*tokens_BT.shape, eps=self.eps)
        fill = (0, -len(index_M) % slots if len(index_M) else slots)
        return {
            "tokens": np.where(mask_BT, self.mask_id, tokens_BT),
            "index": np.pad(index_M, fill),
            "target": np.pad(tokens_BT.ravel()[index_M], fill, constant_values=IGNORED),
            "weight": np.pad(np.repeat(weight_B, mask_BT.sum(axis=1)).astype(np.float32), fill),
            "overflow": len(index_M) > slots,
        }


def capacity(batch: int, length: int, *, eps: float) -> int:
    """Masked positions that a micro-batch has room for, fixed so that shapes are: mean and 4.5 standard deviations.

    Times come in pairs t, 1 - t (noise.spread_t), so the mean is half the text; an odd micro-batch may hold one
    sequence without its partner. Over m evenly spread first members the mean of p (1 - p) is at most
    1/6 + 1/(12 m^2), and m is half the largest power of two that divides the micro-batch. More than this are masked
    in about 3 of a million micro-batches.
    """
    pairs = max((batch & -batch) // 2, 1)
    mean = (1 - eps) * (batch + batch % 2) / (2 * batch) + eps
    slots = mean * batch * length + 4.5 * math.sqrt(batch * length * (1 / 6 + 1 / (12 * pairs**2)))
    return min(-(-math.ceil(slots) // 16) * 16, batch * length)
