"""Turn one unit of documents into packed files of each split, and describe them. Run by the workers of build.

The files of a unit follow from the unit and the job alone, not from the worker nor from what was encoded before.
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

FILE_TOKENS = 32 * 1024 * 1024  # of one packed file


BATCH_CHARS, BATCH_DOCUMENTS = 2 * 1024 * 1024, 1024  # encoded in one call


DIGEST_BYTES = 16  # of the hash by which equal documents are recognised


SKIPPED = ("empty", "with NUL", "in validation")  # why a document is left out


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """What `dlm prepare text` is asked for. All of it decides the bytes of the data set."""

    name: str  # in the names of the files
    sources: tuple[str, ...]
    validation_sources: tuple[str, ...]
    validation_share: float  # of the documents, where neither folders nor files say what to hold out
    text_key: str
    tokenizer: str  # bytes, or a file or folder
    vocab_size: int | None  # None here and in the next two: the tokenizer's own
    eos_id: int | None
    bos_id: int | None
    add_bos: bool  # write the bos token in front of every document


@dataclass(kw_only=True)
class UnitRecord:
    """What was written of a unit: a line of done.jsonl."""

    unit: int
    limit: int  # documents with a key below it were held out
    files: dict[str, list[PackedFile]]  # split -> files
    documents: dict[str, int]  # split -> documents
    skipped: dict[str, int]  # reason of SKIPPED -> documents
    smallest: int | None = None  # of the documents' keys: says what to hold out where the share held out none


class SplitWriter:
    """Encodes the documents of one split of one unit and writes them in files of FILE_TOKENS; the last is shorter.

    Args:
        stem: The beginning of the paths of the files.
        encode: Documents -> their tokens.
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
        """Write what is left, and return all files."""
        self._flush(1)
        return self.files

    def _flush(self, at_least: int) -> None:
        """Encode the documents so far, and write files while there are ``at_least`` tokens."""
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
    """Encodes units in one process.

    Args:
        job: What was asked for.
        tokenizer: The job's tokenizer, with the job's own ids.
        building: The folder of the unfinished data set.
    """

    job: TextJob
    tokenizer: Tokenizer
    building: Path

    def encode_unit(self, number: int, unit: Unit, limit: int) -> UnitRecord:
        """Write the packed files of a unit to data/ in the folder of the unfinished data set.

        A training unit leaves out the documents of validation units. A validation unit leaves their digests in the
        folder, so all validation units must be encoded first.

        Args:
            number: The place of the unit among all units; it enters the names of the files.
            unit: Where the documents are.
            limit: In a unit without a split, a document is held out if its key, 64 bits of its digest, is below it.

        Returns:
            What was written.
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
        """The documents of a unit without those that a stream of tokens cannot hold, which ``skipped`` counts."""
        for text in read_unit(unit, self.job.text_key):
            if not text:
                skipped["empty"] += 1
            elif self.tokenizer.library is None and chr(END_OF_DOCUMENT) in text:
                skipped["with NUL"] += 1
            else:
                yield text

    @functools.cached_property
    def _held_out(self) -> frozenset[bytes]:
        """The digests of the documents of all validation units."""
        content = b"".join(path.read_bytes() for path in (self.building / "digests").glob("[0-9]*"))
        return frozenset(content[place : place + DIGEST_BYTES] for place in range(0, len(content), DIGEST_BYTES))

    def _tokens(self, texts: list[str]) -> np.ndarray:
        """The tokens of documents one after another, each with its eos token and, if asked for, its bos token.

        Raises:
            UserError: The tokenizer gave an id that is not below the vocabulary size.
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
    """The file with the digests of the documents of a validation unit."""
    return building / "digests" / f"{number:06d}"
