"""Draw the noise and the data order of a run from its seed and the global number of each sample.

The draws do not depend on ranks, micro-batches or restarts. Random numbers come from NumPy's counter-based generator
Philox, whose raw stream NumPy guarantees to be stable. Names of arrays end in their shape: B samples.
"""

from __future__ import annotations

import functools

import numpy as np

_T_STREAM, _MASK_STREAM, ORDER_STREAM, MIXTURE_STREAM, UNIQUE_STREAM = 0, 1, 2, 3, 4


def _key(seed: int, stream: int) -> np.ndarray:
    return np.array([seed, stream], dtype=np.uint64)


def _unit(raw: np.ndarray) -> np.ndarray:
    """Convert 64 random bits to a float64 in [0, 1)."""
    return (raw >> np.uint64(11)) * 2.0**-53


def uniforms(seed: int, first: int, rows: int, count: int) -> np.ndarray:
    """Draw (rows, count) uniforms in [0, 1) for the samples ``first`` to ``first + rows - 1``.

    Every sample has its own counters in one Philox stream, so a row does not depend on the call that draws it.
    """
    blocks = -(-count // 4)  # Philox gives four words per counter
    generator = np.random.Philox(key=_key(seed, _MASK_STREAM), counter=first * blocks)
    return _unit(generator.random_raw(rows * blocks * 4)).reshape(rows, blocks * 4)[:, :count]


def van_der_corput(index_B: np.ndarray) -> np.ndarray:
    """Return the (B,) values of the van der Corput sequence: the reversed bits of each index as a number in [0, 1).

    The values of every aligned block of indices whose length is a power of two are evenly spaced.
    """
    bits, result = index_B.astype(np.uint64), np.zeros(len(index_B))
    scale = 0.5
    while bits.any():
        result += scale * (bits & np.uint64(1))
        bits, scale = bits >> np.uint64(1), scale / 2
    return result


def spread_t(shift: float, position_B: np.ndarray) -> np.ndarray:
    """Return (B,) diffusion times in [0, 1): pairs (t, 1 - t), with t evenly spread from ``shift`` on, modulo 1.

    Every aligned pair has the mean 1/2 exactly, so the number of masked tokens of a micro-batch hardly varies. The
    times of every aligned block of positions whose length is a power of two are evenly spread.
    """
    t_B = (shift + van_der_corput(position_B // 2)) % 1.0
    return np.where(position_B % 2 == 0, t_B, -t_B % 1.0)


def stratified_t(seed: int, step: int, position_B: np.ndarray) -> np.ndarray:
    """Draw (B,) diffusion times in [0, 1) for the positions ``position_B`` in the global batch of ``step``.

    One random shift is drawn per step; ``spread_t`` makes evenly spread pairs (t, 1 - t) from it. Each t is uniform.
    The global batch and every contiguous micro-batch whose size is a power of two are stratified. MDLM's antithetic
    sampling spreads the times evenly but does not pair them.
    """
    generator = np.random.Philox(key=_key(seed, _T_STREAM), counter=[0, 0, step, 0])
    return spread_t(float(_unit(generator.random_raw(1))[0]), position_B)


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """Apply the finaliser of SplitMix64 to ``value`` XOR ``key``; it maps 64 bits to 64 well-mixed bits."""
    value = (value ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _order_keys(seed: int, epoch: int, stream: int) -> np.ndarray:
    return np.random.Philox(key=_key(seed, stream), counter=[0, 0, epoch, 0]).random_raw(6)


def permute(index_B: np.ndarray, size: int, *, seed: int, epoch: int, stream: int = ORDER_STREAM) -> np.ndarray:
    """Apply a random permutation of range(``size``) to each index, in constant time and memory per index.

    The permutation is a six-round Feistel network on the smallest even number of bits that can hold every index. A
    result outside the range passes through the network again (cycle walking), so the map is a bijection on the range.

    Args:
        index_B: (B,) integers in range(size).
        size: The number of elements that are permuted.
        seed: The seed of the run.
        epoch: Each epoch has its own permutation.
        stream: A 64-bit number; each stream has its own permutations.

    Returns:
        (B,) int64: the images of the indices.
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
