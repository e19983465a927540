"""Encode one unit of documents as packed files for each split, and describe the files. The workers of build run this.

The files of a unit depend on the job, the unit and the held-out documents, but not on the worker or its earlier units.
The module hub counts tokens in advance by the same functions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlm.core.errors import UserError
from dlm.core.files import write_atomic
from dlm.core.typed import Unsigned
from dlm.data.manifest import PackedFile
from dlm.data.packed import write_packed
from dlm.data.prepare.bad import MAX_DOCUMENT, Bad, Report, refuse
from dlm.data.prepare.documents import Unit, read_unit
from dlm.data.prepare.tokenizer import END_OF_DOCUMENT, Tokenizer

FILE_TOKENS = 32 * 1024 * 1024  # tokens per packed file


BATCH_CHARS, BATCH_DOCUMENTS = 2 * 1024 * 1024, 1024  # limits of one call of the tokenizer


DIGEST_BYTES = 16  # length of the hash that identifies equal documents
KEYS = 2**64  # the number of possible keys of a document


# The reasons why a document is left out.
EMPTY, NUL, IN_VALIDATION, NO_TEXT = SKIPPED = ("empty", "with NUL", "in validation", "without text")


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
    train_globs: tuple[str, ...] = ()  # which files are for training; none: their names or the validation files say it
    validation_globs: tuple[str, ...] = ()  # which files are held out
    skip_bad: int = 0  # up to so many rows without text are left out
    skip_unreadable: bool = False  # leave out files that cannot be read
    max_document: int = MAX_DOCUMENT  # MiB of a row or a text file; a longer one counts as bad, or as unreadable
    config: str | None = None  # the config of a data set of the hub; None: its only one, or its default
    tokens: int | None = None  # of a data set of the hub, only as many training tokens; None: all


@dataclass(kw_only=True)
class UnitRecord:
    """The result of encoding a unit: one line of done.jsonl."""

    key: str  # of the unit
    limit: Unsigned  # documents with a key below this limit were held out
    files: dict[str, list[PackedFile]]  # split -> files
    documents: dict[str, int]  # split -> documents
    skipped: dict[str, int]  # reason of SKIPPED -> documents
    bad: list[str]  # what is wrong with each row without text
    unreadable: list[str]  # what is wrong with each file that was read in part or not at all
    max_document: int = MAX_DOCUMENT  # that of the job
    smallest: Unsigned | None = None  # smallest key of all; chooses a document to hold out if the share held out none

    def fits(self, job: TextJob) -> bool:
        """Return whether a job would leave out the same rows and files. It may have another --max-document."""
        if self.unreadable and not job.skip_unreadable:
            return False
        if self.max_document < job.max_document:  # what was too long may not be so any more
            return not (self.bad or self.unreadable)
        return self.max_document == job.max_document


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
        held_out: The keys of the validation units.
    """

    job: TextJob
    tokenizer: Tokenizer
    building: Path
    held_out: Sequence[str]

    def encode_unit(self, key: str, unit: Unit, limit: int) -> UnitRecord:
        """Write the packed files of a unit to data/ in the folder of the unfinished data set.

        A validation unit also writes the digests of its documents, and a training unit leaves out documents with these
        digests. All validation units must therefore be encoded first.

        Args:
            key: Identifies the unit and its sources; it is a part of the file names until the data set is whole.
            unit: The source files, or a slice of one.
            limit: In a unit without a split, a document is held out if its key (64 bits of its digest) is below this.

        Returns:
            The description of the files and the documents.
        """
        writers: dict[str, SplitWriter] = {}
        skipped = dict.fromkeys(SKIPPED, 0)
        bad: list[Bad] = []
        digests, keys = [], []
        for text in self._kept(unit, skipped, bad):
            digest = digest_of(text)
            if unit.split == "train" and digest in self._digests:
                skipped[IN_VALIDATION] += 1
                continue
            digests.append(digest)
            keys.append(key_of(digest))
            split = unit.split or ("validation" if keys[-1] < limit else "train")
            if split not in writers:
                stem = self.building / "data" / f"{split}_{self.job.name}_{key}"
                writers[split] = SplitWriter(str(stem), self._tokens)
            writers[split].add(text)
        if unit.split == "validation":
            write_atomic(digests_path(self.building, key), b"".join(digests))
        return UnitRecord(
            key=key,
            limit=Unsigned(limit),
            files={split: writer.close() for split, writer in writers.items()},
            documents={split: writer.num_documents for split, writer in writers.items()},
            skipped=skipped | {NO_TEXT: sum(not item.is_file for item in bad)},
            bad=[str(item) for item in bad if not item.is_file],
            unreadable=[str(item) for item in bad if item.is_file],
            max_document=self.job.max_document,
            smallest=Unsigned(min(keys)) if keys and unit.split is None else None,
        )

    def _kept(self, unit: Unit, skipped: dict[str, int], bad: list[Bad]) -> Iterator[str]:
        """Yield the documents of a unit that a token stream can represent.

        The others are counted in ``skipped``. Rows without text and unreadable files are added to ``bad``, as far as
        the job permits them.
        """
        note = noting(bad, self.job, self.building)
        for text in read_unit(unit, self.job.text_key, note, max_document=self.job.max_document):
            reason = why_skipped(text, self.tokenizer)
            if reason is None:
                yield text
            else:
                skipped[reason] += 1

    @functools.cached_property
    def _digests(self) -> frozenset[bytes]:
        """The digests of all documents in validation units."""
        content = b"".join(digests_path(self.building, key).read_bytes() for key in self.held_out)
        return frozenset(content[place : place + DIGEST_BYTES] for place in range(0, len(content), DIGEST_BYTES))

    def _tokens(self, texts: list[str]) -> np.ndarray:
        """Return the concatenated tokens of documents, each followed by eos and, with ``add_bos``, preceded by bos.

        Raises:
            UserError: The tokenizer returned an id that is not below the vocabulary size.
        """
        tokenizer = self.tokenizer
        before, after = (np.array(ids, dtype=np.int32) for ids in tokens_around(self.job, tokenizer))
        parts = [part for ids in tokenizer.encode(texts) for part in (before, np.asarray(ids, dtype=np.int32), after)]
        tokens = np.concatenate(parts)
        if int(tokens.max()) >= tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer {tokenizer.name} gives token {int(tokens.max())}: allowed are ids below --vocab-size "
                f"{tokenizer.vocab_size}"
            )
        return tokens.astype(tokenizer.dtype)


