"""packed: the LITPKDS token files of TinyLlama and SMDM, read and written. Called by prepare and batches.

A file is a 24-byte header (magic LITPKDS, uint64 version 1, uint8 dtype code, uint64 tokens per chunk) and tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlm.errors import UserError
from dlm.manifest import Manifest

MAGIC = b"LITPKDS"
HEADER = struct.Struct("<7sQBQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in DTYPES.items()}
INTEGER_CODES = (1, 2, 3, 4, 5, 8)


def encode_packed(tokens: np.ndarray) -> bytes:
    """The bytes of a file that holds ``tokens`` as one chunk: no tail is dropped and none is padded."""
    return HEADER.pack(MAGIC, 1, _CODES[tokens.dtype.newbyteorder("<")], len(tokens)) + tokens.tobytes()


def open_packed(path: Path) -> np.ndarray:
    """The tokens of one file, memory-mapped. Raises UserError for anything that is not a whole LITPKDS file."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size or head[:7] != MAGIC:
        raise UserError(f"{path} is no LITPKDS file: it does not begin with the magic bytes LITPKDS")
    _, version, code, _ = HEADER.unpack(head)
    if version != 1 or code not in INTEGER_CODES:
        raise UserError(
            f"{path} has version {version} and dtype code {code}: dlm reads version 1 and integer codes "
            f"{', '.join(map(str, INTEGER_CODES))}"
        )
    dtype = np.dtype(DTYPES[code])
    if (size - HEADER.size) % dtype.itemsize:
        raise UserError(f"{path} ends inside a token: it is truncated, copy or prepare it again")
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER.size) if size > HEADER.size else np.empty(0, dtype)


class PackedTokens:
    """The files of one split as numbered sequences: file after file, ``stride`` tokens apart, ``block`` long."""

    def __init__(self, paths: Sequence[Path], *, block_size: int, stride: int) -> None:
        self.block_size, self.stride = block_size, stride
        self.files = [open_packed(path) for path in paths]
        counts = [max((len(tokens) - block_size) // stride + 1, 0) for tokens in self.files]
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def rows(self, index_B: np.ndarray) -> np.ndarray:
        """(B, block) int64 tokens of the sequences ``index``; any of them in the same time."""
        result = np.empty((len(index_B), self.block_size), dtype=np.int64)
        for place, (index, file) in enumerate(zip(index_B, np.searchsorted(self.ends, index_B, "right"), strict=True)):
            start = (int(index) - (int(self.ends[file - 1]) if file else 0)) * self.stride
            result[place] = self.files[file][start : start + self.block_size]
        return result


def open_split(data_dir: Path, manifest: Manifest, split: str, *, block_size: int, stride: int) -> PackedTokens:
    """One split of a prepared data set. Raises UserError when it has no sequence of that length."""
    paths = [data_dir / file.name for file in manifest.splits[split]]
    tokens = PackedTokens(paths, block_size=block_size, stride=stride)
    if not len(tokens):
        raise UserError(
            f"the {split} split of {data_dir} holds {manifest.tokens(split)} tokens, not one sequence of "
            f"{block_size}: lower data.block_size or prepare more data"
        )
    return tokens
