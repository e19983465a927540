"""Give a function that returns logits the signature of the model that objectives call."""

import torch


def answering(logits_of):
    """Return a model that calls ``logits_of`` and, given targets, returns the cross-entropies of its logits."""

    def model(tokens_BT, index_M=None, target_M=None):
        logits = logits_of(tokens_BT) if index_M is None else logits_of(tokens_BT, index_M)
        if target_M is None:
            return logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), target_M, reduction="none")

    return model
