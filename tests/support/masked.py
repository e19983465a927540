"""A batch of masked diffusion taken apart again: its text, its mask and the weight of each sequence."""

import numpy as np


def taken_apart(batch) -> dict[str, np.ndarray]:
    """tokens and mask (B, T), weight (B,) (0 without a mask); checks that a place is named once and the rest filled."""
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
    assert np.array_equal(weights, np.where(mask, weight_B[:, None], 0))  # one weight a sequence
    return {"tokens": tokens.reshape(given.shape), "mask": mask, "weight": weight_B}
