"""Index packed files that another program made: check them and write their manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlm.core.errors import UserError
from dlm.data.manifest import MANIFEST, Manifest, PackedFile, write_manifest
from dlm.data.packed import chunk_tokens, open_packed

PACKED_GLOBS = {"train": "train*.bin", "validation": "validation*.bin"}
BLOCK_TOKENS = 2048  # of a sequence of TinyLlama and SMDM; a longer run of one token is no text
SCAN_TOKENS = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs of one token in a file that are longer than a sequence."""

    at_end: int  # tokens of the run at the end; 0 if there is none
    within: int  # tokens of all other runs


def index_packed(
    data_dir: Path,
    *,
    vocab_size: int,
    bos_id: int,
    tokenizer: str,
    globs: Mapping[str, str] = PACKED_GLOBS,
    out: Path | None = None,
    strip_filling: bool = True,
    skip_unreadable: bool = False,
) -> Manifest:
    """Write the manifest of LITPKDS files that another program made.

    Args:
        data_dir: The folder of the files.
        vocab_size: The vocabulary size; every token must be below it.
        bos_id: The token that the autoregressive model reads before a sequence.
        tokenizer: The name of the tokenizer, which is only recorded.
        globs: Split -> glob pattern of its files in ``data_dir``.
        out: The folder for the manifest. The files stay where they are, so the files of one folder can belong to
            several data sets. None: ``data_dir``.
        strip_filling: Leave out the run of one token with which a builder fills up the last chunk of a file, except its
            first token, which ends the last document.
        skip_unreadable: Leave out files that are truncated or empty.

    Returns:
        The manifest.

    Raises:
        UserError: A split has no files or no tokens, a file is truncated or empty, a token is not in the vocabulary, or
            ``out`` holds prepared data already.
    """
    out = out or data_dir
    splits: dict[str, tuple[PackedFile, ...]] = {}
    notes: dict[str, Any] = {"filling": {}, "runs_within": {}, "unreadable": []}
    for split, pattern in globs.items():
        paths = sorted(data_dir.glob(pattern))
        if not paths:
            raise UserError(f"{data_dir} holds no {pattern}: give the folder of the packed files, or set --{split}")
        whole = [path for path in paths if _is_whole(path, skip_unreadable, notes["unreadable"])]
        splits[split] = tuple(_describe(path, vocab_size, out, strip_filling, notes) for path in whole)
        if not any(file.tokens for file in splits[split]):
            raise UserError(f"the {pattern} of {data_dir} hold no tokens: set --{split} to files that do")
    notes["copies"] = _copies([*splits["validation"], *splits["train"]])
    used = {path for pattern in globs.values() for path in data_dir.glob(pattern)}
    notes["passed_over"] = sorted(path.name for path in data_dir.glob("*.bin") if path not in used)
    manifest = Manifest(
        name=out.name, tokenizer=tokenizer, vocab_size=vocab_size, bos_id=bos_id, splits=splits, notes=notes
    )
    if out != data_dir and (out / MANIFEST).exists():
        raise UserError(f"{out} holds prepared data already: choose another --out or move it away")
    write_manifest(out, manifest)
    return manifest


def _copies(files: Sequence[PackedFile]) -> list[str]:
    """Return the names of the files that hold the same bytes as an earlier one."""
    seen: set[str] = set()
    copies = []
    for file in files:
        if file.sha256 in seen:
            copies.append(file.name)
        seen.add(file.sha256)
    return copies


def _is_whole(path: Path, skip_unreadable: bool, unreadable: list[str]) -> bool:
    """Return whether a file has all its tokens. One that has not is an error, or is noted in ``unreadable``."""
    try:
        count, stated = len(open_packed(path)), chunk_tokens(path)
        if not count:
            raise UserError(f"{path} holds no tokens: copy it again, or go on without it with --skip-unreadable")
        if count % max(stated, 1):
            raise UserError(
                f"{path} is truncated, it holds {count:,} tokens and its header says {stated:,}: copy it again, or go "
                "on without it with --skip-unreadable"
            )
    except UserError as error:
        if not skip_unreadable:
            raise
        unreadable.append(str(error))
        return False
    return True


def _describe(path: Path, vocab_size: int, out: Path, strip_filling: bool, notes: dict[str, Any]) -> PackedFile:
    tokens = open_packed(path)
    for token in (int(tokens.max()), int(tokens.min())):
        if not 0 <= token < vocab_size:
            raise UserError(f"{path} holds token {token}: allowed are ids below --vocab-size {vocab_size}")
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    name, num_tokens, runs = os.path.relpath(path.resolve(), out.resolve()), len(tokens), long_runs(tokens)
    if runs.within:
        notes["runs_within"][name] = runs.within
    if runs.at_end:
        filling = runs.at_end - 1
        notes["filling"][name] = {"tokens": filling, "left_out": strip_filling}
        num_tokens -= filling if strip_filling else 0
    return PackedFile(name=name, tokens=num_tokens, bytes=path.stat().st_size, sha256=digest)


def long_runs(tokens: np.ndarray) -> Runs:
    """Count the tokens (N,) in runs of one token that are longer than BLOCK_TOKENS."""
    starts = [np.zeros(1, dtype=np.int64)]
    for begin in range(1, len(tokens), SCAN_TOKENS):
        part = tokens[begin - 1 : begin + SCAN_TOKENS]
        starts.append(np.flatnonzero(part[1:] != part[:-1]) + begin)
    lengths = np.diff(np.concatenate([*starts, [len(tokens)]]))
    lengths = np.where(lengths > BLOCK_TOKENS, lengths, 0)
    return Runs(at_end=int(lengths[-1]), within=int(lengths[:-1].sum()))


def index_in_words(notes: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that tell a user what of the packed files is not text or was not used."""
    for line in notes["unreadable"]:
        yield f"left out: {line}"
    for name, filling in notes["filling"].items():
        what = "left out" if filling["left_out"] else "kept, because of --no-strip-filling"
        yield f"{name} ends in {filling['tokens']:,} times the same token, with which its builder filled it up: {what}"
    for name, count in notes["runs_within"].items():
        yield f"{name} holds {count:,} tokens in runs of one token that are longer than {BLOCK_TOKENS:,}: they are kept"
    for name in notes["copies"]:
        yield f"{name} holds the same bytes as another file: both are kept"
    if notes["passed_over"]:
        names = notes["passed_over"]
        yield f"passed over {len(names)} .bin files that no pattern names, such as {names[0]}"
