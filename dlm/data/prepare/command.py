"""The command `dlm prepare`: text or packed files -> a data set with a manifest.

It has three kinds: text (your own text), stdlib (the Python sources that exist on every machine) and packed (files that
another program made). The first run with data=stdlib prepares that data set by ``ensure_data``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlm.core import paths
from dlm.core.checks import whole
from dlm.core.errors import ExitCode, TryAgainError, UserError
from dlm.core.files import check_writable, complaint
from dlm.core.identity import SWEEP_NAME, SWEEP_NAME_WORDS
from dlm.data.manifest import DataSet, Manifest, PackedFile, read_data, unprepared, write_manifest
from dlm.data.packed import write_packed
from dlm.data.prepare.bad import MAX_DOCUMENT
from dlm.data.prepare.build import prepare_text
from dlm.data.prepare.encode import TextJob
from dlm.data.prepare.hub import parse_tokens
from dlm.data.prepare.index import PACKED_GLOBS, index_in_words, index_packed
from dlm.data.prepare.kinds import FORMATS
from dlm.data.prepare.place import move_into_place
from dlm.data.prepare.summary import in_words
from dlm.data.prepare.tokenizer import END_OF_DOCUMENT

VALIDATION_SHARE = 20  # one in twenty files of the standard library is held out, by the hash of its name


FILE_TOKENS = 8 * 1024 * 1024


TEXT_HELP = (
    f"Sources are {', '.join(FORMATS)} files, folders of them, folders written by datasets.save_to_disk, and a data "
    "set of the Hugging Face hub, hf://OWNER/NAME. Folders or files named train and validation are the splits; "
    "otherwise each document's hash decides which are held out. What is not read is counted, with the reason. If the "
    "command is stopped, the same command continues where it stopped."
)


def stdlib_documents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, text) of every source file of the standard library below ``root``, sorted by name."""
    skip = {"site-packages", "dist-packages", "__pycache__"}
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if skip.isdisjoint(name.split("/")):
            text = (root / name).read_bytes()
            if text and END_OF_DOCUMENT not in text:
                yield name, text


def prepare_stdlib(data_dir: Path) -> Manifest:
    """Prepare the sources of the Python standard library, one token per byte. The two splits share no document."""
    check_writable(data_dir.parent)
    root = Path(sysconfig.get_paths()["stdlib"])
    streams: dict[str, list[bytes]] = {"train": [], "validation": []}
    seen: set[bytes] = set()
    for name, text in stdlib_documents(root):
        digest = hashlib.sha256(text).digest()
        if digest in seen:  # a copy of this file may be in the other split
            continue
        seen.add(digest)
        held_out = hashlib.sha256(name.encode()).digest()[0] % VALIDATION_SHARE == 0
        streams["validation" if held_out else "train"].append(text + bytes([END_OF_DOCUMENT]))
    if not streams["train"] or not streams["validation"]:
        raise UserError(
            f"no Python sources under {root}: data=stdlib needs a Python with its standard library's .py files"
        )
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir.parent, prefix=f".{data_dir.name}-") as folder:
        building = Path(folder) / "data"
        building.mkdir()
        manifest = Manifest(
            name="stdlib",
            tokenizer="bytes",
            vocab_size=256,
            bos_id=END_OF_DOCUMENT,
            splits={split: tuple(_write_files(building, split, b"".join(parts))) for split, parts in streams.items()},
            notes={"python": ".".join(map(str, sys.version_info[:3])), "documents": len(seen)},
        )
        write_manifest(building, manifest)
        move_into_place(building, data_dir, manifest)
    return manifest


def _write_files(folder: Path, split: str, text: bytes) -> Iterator[PackedFile]:
    tokens = np.frombuffer(text, dtype=np.uint8)
    for counter, start in enumerate(range(0, len(tokens), FILE_TOKENS)):
        yield write_packed(folder / f"{split}_stdlib_0_{counter:010d}.bin", tokens[start : start + FILE_TOKENS])


