"""packed: the LITPKDS token files of TinyLlama and SMDM, read and written. Called by prepare, build and mixture.

A file is a 24-byte header (magic LITPKDS, uint64 version 1, uint8 dtype code, uint64 tokens per chunk) and tokens.
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


DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}


_CODES = {np.dtype(name): code for code, name in DTYPES.items()}


INTEGER_CODES = (1, 2, 3, 4, 5, 8)


MAX_OPEN = 16384  # Linux lets a process have 65,530 maps, and a prepared SlimPajama may have more files


def encode_packed(tokens: np.ndarray) -> bytes:
    """The bytes of a file that holds ``tokens`` as one chunk: no tail is dropped and none is padded."""
    return HEADER.pack(MAGIC, 1, _CODES[tokens.dtype.newbyteorder("<")], len(tokens)) + tokens.tobytes()


def _read_header(path: Path) -> tuple[np.dtype[Any], int]:
    """(dtype, tokens) of one file. Raises UserError for anything that is not a whole LITPKDS file."""
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
    return dtype, (size - HEADER.size) // dtype.itemsize


def open_packed(path: Path) -> np.ndarray:
    """The tokens of one file, memory-mapped. Raises UserError for anything that is not a whole LITPKDS file."""
    dtype, count = _read_header(path)
    if not count:  # nothing cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER.size).view(np.ndarray)  # slicing a memmap costs 1 us


def write_packed(path: Path, tokens: np.ndarray) -> PackedFile:
    """Write one file, whole or not at all, and describe it."""
    data = encode_packed(tokens)
    write_atomic(path, data)
    return PackedFile(name=path.name, tokens=len(tokens), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


class PackedTokens:
    """The files of one split, one after another, as numbered sequences ``stride`` apart and ``block`` long.

    A sequence may begin in one file and end in the next, so no file's tail is lost. TinyLlama's files hold whole
    blocks: there every sequence lies in one file.
    """

    def __init__(self, paths: Sequence[Path], *, block_size: int, stride: int) -> None:
        self.paths, self.block_size, self.stride = list(paths), block_size, stride
        self.ends = list(itertools.accumulate(_read_header(path)[1] for path in paths))
        self._opened: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        held = self.ends[-1] if self.ends else 0
        return max((held - self.block_size) // self.stride + 1, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a map would be pickled as a copy of the whole file

    def rows(self, index_B: np.ndarray) -> np.ndarray:
        """(B, block) int64 tokens of the sequences ``index``; any of them in the same time."""
        result = np.empty((len(index_B), self.block_size), dtype=np.int64)
        self.fill(result, index_B.tolist())
        return result

    def fill(self, rows: Iterable[np.ndarray], indices: Iterable[int]) -> None:
        """Put the tokens of each of the sequences ``indices`` into its row."""
        ends, opened, stride, block = self.ends, self._opened, self.stride, self.block_size  # half the time is Python's
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
        """Fill ``row`` with ``part``, the end of ``file``, and what follows in the next files."""
        done = 0
        while True:
            row[done : done + len(part)] = part
            done += len(part)
            if done == len(row):
                return
            file += 1
            part = self._open(file)[: len(row) - done]

    def _open(self, file: int) -> np.ndarray:
        tokens = self._opened.get(file)
        if tokens is None:
            if len(self._opened) >= MAX_OPEN:
                self._opened.clear()
            tokens = self._opened[file] = open_packed(self.paths[file])
        return tokens


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
