"""prepare: text -> packed tokens and a manifest. `dlm prepare` and the first run on data=stdlib call it; no torch.

A data set is built in a folder beside its place and renamed into it, so a half-made one is never taken for whole.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlm import locate
from dlm.datamodules.packed import encode_packed, open_packed
from dlm.errors import ExitCode, UserError
from dlm.files import write_atomic
from dlm.manifest import MANIFEST, Manifest, PackedFile, read_manifest, write_manifest

END_OF_DOCUMENT = 0  # NUL: ends every document; no source file holds one
VALIDATION_SHARE = 20  # one document in twenty, chosen by the hash of its name
FILE_TOKENS = 8 * 1024 * 1024


def stdlib_documents(root: Path) -> Iterator[tuple[str, bytes]]:
    """(name, text) of every source file of the standard library, in order of names."""
    skip = {"site-packages", "dist-packages", "__pycache__"}
    paths = [path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts)]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        text = path.read_bytes()
        if text and END_OF_DOCUMENT not in text:
            yield path.relative_to(root).as_posix(), text


def prepare_stdlib(data_dir: Path) -> Manifest:
    """Prepare the Python standard library's sources, bytes as tokens; documents of the two splits are disjoint."""
    root = Path(sysconfig.get_paths()["stdlib"])
    streams: dict[str, list[bytes]] = {"train": [], "validation": []}
    seen: set[bytes] = set()
    for name, text in stdlib_documents(root):
        digest = hashlib.sha256(text).digest()
        if digest in seen:  # a copy in the other split would leak
            continue
        seen.add(digest)
        held_out = hashlib.sha256(name.encode()).digest()[0] % VALIDATION_SHARE == 0
        streams["validation" if held_out else "train"].append(text + bytes([END_OF_DOCUMENT]))
    if not streams["train"] or not streams["validation"]:
        raise UserError(
            f"no Python sources under {root}: data=stdlib needs a Python with its standard library's .py files"
        )
    tokens = {split: np.frombuffer(b"".join(parts), dtype=np.uint8) for split, parts in streams.items()}
    version = ".".join(map(str, sys.version_info[:3]))
    return _write_data_set(
        data_dir,
        tokens,
        name="stdlib",
        tokenizer="bytes",
        vocab_size=256,
        notes={"python": version, "documents": len(seen)},
    )


def _write_data_set(
    data_dir: Path,
    tokens: dict[str, np.ndarray],
    *,
    name: str,
    tokenizer: str,
    vocab_size: int,
    notes: dict[str, object],
) -> Manifest:
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=data_dir.parent, prefix=f".{data_dir.name}-"))
    try:
        splits = {split: tuple(_write_files(building, split, name, stream)) for split, stream in tokens.items()}
        manifest = Manifest(
            name=name, tokenizer=tokenizer, vocab_size=vocab_size, bos_id=END_OF_DOCUMENT, splits=splits, notes=notes
        )
        write_manifest(building, manifest)
        _move_into_place(building, data_dir)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _move_into_place(building: Path, data_dir: Path) -> None:
    """Rename; the same data that are there already stay, and nothing but this data set, whole or not, is replaced."""
    building.chmod(0o755)
    made = read_whole(building)
    if data_dir.is_dir() and not any(data_dir.iterdir()):
        data_dir.rmdir()
    if data_dir.is_dir() and _is_whole(data_dir, made):
        return
    if data_dir.is_dir() and all(_of_data_set(path.name, made.name) for path in data_dir.iterdir()):
        old = Path(tempfile.mkdtemp(dir=data_dir.parent, prefix=f".{data_dir.name}-old-"))
        os.rename(data_dir, old / data_dir.name)
        os.rename(building, data_dir)
        shutil.rmtree(old)
    elif data_dir.exists():
        raise UserError(f"{data_dir} exists and holds something else: move it away or choose another folder")
    else:
        os.rename(building, data_dir)


def _is_whole(data_dir: Path, made: Manifest) -> bool:
    """Whether ``data_dir`` holds what was made, undamaged."""
    try:
        there = read_manifest(data_dir)
    except UserError:  # damaged: it is about to be made anew
        return False
    return there is not None and there.hash == made.hash


