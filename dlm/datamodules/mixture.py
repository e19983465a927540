"""mixture: sample number -> sequence of one of several sources, in fixed proportions. Called by slim_pajama.

Legend: sample i is the i-th sequence of a run, all devices together; a row is the number of a sequence, the sources
one after another. Nothing here knows ranks or restarts, and every row is found in O(1).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from dlm.datamodules.packed import PackedTokens, open_split
from dlm.manifest import BLOCK_SAMPLES, DataSet, apportion
from dlm.objectives.noise import MIXTURE_STREAM, ORDER_STREAM, permute


class Mixture:
    """Sources read in proportion to ``samples`` (of every block); ``streams`` names the random order of each.

    Every block is another random order of its sources' samples; the n-th sample of a source, counted from the run's
    start, is the n-th of that source's own random order, epoch after epoch.
    """

    def __init__(self, sources: Sequence[PackedTokens], samples: Sequence[int], streams: Sequence[int]) -> None:
        self.sources, self.samples, self.streams = list(sources), tuple(samples), list(streams)
        self.block_samples, self.block_size = sum(samples), sources[0].block_size
        self.row_ends = np.cumsum([len(source) for source in sources])

    @classmethod
    def single(cls, tokens: PackedTokens) -> Mixture:
        """One source alone."""
        return cls([tokens], [BLOCK_SAMPLES], [ORDER_STREAM])

    def __len__(self) -> int:
        return int(self.row_ends[-1])

    def order(self, sample_B: np.ndarray, *, seed: int) -> np.ndarray:
        """(B,) rows of the samples ``sample`` of a run."""
        if len(self.sources) == 1:
            return self._row_of(0, sample_B, seed)
        row_B = np.empty_like(sample_B)
        block_B, place_B = np.divmod(sample_B, self.block_samples)
        for block in np.unique(block_B):
            source_K, nth_K = _layout(self.samples, seed, int(block))
            for source, samples in enumerate(self.samples):
                here = (block_B == block) & (source_K[place_B] == source)
                ordinal = block * samples + nth_K[place_B[here]]
                start = self.row_ends[source] - len(self.sources[source])
                row_B[here] = start + self._row_of(source, ordinal, seed)
        return row_B

    def _row_of(self, source: int, ordinal_B: np.ndarray, seed: int) -> np.ndarray:
        """(B,) sequences of ``source`` that are its samples ``ordinal``."""
        return _permuted(ordinal_B, len(self.sources[source]), seed, self.streams[source])

    def rows(self, row_B: np.ndarray) -> np.ndarray:
        """(B, block) int64 tokens."""
        if len(self.sources) == 1:
            return self.sources[0].rows(row_B)
        source_B = np.searchsorted(self.row_ends, row_B, "right")
        result = np.empty((len(row_B), self.block_size), dtype=np.int64)
        for source in np.unique(source_B):
            here = source_B == source
            result[here] = self.sources[source].rows(row_B[here] - self.row_ends[source] + len(self.sources[source]))
        return result

    def validation_rows(self, wanted: int) -> np.ndarray:
        """``wanted`` rows in proportion to the weights, evenly spread over each source; all of one that holds fewer."""
        parts = [
            spread_rows(len(source), count) + end - len(source)
            for source, count, end in zip(
                self.sources, apportion(wanted, self.samples), self.row_ends.tolist(), strict=True
            )
        ]
        return np.concatenate(parts)

    def samples_read(self, count: int, *, seed: int) -> list[int]:
        """How many of the first ``count`` samples each source gave."""
        if len(self.sources) == 1:
            return [count]
        blocks, rest = divmod(count, self.block_samples)
        in_last = np.bincount(_layout(self.samples, seed, blocks)[0][:rest], minlength=len(self.sources))
        return [blocks * n + int(extra) for n, extra in zip(self.samples, in_last, strict=True)]

    def epochs(self, count: int, *, seed: int) -> float:
        """Passes over the source that ``count`` samples repeat most."""
        read = self.samples_read(count, seed=seed)
        return max(n / len(source) for n, source in zip(read, self.sources, strict=True))

    def unique_tokens(self, count: int, *, seed: int) -> int:
        """Distinct tokens among ``count`` samples."""
        read = self.samples_read(count, seed=seed)
        return self.block_size * sum(min(n, len(source)) for n, source in zip(read, self.sources, strict=True))


@functools.lru_cache(maxsize=8)
def _layout(samples: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(K,) source of every sample of a block, and the how-manieth of its source in the block it is.

    Half a millisecond for 8192 samples, whichever the block.
    """
    place_K = permute(np.arange(sum(samples)), sum(samples), seed=seed, epoch=block, stream=MIXTURE_STREAM)
    source_K = np.searchsorted(np.cumsum(samples), place_K, "right")
    nth_K = np.empty_like(place_K)
    for source, count in enumerate(samples):
        nth_K[source_K == source] = np.arange(count)
    return source_K, nth_K


def _permuted(index_B: np.ndarray, size: int, seed: int, stream: int) -> np.ndarray:
    """(B,) places of the numbers ``index``, every ``size`` of which are another permutation."""
    epoch_B, place_B = np.divmod(index_B, size)
    result = np.empty_like(index_B)
    for epoch in np.unique(epoch_B):
        here = epoch_B == epoch
        result[here] = permute(place_B[here], size, seed=seed, epoch=int(epoch), stream=stream)
    return result


def spread_rows(available: int, wanted: int) -> np.ndarray:
    """``wanted`` row numbers evenly spread over ``available``; all of them where there are fewer."""
    wanted = min(available, wanted)
    return np.arange(wanted) * available // max(wanted, 1)


def open_mixture(data: DataSet, split: str, *, block_size: int, stride: int) -> Mixture:
    """One split of prepared data. Raises UserError when a source has no sequence of that length."""
    sources = [
        open_split(source.data_dir, source.manifest, split, block_size=block_size, stride=stride)
        for source in data.sources
    ]
    if len(sources) == 1:
        return Mixture.single(sources[0])
    streams = [int(source.manifest.hash, 16) for source in data.sources]  # the same whatever it is mixed with
    return Mixture(sources, [source.samples for source in data.sources], streams)
