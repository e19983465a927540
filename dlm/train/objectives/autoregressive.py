"""autoregressive: next-token loss; the first token is predicted from BOS, so it scores what diffusion scores."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dlm.train.objectives import Batch


class Autoregressive:
    """Predicts every token from those before it."""

    name = "autoregressive"
    causal = True
    estimator = "exact"

    def __init__(self, *, bos_id: int) -> None:
        self.bos_id = bos_id

    def corrupt(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """The text itself: nothing is random."""
        del t_B, uniform_BT
        return {"tokens": tokens_BT}

    probe = corrupt

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """(B,) mean cross-entropy of tokens 1..T given BOS and the tokens before."""
        tokens_BT = batch["tokens"]
        logits_BTV = model(F.pad(tokens_BT[:, :-1], (1, 0), value=self.bos_id))
        # flat, since the form (B, V, T) that cross_entropy takes has the vocabulary strided: a third slower at 14M
        ce_M = F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT.flatten(), reduction="none")
        return ce_M.view_as(tokens_BT).mean(dim=1)
