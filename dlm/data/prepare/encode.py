"""encode: one unit of documents -> packed files of each split, and a record of them. Run by build's workers; no torch.

The files of a unit follow from the unit and the job alone: not from the worker, nor from what was done before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlm.core.errors import UserError
from dlm.core.files import write_atomic
from dlm.data.manifest import PackedFile
from dlm.data.packed import write_packed
from dlm.data.prepare.documents import Unit, read_unit
from dlm.data.prepare.tokenizer import END_OF_DOCUMENT, Tokenizer

FILE_TOKENS = 32 * 1024 * 1024  # of one packed file


BATCH_CHARS, BATCH_DOCUMENTS = 2 * 1024 * 1024, 1024  # encoded in one call


DIGEST_BYTES = 16


SKIPPED = ("empty", "with NUL", "in validation")


@dataclass(frozen=True, kw_only=True)
class Form:
    """How documents become tokens, and where these are written."""

    name: str  # in the names of the files
    folder: str
    tokenizer: Tokenizer
    text_key: str
    eos_id: int
    bos_id: int | None  # in front of every document; None: nothing stands there


@dataclass(kw_only=True)
class Record:
    """What became of a unit."""

    unit: int
    limit: int
    files: dict[str, list[PackedFile]]
    documents: dict[str, int]
    skipped: dict[str, int]
    smallest: int | None = None  # of the documents' keys: says what to hold out where the share held out none

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Record:
        """The record of a line that ``dataclasses.asdict`` made."""
        files = {split: [PackedFile(**file) for file in files] for split, files in row["files"].items()}
        return cls(**{**row, "files": files})


def digest(text: str) -> bytes:
    """What tells documents apart, by their content alone."""
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


def key_of(seen: bytes) -> int:
    """64 bits of a document: below the limit it is held out, so that equal documents share a split."""
    return int.from_bytes(seen[:8], "big")


class Stream:
    """The tokens of one split of one unit, written in files of FILE_TOKENS; the tail is a file too."""

    def __init__(self, form: Form, split: str, unit: int) -> None:
        self.form, self.stem = form, f"{split}_{form.name}_{unit:06d}"
        self.files: list[PackedFile] = []
        self.num_documents = 0
        self._texts: list[str] = []
        self._num_chars, self._num_tokens = 0, 0
        self._parts: list[np.ndarray] = []

    def add(self, text: str) -> None:
        self.num_documents += 1
        self._texts.append(text)
        self._num_chars += len(text)
        if self._num_chars >= BATCH_CHARS or len(self._texts) >= BATCH_DOCUMENTS:
            self._encode()

    def close(self) -> list[PackedFile]:
        """Write what is left; the files of the whole stream."""
        self._encode()
        if self._num_tokens:
            self._write()
        return self.files

    def _encode(self) -> None:
        if not self._texts:
            return
        tokens = tokens_of(self._texts, self.form)
        self._texts, self._num_chars = [], 0
        self._parts.append(tokens)
        self._num_tokens += len(tokens)
        while self._num_tokens >= FILE_TOKENS:
            self._write()

    def _write(self) -> None:
        tokens = np.concatenate(self._parts)
        path = Path(self.form.folder) / f"{self.stem}_{len(self.files):010d}.bin"
        self.files.append(write_packed(path, tokens[:FILE_TOKENS]))
        self._parts = [tokens[FILE_TOKENS:]]
        self._num_tokens = len(self._parts[0])


def tokens_of(texts: list[str], form: Form) -> np.ndarray:
    """The tokens of documents, each with what stands before and after it. Raises UserError for ids out of range."""
    tokenizer = form.tokenizer
    before = [] if form.bos_id is None else [np.array([form.bos_id], dtype=np.int32)]
    after = np.array([form.eos_id], dtype=np.int32)
    parts = [part for ids in tokenizer.encode(texts) for part in (*before, np.asarray(ids, dtype=np.int32), after)]
    tokens = np.concatenate(parts)
    if int(tokens.max()) >= tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} gives token {int(tokens.max())}: allowed are ids below --vocab-size "
            f"{tokenizer.vocab_size}"
        )
    return tokens.astype(tokenizer.dtype)


def encode_unit(number: int, unit: Unit, form: Form, *, limit: int, held_out: frozenset[bytes]) -> Record:
    """Write the packed files of a unit, and say what they hold.

    A unit without a split gives documents whose key is below ``limit`` to validation; a training unit leaves out
    the documents in ``held_out``. A validation unit leaves its documents' digests beside its files' folder.
    """
    streams: dict[str, Stream] = {}
    skipped = dict.fromkeys(SKIPPED, 0)
    seen: list[bytes] = []
    smallest: int | None = None
    for text in _kept(unit, form, skipped):
        content = digest(text)
        key = key_of(content)
        split = unit.split or ("validation" if key < limit else "train")
        if unit.split is None:
            smallest = key if smallest is None else min(key, smallest)
        elif split == "validation":
            seen.append(content)
        elif content in held_out:
            skipped["in validation"] += 1
            continue
        if split not in streams:
            streams[split] = Stream(form, split, number)
        streams[split].add(text)
    if unit.split == "validation":
        write_atomic(digests_path(Path(form.folder).parent, number), b"".join(seen))
    return Record(
        unit=number,
        limit=limit,
        files={split: stream.close() for split, stream in streams.items()},
        documents={split: stream.num_documents for split, stream in streams.items()},
        skipped=skipped,
        smallest=smallest,
    )


def _kept(unit: Unit, form: Form, skipped: dict[str, int]) -> Iterator[str]:
    """The documents of a unit that can be told apart in a stream of tokens; the others are counted."""
    as_bytes = form.tokenizer.sha256 is None
    for text in read_unit(unit, form.text_key):
        if not text:
            skipped["empty"] += 1
        elif as_bytes and chr(END_OF_DOCUMENT) in text:
            skipped["with NUL"] += 1
        else:
            yield text


def digests_path(building: Path, number: int) -> Path:
    """The digests of the documents of a validation unit."""
    return building / "digests" / f"{number:06d}"


def read_digests(building: Path) -> frozenset[bytes]:
    """The digests of every validation document written so far."""
    content = b"".join(path.read_bytes() for path in (building / "digests").glob("[0-9]*"))
    return frozenset(content[place : place + DIGEST_BYTES] for place in range(0, len(content), DIGEST_BYTES))
