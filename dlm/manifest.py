"""manifest: what a prepared data set is. Written by datamodules.prepare, read by plan, submit and training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.errors import UserError
from dlm.files import read_json, write_json
from dlm.identity import content_hash

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """One LITPKDS file."""

    name: str
    tokens: int
    bytes: int  # of the whole file, header included: a truncated file is seen without reading it
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared data set: its vocabulary and, per split, its files in order."""

    name: str
    tokenizer: str
    vocab_size: int
    bos_id: int  # what the autoregressive model reads before the first token
    splits: Mapping[str, tuple[PackedFile, ...]]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # where it came from; not hashed

    def tokens(self, split: str) -> int:
        """Tokens in one split."""
        return sum(file.tokens for file in self.splits[split])

    @property
    def hash(self) -> str:
        """The hash of what the files hold; 16 hex digits. Names and notes do not enter."""
        splits = {split: [[file.tokens, file.sha256] for file in files] for split, files in self.splits.items()}
        return content_hash({"vocab_size": self.vocab_size, "bos_id": self.bos_id, "splits": splits})[:16]


def write_manifest(data_dir: Path, manifest: Manifest) -> None:
    """Write ``data_dir/manifest.json``; the last step of preparing, so its presence means complete."""
    write_json(data_dir / MANIFEST, {**dataclasses.asdict(manifest), "hash": manifest.hash})


def read_manifest(data_dir: Path) -> Manifest | None:
    """The manifest of ``data_dir``, or None when the data are not prepared.

    Raises UserError when the manifest is damaged, or a file is missing or has another size.
    """
    path = data_dir / MANIFEST
    if data_dir.is_file():
        raise UserError(
            f"{data_dir} is a file where a folder of prepared data belongs: move it away or change DLM_DATA"
        )
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        stated = content.pop("hash")
        splits = {split: tuple(PackedFile(**file) for file in files) for split, files in content.pop("splits").items()}
        manifest = Manifest(splits=splits, **content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no manifest ({error}): prepare the data again with dlm prepare") from error
    if manifest.hash != stated:
        raise UserError(f"{path} does not match its own hash: prepare the data again with dlm prepare")
    for files in manifest.splits.values():
        for file in files:
            _check_size(data_dir / file.name, file.bytes)
    return manifest


def _check_size(path: Path, expected_bytes: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: prepare the data again with dlm prepare")
    if path.stat().st_size != expected_bytes:
        raise UserError(
            f"{path} holds {path.stat().st_size} bytes where its manifest says {expected_bytes}: "
            "it is truncated or replaced, prepare the data again with dlm prepare"
        )
