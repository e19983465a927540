"""Draw the noise and the data order of a run from its seed and the global number of a sample.

Nothing here depends on ranks, micro-batches or restarts, so the draws do not either. Random numbers come from NumPy's
counter-based Philox, whose raw stream NumPy guarantees to be stable. Names of arrays end in their shape: B samples.
"""

from __future__ import annotations

import functools

import numpy as np

_T_STREAM, _MASK_STREAM, ORDER_STREAM, MIXTURE_STREAM = 0, 1, 2, 3


def _key(seed: int, stream: int) -> np.ndarray:
    return np.array([seed, stream], dtype=np.uint64)


def _unit(raw: np.ndarray) -> np.ndarray:
    """64 random bits as a float64 in [0, 1)."""
    return (raw >> np.uint64(11)) * 2.0**-53


def uniforms(seed: int, first: int, rows: int, count: int) -> np.ndarray:
    """(rows, count) uniforms in [0, 1) of the samples ``first`` to ``first + rows - 1``.

    Every sample has counters of its own in one Philox stream, so a row is the same whichever call draws it.
    """
    blocks = -(-count // 4)  # Philox gives four words per counter
    generator = np.random.Philox(key=_key(seed, _MASK_STREAM), counter=first * blocks)
    return _unit(generator.random_raw(rows * blocks * 4)).reshape(rows, blocks * 4)[:, :count]


def van_der_corput(index_B: np.ndarray) -> np.ndarray:
    """(B,) van der Corput sequence: each index with its bits reversed, as a number in [0, 1).

    Every aligned block of a power of two of indices is evenly spread.
    """
    bits, result = index_B.astype(np.uint64), np.zeros(len(index_B))
    scale = 0.5
    while bits.any():
        result += scale * (bits & np.uint64(1))
        bits, scale = bits >> np.uint64(1), scale / 2
    return result


def spread_t(shift: float, position_B: np.ndarray) -> np.ndarray:
    """(B,) diffusion times in [0, 1): pairs t, 1 - t, whose first members are evenly spread from ``shift`` on.

    Every aligned pair has the mean 1/2 exactly, so the number of masked tokens of a micro-batch hardly varies. Every
    aligned block of a power of two of positions is evenly spread.
    """
    t_B = (shift + van_der_corput(position_B // 2)) % 1.0
    return np.where(position_B % 2 == 0, t_B, -t_B % 1.0)


def stratified_t(seed: int, step: int, position_B: np.ndarray) -> np.ndarray:
    """(B,) diffusion times in [0, 1) for the positions ``position_B`` in the global batch of ``step``.

    One random shift is drawn per step, and the times are spread evenly from it in pairs t, 1 - t. Each t is uniform,
    and both the global batch and every contiguous micro-batch of a power of two of sequences are stratified. MDLM's
    antithetic sampling spreads the times evenly but does not pair them.
    """
    generator = np.random.Philox(key=_key(seed, _T_STREAM), counter=[0, 0, step, 0])
    return spread_t(float(_unit(generator.random_raw(1))[0]), position_B)


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 on ``value`` and a key: 64 bits to 64 well-mixed bits."""
    value = (value ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _order_keys(seed: int, epoch: int, stream: int) -> np.ndarray:
    return np.random.Philox(key=_key(seed, stream), counter=[0, 0, epoch, 0]).random_raw(6)


def permute(index_B: np.ndarray, size: int, *, seed: int, epoch: int, stream: int = ORDER_STREAM) -> np.ndarray:
    """Where a random permutation of range(``size``) sends each index, in constant time and memory per index.

    The permutation is a six-round Feistel network on the smallest even number of bits that holds ``size``. A result
    outside the range is sent through again (cycle walking), which keeps it a bijection.

    Args:
        index_B: (B,) integers in range(size).
        size: How many are permuted.
        seed: Of the run.
        epoch: Each epoch has another permutation.
        stream: 64 bits; each stream has permutations of its own.

    Returns:
        (B,) int64.
    """
    half = np.uint64(max((max(size - 1, 1).bit_length() + 1) // 2, 1))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _order_keys(seed, epoch, stream)
    result = index_B.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        result[outside] = (left << half) | right
        outside = result >= np.uint64(size)
    return result.astype(np.int64)
