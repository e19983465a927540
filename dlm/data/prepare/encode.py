"""Encode one unit of documents as packed files for each split, and describe the files. The workers of build run this.

The files of a unit depend on the job, the unit and the held-out documents, but not on the worker or its earlier units.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlm.core.errors import UserError
from dlm.core.files import write_atomic
from dlm.data.manifest import PackedFile
from dlm.data.packed import write_packed
from dlm.data.prepare.documents import Unit, read_unit
from dlm.data.prepare.tokenizer import END_OF_DOCUMENT, Tokenizer

FILE_TOKENS = 32 * 1024 * 1024  # tokens per packed file


BATCH_CHARS, BATCH_DOCUMENTS = 2 * 1024 * 1024, 1024  # limits of one call of the tokenizer


DIGEST_BYTES = 16  # length of the hash that identifies equal documents


SKIPPED = ("empty", "with NUL", "in validation")  # the reasons why a document is left out


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """The options of `dlm prepare text` that determine the bytes of the data set."""

    name: str  # a part of the file names
    sources: tuple[str, ...]
    validation_sources: tuple[str, ...]
    validation_share: float  # share of documents to hold out, if no names define the splits
    text_key: str
    tokenizer: str  # ``bytes``, or the path of a file or folder
    vocab_size: int | None  # None: the tokenizer's value; likewise for the next two
    eos_id: int | None
    bos_id: int | None
    add_bos: bool  # write the bos token in front of every document


@dataclass(kw_only=True)
class UnitRecord:
    """The result of encoding a unit: one line of done.jsonl."""

    unit: int
    limit: int  # documents with a key below this limit were held out
    files: dict[str, list[PackedFile]]  # split -> files
    documents: dict[str, int]  # split -> documents
    skipped: dict[str, int]  # reason of SKIPPED -> documents
    smallest: int | None = None  # smallest key of the documents; chooses one to hold out if the share held out none


class SplitWriter:
    """Encodes the documents of one split of one unit, and writes files of FILE_TOKENS tokens; the last may be shorter.

    Args:
        stem: The common prefix of the paths of the files.
        encode: Returns the tokens of a list of documents.
    """

    def __init__(self, stem: str, encode: Callable[[list[str]], np.ndarray]) -> None:
        self.stem, self.encode = stem, encode
        self.files: list[PackedFile] = []
        self.num_documents = 0
        self._texts: list[str] = []
        self._num_chars = 0
        self._parts: list[np.ndarray] = []

    def add(self, text: str) -> None:
        self.num_documents += 1
        self._texts.append(text)
        self._num_chars += len(text)
        if self._num_chars >= BATCH_CHARS or len(self._texts) >= BATCH_DOCUMENTS:
            self._flush(FILE_TOKENS)

    def close(self) -> list[PackedFile]:
        """Write the remaining tokens, and return all files."""
        self._flush(1)
        return self.files

    def _flush(self, at_least: int) -> None:
        """Encode the buffered documents, and write files as long as ``at_least`` tokens are buffered."""
        if self._texts:
            self._parts.append(self.encode(self._texts))
        self._texts, self._num_chars = [], 0
        while sum(map(len, self._parts)) >= at_least:
            tokens = np.concatenate(self._parts)
            path = Path(f"{self.stem}_{len(self.files):010d}.bin")
            self.files.append(write_packed(path, tokens[:FILE_TOKENS]))
            self._parts = [tokens[FILE_TOKENS:]]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes units, which are pieces of the sources, in one process.

    Args:
        job: The sources and options.
        tokenizer: The tokenizer, with the special tokens that the job sets.
        building: The folder of the unfinished data set.
    """

    job: TextJob
    tokenizer: Tokenizer
    building: Path

    def encode_unit(self, number: int, unit: Unit, limit: int) -> UnitRecord:
        """Write the packed files of a unit to data/ in the folder of the unfinished data set.

        A validation unit also writes the digests of its documents, and a training unit leaves out documents with these
        digests. All validation units must therefore be encoded first.

        Args:
            number: The index of the unit among all units; it is a part of the file names.
            unit: The source files, or a slice of one.
            limit: In a unit without a split, a document is held out if its key (64 bits of its digest) is below this.

        Returns:
            The description of the files and the documents.
        """
        writers: dict[str, SplitWriter] = {}
        skipped = dict.fromkeys(SKIPPED, 0)
        digests, keys = [], []
        for text in self._kept(unit, skipped):
            digest = hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]
            if unit.split == "train" and digest in self._held_out:
                skipped["in validation"] += 1
                continue
            digests.append(digest)
            keys.append(int.from_bytes(digest[:8], "big"))
            split = unit.split or ("validation" if keys[-1] < limit else "train")
            if split not in writers:
                stem = self.building / "data" / f"{split}_{self.job.name}_{number:06d}"
                writers[split] = SplitWriter(str(stem), self._tokens)
            writers[split].add(text)
        if unit.split == "validation":
            write_atomic(digests_path(self.building, number), b"".join(digests))
        return UnitRecord(
            unit=number,
            limit=limit,
            files={split: writer.close() for split, writer in writers.items()},
            documents={split: writer.num_documents for split, writer in writers.items()},
            skipped=skipped,
            smallest=min(keys, default=None) if unit.split is None else None,
        )

    def _kept(self, unit: Unit, skipped: dict[str, int]) -> Iterator[str]:
        """Yield the documents of a unit that a token stream can represent, and count the others in ``skipped``."""
        for text in read_unit(unit, self.job.text_key):
            if not text:
                skipped["empty"] += 1
            elif self.tokenizer.library is None and chr(END_OF_DOCUMENT) in text:
                skipped["with NUL"] += 1
            else:
                yield text

    @functools.cached_property
    def _held_out(self) -> frozenset[bytes]:
        """The digests of all documents in validation units."""
        content = b"".join(path.read_bytes() for path in (self.building / "digests").glob("[0-9]*"))
        return frozenset(content[place : place + DIGEST_BYTES] for place in range(0, len(content), DIGEST_BYTES))

    def _tokens(self, texts: list[str]) -> np.ndarray:
        """Return the concatenated tokens of documents, each followed by eos and, with ``add_bos``, preceded by bos.

        Raises:
            UserError: The tokenizer returned an id that is not below the vocabulary size.
        """
        tokenizer = self.tokenizer
        before = [np.array([tokenizer.bos_id], dtype=np.int32)] if self.job.add_bos else []
        after = np.array([tokenizer.eos_id], dtype=np.int32)
        parts = [part for ids in tokenizer.encode(texts) for part in (*before, np.asarray(ids, dtype=np.int32), after)]
        tokens = np.concatenate(parts)
        if int(tokens.max()) >= tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer {tokenizer.name} gives token {int(tokens.max())}: allowed are ids below --vocab-size "
                f"{tokenizer.vocab_size}"
            )
        return tokens.astype(tokenizer.dtype)


def digests_path(building: Path, number: int) -> Path:
    """Return the path of the file that holds the digests of a validation unit's documents."""
    return building / "digests" / f"{number:06d}"
