"""Recover the text, the mask and the weights of the sequences from a batch of masked diffusion."""

import numpy as np


def taken_apart(batch) -> dict[str, np.ndarray]:
    """Return tokens (B, T), mask (B, T) and weight (B,), which is 0 for a sequence without masked tokens.

    Asserts that each masked position is listed once and before the padding, and that each sequence has one weight.
    """
    given, index, target, weight = (np.asarray(batch[key]) for key in ("tokens", "index", "target", "weight"))
    named = weight > 0
    count = int(named.sum())
    assert named[:count].all() and len(np.unique(index[named])) == count
    mask, tokens, weights = np.zeros(given.size, dtype=bool), given.ravel().copy(), np.zeros(given.size)
    mask[index[named]] = True
    tokens[index[named]] = target[named]
    weights[index[named]] = weight[named]
    mask, weights = mask.reshape(given.shape), weights.reshape(given.shape)
    weight_B = weights.max(axis=1)
    assert np.array_equal(weights, np.where(mask, weight_B[:, None], 0))  # one weight per sequence
    return {"tokens": tokens.reshape(given.shape), "mask": mask, "weight": weight_B}
