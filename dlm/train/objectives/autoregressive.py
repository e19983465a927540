"""Next-token loss. The first token is predicted from BOS, so the loss covers the same tokens as masked diffusion."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dlm.train.objectives import Batch, Objective


class Autoregressive(Objective):
    """The objective that predicts every token from the tokens before it."""

    name = "autoregressive"

    def __init__(self, *, bos_id: int) -> None:
        self.bos_id = bos_id

    def corrupt(self, tokens_BT: np.ndarray, t_B: np.ndarray, uniform_BT: np.ndarray) -> Batch:
        """Return the text itself as ``tokens``, (B, T): this objective needs no noise."""
        del t_B, uniform_BT
        return {"tokens": tokens_BT}

    probe = corrupt

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Compute the (B,) mean cross-entropies of the T tokens, each given BOS and earlier tokens, nats/token."""
        tokens_BT = batch["tokens"]
        ce_M = model(F.pad(tokens_BT[:, :-1], (1, 0), value=self.bos_id), None, tokens_BT.flatten())
        return ce_M.view_as(tokens_BT).mean(dim=1)
