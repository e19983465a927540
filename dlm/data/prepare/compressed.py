"""Open files that may be compressed with gzip or zstd."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import IO, Any, cast

READ_BYTES, BUFFER_BYTES = 128 * 1024, 1024 * 1024
PIECE_BYTES = 1024  # what zstd gets at a time, and makes at most 32,768 times as long: 32 MiB
MAX_WINDOW_BYTES = 2**31  # of `zstd --long=31`, the widest that zstd can write


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading; the suffix of its name says how it is compressed.

    Raises EOFError, here or on reading, if a compressed file is empty or truncated.
    """
    name = path.name.lower()
    if name.endswith((".gz", ".zst")) and not path.stat().st_size:
        raise EOFError("it is empty")
    if name.endswith(".gz"):  # Arrow refuses the zeros with which some tools fill up the last block of a gzip file
        return cast(IO[bytes], gzip.open(path))  # without a larger buffer, which would lose what lies before damage
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(path), BUFFER_BYTES)
    return open(path, "rb")


def read_at_most(stream: IO[bytes], size: int) -> bytearray:
    """Read up to ``size`` bytes. Unlike ``read``, it takes no memory for bytes that are not there."""
    content = bytearray()
    while part := stream.read(min(size - len(content), BUFFER_BYTES)):
        content += part
    return content


def skip_line(stream: IO[bytes]) -> int:
    """Read up to the next line break or the end, without holding it in memory. Return the number of bytes."""
    size, part = 0, b""
    while not part.endswith(b"\n") and (part := stream.readline(BUFFER_BYTES)):
        size += len(part)
    return size


class _ZstdFrames(io.RawIOBase):
    """All frames of a zstd file. The readers of the library zstandard accept a truncated file as complete."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file = open(path, "rb")  # noqa: SIM115 - close() closes it
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame: Any = None  # the decompressor of the frame that has begun
        self._ready = self._rest = memoryview(b"")  # bytes to give, and bytes to decompress

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with the next bytes and return their number; 0 at the end."""
        while not self._ready:
            self._rest = self._rest or memoryview(self._file.read(READ_BYTES))
            if not self._rest:
                if self._frame is not None:
                    raise EOFError("Truncated zstd frame")
                return 0
            self._frame = self._frame or self._zstd.decompressobj()
            piece, self._rest = self._rest[:PIECE_BYTES], self._rest[PIECE_BYTES:]
            self._ready = memoryview(self._frame.decompress(piece))
            if self._frame.eof:
                self._rest = memoryview(self._frame.unused_data + self._rest)
                self._frame = None
        view = memoryview(buffer)
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
