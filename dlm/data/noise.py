"""noise: (seed, global sample index) -> t, uniforms and data order. Called by datamodules.

Nothing here knows ranks, micro-batches or restarts, so neither do the draws. Random numbers come from NumPy's
counter-based Philox, whose raw stream is guaranteed stable.
"""

from __future__ import annotations

import functools

import numpy as np

_T_STREAM, _MASK_STREAM, ORDER_STREAM, MIXTURE_STREAM = 0, 1, 2, 3


def _key(seed: int, stream: int) -> np.ndarray:
    return np.array([seed, stream], dtype=np.uint64)


def _unit(raw: np.ndarray) -> np.ndarray:
    """64 random bits -> a float64 in [0, 1)."""
    return (raw >> np.uint64(11)) * 2.0**-53


def uniforms(seed: int, first: int, rows: int, count: int) -> np.ndarray:
    """(rows, count) uniforms in [0, 1) of the samples ``first`` .. ``first + rows - 1``.

    Every sample owns its own counters of one Philox stream, so a row is the same whichever call draws it.
    """
    blocks = -(-count // 4)  # Philox gives four words a counter
    generator = np.random.Philox(key=_key(seed, _MASK_STREAM), counter=first * blocks)
    return _unit(generator.random_raw(rows * blocks * 4)).reshape(rows, blocks * 4)[:, :count]


def van_der_corput(index_B: np.ndarray) -> np.ndarray:
    """Bit-reversed ``index`` in [0, 1): every aligned power-of-two block of indices is evenly spread."""
    bits, result = index_B.astype(np.uint64), np.zeros(len(index_B))
    scale = 0.5
    while bits.any():
        result += scale * (bits & np.uint64(1))
        bits, scale = bits >> np.uint64(1), scale / 2
    return result


def spread_t(shift: float, position_B: np.ndarray) -> np.ndarray:
    """(B,) diffusion times in [0, 1): pairs t, 1 - t, whose first members are evenly spread from ``shift`` on.

    Every aligned block of two or more has the mean 1/2 exactly, so the number of masked tokens of a micro-batch
    hardly varies, and every aligned power-of-two block is spread evenly.
    """
    t_B = (shift + van_der_corput(position_B // 2)) % 1.0
    return np.where(position_B % 2 == 0, t_B, -t_B % 1.0)


def stratified_t(seed: int, step: int, position_B: np.ndarray) -> np.ndarray:
    """(B,) diffusion times in [0, 1) for places ``position`` of the global batch of ``step``.

    One random shift a step, the rest spread evenly and in pairs (MDLM's antithetic sampling goes half as far): each
    t is uniform, and both the global batch and every contiguous power-of-two micro-batch of it are stratified.
    """
    generator = np.random.Philox(key=_key(seed, _T_STREAM), counter=[0, 0, step, 0])
    return spread_t(float(_unit(generator.random_raw(1))[0]), position_B)


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's finaliser: 64 bits to 64 well-mixed bits."""
    value = (value ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _order_keys(seed: int, epoch: int, stream: int) -> np.ndarray:
    return np.random.Philox(key=_key(seed, stream), counter=[0, 0, epoch, 0]).random_raw(6)


def permute(index_B: np.ndarray, size: int, *, seed: int, epoch: int, stream: int = ORDER_STREAM) -> np.ndarray:
    """Where a random permutation of range(size) sends each index, in O(1) time and memory.

    Each ``stream`` (64 bits) has permutations of its own.

    A six-round Feistel network on the smallest even number of bits that holds ``size``; results outside are sent
    through again (cycle walking), which keeps it a bijection.
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