def ensure_data(data: Mapping[str, Any]) -> DataSet:
    """Return the data set of a resolved ``data`` node. With ``prepare: stdlib``, prepare it if necessary.

    Raises:
        UserError: The data are not prepared and cannot be prepared automatically.
    """
    if data.get("prepare") == "stdlib" and unprepared(data):
        prepare_stdlib(Path(data["data_dir"]))
    found = read_data(data)
    if found is None:
        folder = unprepared(data)[0]
        on = f"hf://{data['hub']} or on your own text" if data.get("hub") else "text"
        raise UserError(
            f"no prepared data in {folder}: run `dlm prepare text SOURCE --out {folder}` on {on}, or `dlm prepare "
            f"packed {folder}` on a folder of LITPKDS files, or change data.data_dir"
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dlm prepare", description="Text to packed tokens and a manifest.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{text,stdlib,packed}")
    text = kinds.add_parser("text", help="your own text, tokenized", description=TEXT_HELP)
    text.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="files or folders of text, or a data set hf://OWNER/NAME[@REVISION]",
    )
    text.add_argument("--out", type=Path, required=True, help="the folder to make")
    text.add_argument("--tokenizer", required=True, help="bytes; a tokenizer.json; a .model; a folder with one of them")
    text.add_argument("--name", help="in the names of the files; default: that of the folder")
    text.add_argument("--text-key", default="text", help="the key or column of the text (default: text)")
    text.add_argument("--tokens", help="of hf://, only as many training tokens: 25e9, 25B (default: all)")
    text.add_argument("--config", help="of hf://, the config of the data set (default: its only one, or its default)")
    held_out = text.add_mutually_exclusive_group()
    held_out.add_argument("--validation-share", type=float, default=0.005, help="of the documents (default: 0.005)")
    held_out.add_argument(
        "--validation-source",
        dest="validation_sources",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files to hold out",
    )
    many: dict[str, Any] = {"action": "append", "default": [], "metavar": "GLOB"}
    text.add_argument(
        "--train", dest="train_globs", help="the files to train on, such as 'web*'; may be repeated", **many
    )
    held_out.add_argument(
        "--validation", dest="validation_globs", help="the files to hold out; may be repeated", **many
    )
    text.add_argument(
        "--max-document",
        type=int,
        default=MAX_DOCUMENT,
        metavar="MIB",
        help=f"the most that one row, or one text file, may hold; by default {MAX_DOCUMENT} MiB",
    )
    text.add_argument(
        "--skip-bad", type=int, default=0, metavar="N", help="leave out up to N rows without text, and list them"
    )
    text.add_argument(
        "--skip-unreadable", action="store_true", help="leave out files that look like data but cannot be read"
    )
    text.add_argument("--vocab-size", type=int, help="default: the tokenizer's")
    text.add_argument("--eos-id", type=int, help="the id after every document; default: the tokenizer's")
    text.add_argument("--bos-id", type=int, help="the id that stands before a text; default: the tokenizer's")
    text.add_argument("--add-bos", action="store_true", help="write the bos id in front of every document")
    text.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    stdlib = kinds.add_parser("stdlib", help="the Python standard library's sources, bytes as tokens")
    stdlib.add_argument("data_dir", nargs="?", type=Path, default=None, help="default: DLM_DATA/stdlib")
    packed = kinds.add_parser("packed", help="index a folder of LITPKDS files (TinyLlama, SMDM)")
    packed.add_argument("data_dir", type=Path)
    packed.add_argument("--vocab-size", type=int, default=32000)
    packed.add_argument("--bos-id", type=int, default=1, help="the id that stands before a text (Llama-2: 1)")
    packed.add_argument("--tokenizer", default="llama-2", help="its name, for the record")
    for split, pattern in PACKED_GLOBS.items():
        packed.add_argument(f"--{split}", default=pattern, metavar="GLOB", help=f"default: {pattern}")
    packed.add_argument(
        "--strip-filling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out the run of one token with which TinyLlama's and SMDM's builders fill up a file (default: yes)",
    )
    packed.add_argument("--skip-unreadable", action="store_true", help="leave out files that are truncated or empty")
    packed.add_argument("--out", type=Path, help="where to write the manifest, if only some of the files belong to it")
    return parser


def _prepare(options: argparse.Namespace) -> tuple[Path, Manifest]:
    if options.kind == "stdlib":
        data_dir = options.data_dir or paths.data_dir() / "stdlib"
        return data_dir, prepare_stdlib(data_dir)
    check_writable(options.data_dir if options.kind == "packed" and options.out is None else options.out)
    if options.kind == "packed":
        globs = {split: getattr(options, split) for split in PACKED_GLOBS}
        names = ("vocab_size", "bos_id", "tokenizer", "out", "strip_filling", "skip_unreadable")
        given = {key: getattr(options, key) for key in names}
        return options.out or options.data_dir, index_packed(options.data_dir, globs=globs, **given)
    return options.out, prepare_text(_job(options), options.out, workers=whole("--workers", options.workers))


def _job(options: argparse.Namespace) -> TextJob:
    if not 0 < options.validation_share < 1:
        raise UserError(f"--validation-share is {options.validation_share:g}: it must lie between 0 and 1")
    if options.train_globs and options.validation_sources:
        raise UserError("--train and --validation-source both divide the files: give --validation with --train")
    whole("--max-document", options.max_document)
    if options.skip_bad < 0:
        raise UserError(f"--skip-bad is {options.skip_bad}: it must be 0 or above")
    name = options.name or options.out.name
    if not re.fullmatch(SWEEP_NAME, name):
        raise UserError(f"--name is {name!r}: {SWEEP_NAME_WORDS}")
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(TextJob)}
    sources = {key: tuple(given[key]) for key in ("sources", "validation_sources", "train_globs", "validation_globs")}
    tokens = None if options.tokens is None else parse_tokens(options.tokens)
    return TextJob(**{**given, **sources, "name": name, "tokens": tokens})


def main(arguments: Sequence[str]) -> int:
    """Run `dlm prepare`: prepare a data set and print a summary of it.

    Args:
        arguments: The words after ``dlm prepare``.

    Returns:
        The exit code. User errors and Ctrl-C raise no exception; they print one line to stderr.
    """
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed the help (0) or the error in the arguments (2)
        return int(stop.code or 0)
    try:
        data_dir, manifest = _prepare(options)
    except (UserError, OSError) as error:
        line = complaint(error)
        if line is None:
            raise
        print(f"dlm: {line}", file=sys.stderr)
        return ExitCode.PREEMPTED if isinstance(error, TryAgainError) else ExitCode.USER_ERROR
    except KeyboardInterrupt:
        print("stopped; the same command continues where it stopped", file=sys.stderr)
        return ExitCode.INTERRUPTED
    tell = {"text": in_words, "packed": index_in_words}.get(options.kind)
    for line in tell(manifest.notes) if tell else ():
        print(line.encode(errors="backslashreplace").decode())  # a name of a file may be no text
    counts = ", ".join(f"{manifest.tokens(split):,} {split}" for split in manifest.splits)
    print(f"{data_dir}: {counts} tokens, vocabulary {manifest.vocab_size}, hash {manifest.hash}")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
