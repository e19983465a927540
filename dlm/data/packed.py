"""Read and write the LITPKDS token files of TinyLlama and SMDM.

A file consists of a 24-byte header (magic LITPKDS, uint64 version 1, uint8 dtype code, uint64 tokens per chunk) and the
tokens.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlm.core.errors import UserError
from dlm.core.files import write_atomic
from dlm.data.manifest import Manifest, PackedFile

MAGIC = b"LITPKDS"


HEADER = struct.Struct("<7sQBQ")


# dtype code -> dtype, with the codes of TinyLlama.
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}


_CODES = {np.dtype(name): code for code, name in DTYPES.items()}


INTEGER_CODES = (1, 2, 3, 4, 5, 8)


MAX_OPEN = 16384  # Linux allows 65,530 memory maps per process; a prepared SlimPajama may have more files


def encode_packed(tokens: np.ndarray) -> bytes:
    """Return the bytes of a file that holds ``tokens`` (N,) as one chunk, without dropping or padding tokens."""
    return HEADER.pack(MAGIC, 1, _CODES[tokens.dtype.newbyteorder("<")], len(tokens)) + tokens.tobytes()


def chunk_tokens(path: Path) -> int:
    """Return the number of tokens in a chunk that the header states. A whole file consists of whole chunks."""
    return int(_header(path)[3])


def _header(path: Path) -> tuple[bytes, int, int, int]:
    """Return magic, version, dtype code and tokens per chunk. Raises UserError if the file is of another format."""
    with open(path, "rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size or head[:7] != MAGIC:
        raise UserError(f"{path} is no LITPKDS file: it does not begin with the bytes LITPKDS")
    magic, version, code, chunk = HEADER.unpack(head)
    return magic, version, code, chunk


def _read_header(path: Path) -> tuple[np.dtype[Any], int]:
    """Return the dtype and the number of tokens of a file. Raises UserError unless it is a complete LITPKDS file."""
    size = path.stat().st_size
    _, version, code, _ = _header(path)
    if version != 1 or code not in INTEGER_CODES:
        raise UserError(
            f"{path} has version {version} and dtype code {code}: dlm reads version 1 and integer codes "
            f"{', '.join(map(str, INTEGER_CODES))}"
        )
    dtype = np.dtype(DTYPES[code])
    if (size - HEADER.size) % dtype.itemsize:
        raise UserError(f"{path} ends inside a token, so it is truncated: copy or prepare it again")
    return dtype, (size - HEADER.size) // dtype.itemsize


def open_packed(path: Path) -> np.ndarray:
    """Memory-map the (N,) tokens of a file. Raises UserError unless it is a complete LITPKDS file."""
    dtype, count = _read_header(path)
    if not count:  # an empty region of a file cannot be mapped
        return np.empty(0, dtype)
    tokens = np.memmap(path, dtype=dtype, mode="r", offset=HEADER.size)
    return tokens.view(np.ndarray)  # slicing a np.memmap takes 1 us longer


def write_packed(path: Path, tokens: np.ndarray) -> PackedFile:
    """Write ``tokens`` (N,) to a file atomically, and return its description."""
    data = encode_packed(tokens)
    write_atomic(path, data)
    return PackedFile(name=path.name, tokens=len(tokens), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


class PackedTokens:
    """The tokens of one split as numbered sequences.

    The files are read as one concatenated stream. A sequence may begin in one file and end in another, so no tokens at
    the end of a file are lost. TinyLlama's files contain only complete sequences, so each of their sequences lies in
    one file.

    Args:
        paths: The files, in order.
        block_size: Tokens per sequence.
        stride: Tokens between the starts of consecutive sequences.
        counts: How many tokens of each file are read, from its beginning; by default all.
    """

    def __init__(
        self, paths: Sequence[Path], *, block_size: int, stride: int, counts: Sequence[int] | None = None
    ) -> None:
        self.paths, self.block_size, self.stride = list(paths), block_size, stride
        self.counts = [_read_header(path)[1] for path in paths] if counts is None else list(counts)
        self.ends = list(itertools.accumulate(self.counts))
        self._opened: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        held = self.ends[-1] if self.ends else 0
        return max((held - self.block_size) // self.stride + 1, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # pickling a memory map would copy the entire file

    def rows(self, index_B: np.ndarray) -> np.ndarray:
        """Return the (B, block_size) int64 tokens of the sequences ``index_B``."""
        result = np.empty((len(index_B), self.block_size), dtype=np.int64)
        self.fill(result, index_B.tolist())
        return result

    def fill(self, rows: Iterable[np.ndarray], indices: Iterable[int]) -> None:
        """Write the tokens of the sequences ``indices`` to ``rows``, arrays of shape (block_size,)."""
        ends, opened, stride, block = self.ends, self._opened, self.stride, self.block_size  # this loop is hot
        for row, index in zip(rows, indices, strict=True):
            start = index * stride
            file = bisect.bisect_right(ends, start)
            tokens = opened.get(file)
            if tokens is None:
                tokens = self._open(file)
            offset = start - ends[file - 1] if file else start
            part = tokens[offset : offset + block]
            if len(part) == block:
                row[:] = part
            else:
                self._gather(row, file, part)

    def _gather(self, row: np.ndarray, file: int, part: np.ndarray) -> None:
        """Fill ``row`` with ``part``, the end of file number ``file``, and the tokens that follow in the next files."""
        parts = [part]
        while missing := len(row) - sum(map(len, parts)):
            file += 1
            parts.append(self._open(file)[:missing])
        np.concatenate(parts, out=row)

    def _open(self, file: int) -> np.ndarray:
        tokens = self._opened.get(file)
        if tokens is None:
            if len(self._opened) >= MAX_OPEN:
                self._opened.clear()
            tokens = self._opened[file] = open_packed(self.paths[file])[: self.counts[file]]
        return tokens


def open_split(data_dir: Path, manifest: Manifest, split: str, *, block_size: int, stride: int) -> PackedTokens:
    """Open one split of a prepared data set. Raises UserError if it has no sequence of ``block_size`` tokens."""
    files = manifest.splits[split]
    paths, counts = [data_dir / file.name for file in files], [file.tokens for file in files]
    tokens = PackedTokens(paths, block_size=block_size, stride=stride, counts=counts)
    if not len(tokens):
        raise UserError(
            f"the {split} split of {data_dir} holds {manifest.tokens(split)} tokens, not one sequence of "
            f"{block_size}: lower data.block_size or prepare more data"
        )
    return tokens
