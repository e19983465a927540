"""Masked diffusion: mask tokens at a random rate, predict them, and sum their weighted cross-entropies.

At time t each token is masked independently with probability p(t) = (1 - eps) t + eps. The loss of a sequence of T
tokens is a weighted sum of the cross-entropies of its masked tokens, in nats per token.

In training, ``objective.weight`` chooses the weight of a masked token:

* ``elbo``: 1 / (p T), with which the loss estimates the bound on -log p (SMDM pretrain/train_mdm.py; MDLM 2406.07524);
* ``low_var``: 1 / (E[p] T), the same for every t (Sahoo et al. 2602.15014);
* ``realised_fraction``: 1 / k for k masked tokens (MegaDLMs). A sequence without a masked token has loss zero, so a
  model that predicts uniformly has a mean loss of T / (T + 1) log V; with the other weights it has log V.

In validation, ``validation.estimator`` chooses the bound:

* ``mc``: masks as in training with the weight 1 / (p T); unbiased for the bound with eps;
* ``exact_count``: masks exactly k tokens, with k uniform on 1..T and the weight 1 / k; unbiased for the bound without
  eps (LLaDA 2502.09992, equation 6).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from dlm.train.models.cross_entropy import IGNORED
from dlm.train.objectives import Batch, Objective


class MaskedDiffusion(Objective):
    """The objective that predicts masked tokens from the tokens on both sides.

    Args:
        vocab_size: V. The mask token has number V, which is the extra row of the embedding.
        eps: The smallest masking probability, ``objective.eps``.
        weight: The weight of a masked token in training: ``elbo``, ``low_var`` or ``realised_fraction``.
        estimator: The bound that validation estimates: ``mc`` or ``exact_count``.
    """

    name = "masked_diffusion"

    def __init__(self, *, vocab_size: int, eps: float = 1e-3, weight: str = "elbo", estimator: str = "mc") -> None:
        self.mask_id = vocab_size
        self.eps, self.weight, self.estimator = eps, weight, estimator

    def corrupt(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """Make a training batch: mask each token with probability p(t), and weight masked tokens by ``weight``."""
        p_B = self._mask_rate(t_B)
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
        """Make a validation batch whose loss is an unbiased estimate of the bound that ``estimator`` names."""
        length = tokens_BT.shape[1]
        if self.estimator == "mc":
            p_B = self._mask_rate(t_B)
            return self.masked(tokens_BT, uniform_BT < p_B[:, None], 1 / (p_B * length))
        count_B = np.floor(t_B * length).astype(np.int64) + 1  # at most T, because t < 1
        rank_BT = uniform_BT.argsort(axis=1).argsort(axis=1)
        return self.masked(tokens_BT, rank_BT < count_B[:, None], 1 / count_B)

    def _mask_rate(self, t_B: np.ndarray) -> np.ndarray:
        return (1 - self.eps) * t_B + self.eps

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Compute the (B,) weighted sums of the cross-entropies of the masked tokens, nats/token.

        The model's head computes only the positions in ``index``.
        """
        input_BT, index_M = batch["tokens"], batch["index"]
        ce_M = model(input_BT, index_M, batch["target"]) * batch["weight"]
        # Masked positions are distinct and padding adds zeros, so the order of summation is the same on every device.
        ce_BT = ce_M.new_zeros(input_BT.shape).view(-1).index_add(0, index_M, ce_M).view_as(input_BT)
        return ce_BT.sum(dim=1)

    def masked(self, tokens_BT: np.ndarray, mask_BT: np.ndarray, weight_B: np.ndarray) -> Batch:
        """Make a batch from a mask and one weight for each sequence.

        The number of predicted positions M is padded to ``capacity``, so that shapes do not change between batches. A
        batch with more masked tokens than ``capacity`` is padded to the next multiple of it, so no token is dropped.

        Returns:
            ``tokens`` (B, T), the text with masked tokens replaced; ``index`` (M,), the masked positions in the
            flattened text; ``target`` (M,), the original tokens there, IGNORED in the padding; ``weight`` (M,), zero in
            the padding; and ``overflow``, whether more tokens were masked than the capacity.
        """
        index_M = np.flatnonzero(mask_BT)
        slots = capacity(*tokens_BT.shape, eps=self.eps)
        padding = (0, -len(index_M) % slots if len(index_M) else slots)
        return {
            "tokens": np.where(mask_BT, self.mask_id, tokens_BT),
            "index": np.pad(index_M, padding),
            "target": np.pad(tokens_BT.ravel()[index_M], padding, constant_values=IGNORED),
            "weight": np.pad(np.repeat(weight_B, mask_BT.sum(axis=1)).astype(np.float32), padding),
            "overflow": len(index_M) > slots,
        }


def capacity(batch: int, length: int, *, eps: float) -> int:
    """Return the capacity of a micro-batch in masked positions: their mean number plus 4.5 standard deviations.

    Times come in pairs t, 1 - t (dlm.data.noise.spread_t), so on average half of the tokens are masked; in a
    micro-batch of odd size, one sequence may lack its partner. If the first members of m pairs are evenly spread, the
    mean of p (1 - p) is at most 1/6 + 1/(12 m^2); m is half of the largest power of two that divides the size of the
    micro-batch. About 3 in a million micro-batches have more masked tokens than the capacity.

    Args:
        batch: Sequences in the micro-batch.
        length: Tokens of a sequence.
        eps: The smallest masking probability.
    """
    pairs = max((batch & -batch) // 2, 1)
    mean = (1 - eps) * (batch + batch % 2) / (2 * batch) + eps
    slots = mean * batch * length + 4.5 * math.sqrt(batch * length * (1 / 6 + 1 / (12 * pairs**2)))
    return min(-(-math.ceil(slots) // 16) * 16, batch * length)