def _of_data_set(file: str, name: str) -> bool:
    return file == MANIFEST or fnmatch.fnmatchcase(file, f"*_{name}_0_*.bin")


def read_whole(data_dir: Path) -> Manifest:
    """The manifest of data that were just written."""
    manifest = read_manifest(data_dir)
    assert manifest is not None
    return manifest


def _write_files(folder: Path, split: str, name: str, stream: np.ndarray) -> Iterator[PackedFile]:
    for counter, start in enumerate(range(0, len(stream), FILE_TOKENS)):
        part = stream[start : start + FILE_TOKENS]
        path = folder / f"{split}_{name}_0_{counter:010d}.bin"
        data = encode_packed(part)
        write_atomic(path, data)
        yield PackedFile(name=path.name, tokens=len(part), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def index_packed(data_dir: Path, *, vocab_size: int, bos_id: int, tokenizer: str) -> Manifest:
    """Write the manifest of a folder of LITPKDS files made elsewhere: train*.bin and validation*.bin."""
    splits = {}
    for split in ("train", "validation"):
        paths = sorted(data_dir.glob(f"{split}*.bin"))
        if not paths:
            raise UserError(f"{data_dir} holds no {split}*.bin: give the folder of the packed files")
        splits[split] = tuple(_describe(path, vocab_size) for path in paths)
    manifest = Manifest(name=data_dir.name, tokenizer=tokenizer, vocab_size=vocab_size, bos_id=bos_id, splits=splits)
    write_manifest(data_dir, manifest)
    return manifest


def _describe(path: Path, vocab_size: int) -> PackedFile:
    tokens = open_packed(path)
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise UserError(f"{path} holds token {int(tokens.max())}: allowed are ids below --vocab-size {vocab_size}")
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return PackedFile(name=path.name, tokens=len(tokens), bytes=path.stat().st_size, sha256=digest)


def ensure_prepared(data_dir: Path, prepare: str | None) -> Manifest:
    """The manifest of ``data_dir``; where there is none, ``prepare: stdlib`` makes it, otherwise a UserError."""
    manifest = read_manifest(data_dir)
    if manifest is not None:
        return manifest
    if prepare == "stdlib":
        return prepare_stdlib(data_dir)
    raise UserError(
        f"no prepared data in {data_dir}: run `dlm prepare packed {data_dir}` on a folder of LITPKDS files, "
        "or change data.data_dir"
    )


def main(argv: list[str] | None = None) -> int:
    """`dlm prepare`: prepare a data set and say what it holds."""
    parser = argparse.ArgumentParser(prog="dlm prepare", description="Text to packed tokens and a manifest.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{stdlib,packed}")
    stdlib = kinds.add_parser("stdlib", help="the Python standard library's sources, bytes as tokens")
    stdlib.add_argument("data_dir", nargs="?", type=Path, default=None, help="default: DLM_DATA/stdlib")
    packed = kinds.add_parser("packed", help="index a folder of LITPKDS files (TinyLlama, SMDM)")
    packed.add_argument("data_dir", type=Path)
    packed.add_argument("--vocab-size", type=int, default=32000)
    packed.add_argument("--bos-id", type=int, default=1, help="the id that stands before a text (Llama-2: 1)")
    packed.add_argument("--tokenizer", default="llama-2", help="its name, for the record")
    options = parser.parse_args(argv)
    try:
        if options.kind == "stdlib":
            data_dir = options.data_dir or locate.data_dir() / "stdlib"
            manifest = prepare_stdlib(data_dir)
        else:
            data_dir = options.data_dir
            manifest = index_packed(
                data_dir, vocab_size=options.vocab_size, bos_id=options.bos_id, tokenizer=options.tokenizer
            )
    except UserError as error:
        print(f"dlm: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    counts = ", ".join(f"{manifest.tokens(split):,} {split}" for split in manifest.splits)
    print(f"{data_dir}: {counts} tokens, vocabulary {manifest.vocab_size}, hash {manifest.hash}")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