def why_skipped(text: str, tokenizer: Tokenizer) -> str | None:
    """Return the reason of SKIPPED why a token stream cannot represent a document; None if it can."""
    if not text:
        return EMPTY
    return NUL if tokenizer.library is None and chr(END_OF_DOCUMENT) in text else None


def digest_of(text: str) -> bytes:
    """Return the digest of a document. Equal documents have the same digest."""
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


def key_of(digest: bytes) -> int:
    """Return the key of a document, below KEYS. A document is held out if its key is below a limit."""
    return int.from_bytes(digest[:8], "big")


def tokens_around(job: TextJob, tokenizer: Tokenizer) -> tuple[list[int | None], list[int | None]]:
    """Return the tokens before and after every document: bos, if the job adds it, and eos."""
    return [tokenizer.bos_id] if job.add_bos else [], [tokenizer.eos_id]


def downloads_folder(building: Path) -> Path:
    """Return the folder of the files of a data set of the hub, which is deleted when the data set is whole."""
    return building / "hub"


def noting(bad: list[Bad], job: TextJob, building: Path) -> Report:
    """Return a function that adds bad rows and files to ``bad``, and raises UserError if ``job`` forbids them.

    It names a downloaded file by its place on the hub, because the local copy will be deleted.
    """
    downloads = f"{downloads_folder(building)}/"

    def note(item: Bad) -> None:
        if item.where.startswith(downloads):
            item = dataclasses.replace(item, where=f"{job.sources[0]}/{item.where.removeprefix(downloads)}")
        bad.append(item)
        if not (job.skip_unreadable if item.is_file else job.skip_bad):
            refuse(item)
        check_number([str(item) for item in bad if not item.is_file], job.skip_bad)

    return note


def check_number(bad: Sequence[str], allowed: int) -> None:
    """Raise UserError if there are more rows without text than the user allows to leave out."""
    if len(bad) > allowed:
        raise UserError(
            f"{len(bad)} rows or more hold no text, and --skip-bad allows {allowed}: raise it, or correct them; the "
            f"last is {bad[-1]}"
        )


def digests_path(building: Path, key: str) -> Path:
    """Return the path of the file that holds the digests of a validation unit's documents."""
    return building / "digests" / key
