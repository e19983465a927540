"""Map each sample number of a run to a sequence of one of several sources, in fixed proportions.

Sample i is the i-th sequence of a run, counted over all devices. A row is the index of a sequence in the concatenation
of all sources. Nothing in this module depends on ranks or restarts, and every row is found in constant time. Names of
arrays end in their shape: K samples of a block, B rows, S rows of one source, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from dlm.core.errors import UserError
from dlm.data.manifest import DataSet, Unique, apportion
from dlm.data.noise import MIXTURE_STREAM, ORDER_STREAM, UNIQUE_STREAM, permute
from dlm.data.packed import PackedTokens, open_split

UNIQUE_SEED = 0  # of the order from which a limited run takes its sequences; the seed of the run does not change it


class Mixture:
    """Several sources of sequences, read in fixed proportions.

    A run reads its samples in blocks. Every block has the same number of samples from each source, and the sources are
    interleaved in a random order that is drawn for each block. Each source is read in its own random order, which
    continues from block to block and is drawn again for each epoch of the source.

    Args:
        sources: The sequences of each source.
        samples: How many samples of a block come from each source.
        streams: The random stream that determines the order of each source.
        vocab_size: ``text`` refuses tokens that are not below it. None: any token is accepted.
        limits: How many sequences of each source ``order`` uses: the first ones of a random order that is the same for
            every seed, so a smaller limit uses a part of what a larger one does. None: all sequences.
    """

    def __init__(
        self,
        sources: Sequence[PackedTokens],
        samples: Sequence[int],
        streams: Sequence[int],
        *,
        vocab_size: int | None = None,
        limits: Sequence[int] | None = None,
    ) -> None:
        self.sources, self.samples, self.streams = list(sources), tuple(samples), tuple(streams)
        self.vocab_size = vocab_size
        self.block_samples, self.block_size = sum(samples), sources[0].block_size
        self._sizes = tuple(len(source) for source in sources)
        self.limits = self._sizes if limits is None else tuple(limits)
        self.row_ends = np.cumsum(self._sizes).tolist()

    def __len__(self) -> int:
        return int(self.row_ends[-1])

    def order(self, first: int, count: int, *, seed: int) -> np.ndarray:
        """Return the (count,) int64 rows of the samples ``first`` to ``first + count - 1`` of a run with ``seed``."""
        block, place = divmod(first, self.block_samples)
        sources = (self._sizes, self.limits, self.samples, self.streams)
        rows = _block(*sources, seed, block)[place : place + count]
        while len(rows) < count:
            block += 1
            rows = np.concatenate([rows, _block(*sources, seed, block)[: count - len(rows)]])
        return rows

    def rows(self, row_B: np.ndarray) -> np.ndarray:
        """Return the (B, T) int64 tokens of the rows ``row_B``."""
        if len(self.sources) == 1:
            return self.sources[0].rows(row_B)
        result = np.empty((len(row_B), self.block_size), dtype=np.int64)
        source_B = np.searchsorted(self.row_ends, row_B, "right")
        for number, source in enumerate(self.sources):
            place_S = np.flatnonzero(source_B == number)
            first = self.row_ends[number] - len(source)
            source.fill(map(result.__getitem__, place_S.tolist()), (row_B[place_S] - first).tolist())
        return result

    def text(self, row_B: np.ndarray) -> np.ndarray:
        """Return the (B, T) int64 tokens of the rows ``row_B``, and check that all tokens are in the vocabulary.

        A token outside the vocabulary would crash the embedding, on a GPU without a helpful message. The cause is a
        file that was replaced by another file of the same size, which no earlier check detects. The check takes 1 to
        2 % of the time that it takes to make a batch with its noise.

        Raises:
            UserError: A token is not in the vocabulary.
        """
        rows_BT = self.rows(row_B)
        unsigned_BT = rows_BT.view(np.uint64)  # a negative token becomes a large one, so one pass detects both
        if self.vocab_size is not None and unsigned_BT.max(initial=0) >= self.vocab_size:
            place, token = np.argwhere(unsigned_BT >= self.vocab_size)[0]
            source = self.sources[int(np.searchsorted(self.row_ends, row_B[place], "right"))]
            raise UserError(
                f"{source.paths[0].parent} holds token {rows_BT[place, token]}, its vocabulary has {self.vocab_size}: "
                "a file was replaced; prepare the data again with dlm prepare"
            )
        return rows_BT

    def validation_rows(self, wanted: int) -> np.ndarray:
        """Return at most ``wanted`` rows, in the proportions of the mixture and evenly spaced within each source.

        A source that has fewer sequences than its share contributes all of them.
        """
        parts = [
            spread_rows(len(source), count) + end - len(source)
            for source, count, end in zip(self.sources, apportion(wanted, self.samples), self.row_ends, strict=True)
        ]
        return np.concatenate(parts)

    def samples_read(self, count: int, *, seed: int) -> list[int]:
        """Return how many of the first ``count`` samples come from each source."""
        blocks, rest = divmod(count, self.block_samples)
        in_last = np.bincount(_layout(self.samples, seed, blocks)[:rest], minlength=len(self.sources))
        return [blocks * n + int(extra) for n, extra in zip(self.samples, in_last, strict=True)]

    def epochs(self, count: int, *, seed: int) -> float:
        """Return the epochs of the most repeated source in the first ``count`` samples."""
        read = self.samples_read(count, seed=seed)
        return max(n / limit for n, limit in zip(read, self.limits, strict=True))

    def unique_tokens(self, count: int, *, seed: int) -> int:
        """Return the number of tokens in the distinct sequences among the first ``count`` samples."""
        read = self.samples_read(count, seed=seed)
        return self.block_size * sum(map(min, read, self.limits))


@functools.lru_cache(maxsize=4)
def _block(
    sizes: Sequence[int],
    limits: Sequence[int],
    samples: Sequence[int],
    streams: Sequence[int],
    seed: int,
    block: int,
) -> np.ndarray:
    """Return the (K,) int64 rows of a block. This takes about a millisecond, so the last blocks are cached.

    Args:
        sizes: How many sequences each source has.
        limits: How many of them are used.
        samples: How many samples of a block come from each source.
        streams: The random stream that determines the order of each source.
        seed: The seed of the run.
        block: The index of the block.
    """
    source_K = _layout(samples, seed, block)
    rows_K = np.empty(len(source_K), dtype=np.int64)
    first = 0
    for number, (size, limit, count, stream) in enumerate(zip(sizes, limits, samples, streams, strict=True)):
        place = _permuted(block * count + np.arange(count), limit, seed, stream)
        if limit < size:
            place = permute(place, size, seed=UNIQUE_SEED, epoch=0, stream=UNIQUE_STREAM)
        rows_K[source_K == number] = first + place
        first += size
    return rows_K


def _layout(samples: Sequence[int], seed: int, block: int) -> np.ndarray:
    """Return the (K,) source indices of the samples of a block."""
    count = sum(samples)
    place_K = permute(np.arange(count), count, seed=seed, epoch=block, stream=MIXTURE_STREAM)
    return np.searchsorted(np.cumsum(samples), place_K, "right")


def _permuted(index_B: np.ndarray, size: int, seed: int, stream: int) -> np.ndarray:
    """Return the (B,) positions, in a source of ``size`` sequences, of its samples ``index_B``.

    Every ``size`` consecutive samples are an epoch, and each epoch has its own permutation.
    """
    epoch_B, place_B = np.divmod(index_B, size)
    result = np.empty_like(index_B)
    for epoch in np.unique(epoch_B):
        here = epoch_B == epoch
        result[here] = permute(place_B[here], size, seed=seed, epoch=int(epoch), stream=stream)
    return result


def spread_rows(available: int, wanted: int) -> np.ndarray:
    """Return ``wanted`` row numbers, evenly spaced over range(``available``); all rows if there are fewer."""
    wanted = min(available, wanted)
    return np.arange(wanted) * available // max(wanted, 1)


def open_mixture(data: DataSet, split: str, *, block_size: int, stride: int, unique: Unique | None = None) -> Mixture:
    """Open one split of prepared data.

    Args:
        data: The sources and their weights.
        split: train or validation.
        block_size: Tokens per sequence.
        stride: Tokens between the starts of consecutive packed sequences.
        unique: The limit on the sequences that are read, of the training split only.

    Raises:
        UserError: A source has no sequence of ``block_size`` tokens, or not as many as ``unique`` takes.
    """
    sources = [
        open_split(source.data_dir, source.manifest, split, block_size=block_size, stride=stride)
        for source in data.sources
    ]
    # In a mixture, the order of a source does not depend on the other sources.
    streams = [int(source.manifest.hash, 16) for source in data.sources] if len(sources) > 1 else [ORDER_STREAM]
    limits = None if unique is None else data.limits(unique)
    samples = [source.samples for source in data.sources]
    return Mixture(sources, samples, streams, vocab_size=data.vocab_size, limits=limits)
