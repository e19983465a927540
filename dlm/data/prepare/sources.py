"""Find the files below the sources: which hold documents, and which are passed over for which reason.

No file is left out in silence. A file that looks like data and cannot be read is an error, unless the user says to go
on without such files.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlm.core.errors import UserError
from dlm.core.files import read_json
from dlm.core.names import inside
from dlm.core.text import counted
from dlm.data.manifest import MANIFEST
from dlm.data.prepare.kinds import FORMATS, belied, looks_like_data, suffix_of

STATE = "state.json"  # a file in every folder that datasets.save_to_disk writes

# Names of files that describe data. Those in DESCRIPTIONS_IN_TEXT do so only as text, as JSON or with a suffix that dlm
# does not read: README.txt holds no documents, README.jsonl does.
DESCRIPTIONS = ("*sums", "*sums.txt", "*.md5", "*.sha1", "*.sha256", "*.sha512", "*.crc", "_success")
DESCRIPTIONS_IN_TEXT = (
    "readme*", "license*", "licence*", "copying*", "notice*", "citation*", "checksum*", STATE, "dataset_info*",
    "dataset_dict*", "manifest.json", "index.json", "config.json", "metadata.json", "tokenizer*.json",
    "special_tokens_map.json", "vocab.json",
)  # fmt: skip

# The reasons for which files are passed over.
HIDDEN = "hidden"
DESCRIBES = "no documents, by their names"
OTHER_KIND = "of a kind that dlm does not read"
SAME_FILE = "reached already by another path"
COPY = "copies of other files"
CACHE = "cache files, which state.json does not list"
NO_FILE = "no regular files"
PREPARED = "prepared data of dlm"
UNREADABLE = "unreadable"

_SHARD = re.compile(r"(?P<before>.*?)(?P<number>\d+)-of-(?P<count>\d+)(?P<after>.*)")
START_BYTES = 65536  # of files of one size, only those that begin with the same bytes are read to compare them


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that holds documents."""

    path: Path
    source: Path  # the source in which it was found
    parts: tuple[str, ...]  # the name of the source, the folders in it and the name of the file
    size: int  # bytes


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """A file or folder that is not read."""

    path: str
    reason: str  # one of the above, or that of a split
    size: int = 0  # bytes
    detail: str = ""  # what is wrong with a file that cannot be read


@dataclass(kw_only=True)
class Found:
    """What is below the sources."""

    files: list[SourceFile] = field(default_factory=list)
    passed_over: list[PassedOver] = field(default_factory=list)

    def problem(self, path: Path, detail: str) -> None:
        """Note something that looks like data and cannot be read."""
        size = path.lstat().st_size if os.path.lexists(path) else 0
        self.passed_over.append(PassedOver(path=str(path), reason=UNREADABLE, size=size, detail=detail))

    def leave_out(self, reasons: Mapping[Path, str]) -> None:
        """Pass over files, each for a reason."""
        self.passed_over += [
            PassedOver(path=str(file.path), reason=reasons[file.path], size=file.size)
            for file in self.files
            if file.path in reasons
        ]
        self.files = [file for file in self.files if file.path not in reasons]


def find(sources: Sequence[Path], *, skip_unreadable: bool = False) -> Found:
    """Find the files of ``sources``, in the order of the sources and by path within each.

    Links are followed. A file or folder that is reached twice is read once, and of several files with the same bytes
    only the first is read.

    Args:
        sources: Files and folders. A file that is named itself is read even if its name says that it describes data.
        skip_unreadable: Pass over what looks like data and cannot be read.

    Raises:
        UserError: A source does not exist or holds no documents, or something that looks like data cannot be read.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    for source in sources:
        here = Found()
        if not source.exists():
            raise UserError(f"{source} does not exist: give a file or folder of text")
        if source.is_file():
            if suffix_of(source) is None:
                kinds = ", ".join(FORMATS)
                raise UserError(f"{source} is of a kind that dlm does not read: give a folder, or one of {kinds}")
            _take(here, source, source, seen)
        else:
            _take_folder(here, source, seen)
        if not skip_unreadable:
            _refuse([item for item in here.passed_over if item.reason == UNREADABLE])
        found.files += here.files
        found.passed_over += here.passed_over
        if not here.files and not any(item.reason == SAME_FILE for item in here.passed_over):
            raise UserError(f"{source} holds no documents: {_why_none(here)}")
    return found


def _refuse(problems: Sequence[PassedOver]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more of the kind)" if problems[1:] else ""
        raise UserError(
            f"{problems[0].path} {problems[0].detail}{more}: copy it again, convert or rename it, move it away, or go "
            "on without it with --skip-unreadable"
        )


def _why_none(found: Found) -> str:
    reasons = sorted({item.reason for item in found.passed_over})
    passed = (
        f"passed over {counted(len(found.passed_over), 'file')} ({', '.join(reasons)})" if reasons else "it is empty"
    )
    return f"{passed}; dlm reads {', '.join(FORMATS)}"


def _take_folder(found: Found, source: Path, seen: set[tuple[int, int]]) -> None:
    """Add the files below a folder. Those that are in it come before those that it only links to."""
    entries = list(_walk(found, source, seen))
    listed = _saved_files(found, [path for path, _ in entries if path.name == STATE])
    saved = {path.parent for path in listed}
    for path, _ in sorted(entries, key=lambda entry: (entry[1], entry[0].relative_to(source).as_posix())):
        reason = _reason(path, source, listed, saved)
        if reason is None:
            _take(found, path, source, seen)
        elif reason == UNREADABLE:
            found.problem(path, f"is {OTHER_KIND}")
        else:
            found.passed_over.append(PassedOver(path=str(path), reason=reason, size=path.stat().st_size))
    found.files.sort(key=lambda file: file.path.relative_to(source).as_posix())
    _check_shards(found)


def _walk(found: Found, folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, bool]]:
    """Yield (file, whether a link leads to it). Linked folders come last, and each folder is entered once."""
    linked: list[Path] = []
    todo = [(folder, False)]
    while todo or linked:
        here, by_link = todo.pop() if todo else (linked.pop(0), True)
        status = here.stat()
        if _is_known(status, seen):
            found.passed_over.append(PassedOver(path=str(here), reason=SAME_FILE))
            continue
        if here != folder and (here / MANIFEST).is_file() and any(here.glob("*.bin")):
            found.passed_over.append(PassedOver(path=str(here), reason=PREPARED))
            continue
        try:
            names = sorted(os.listdir(here))
        except OSError as error:
            found.problem(here, f"cannot be read ({error.strerror})")
            continue
        for path in (here / name for name in names):
            if path.name.startswith("."):
                found.passed_over += _hidden(path)
                continue
            try:
                mode = path.stat().st_mode
            except OSError as error:
                found.problem(path, f"is a link that leads nowhere ({error.strerror})")
                continue
            is_link = by_link or path.is_symlink()
            if stat.S_ISDIR(mode):
                linked.append(path) if path.is_symlink() else todo.append((path, by_link))
            elif stat.S_ISREG(mode):
                yield path, is_link
            else:
                found.passed_over.append(PassedOver(path=str(path), reason=NO_FILE))


def _is_known(status: os.stat_result, seen: set[tuple[int, int]]) -> bool:
    """Return whether a file or folder was reached before, and note that it is reached now."""
    identity = (status.st_dev, status.st_ino)
    known = identity in seen
    seen.add(identity)
    return known


def _hidden(path: Path) -> Iterator[PassedOver]:
    """Yield a hidden file, or all files in a hidden folder."""
    files = [path]
    if path.is_dir() and not path.is_symlink():
        files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    for file in files:
        yield PassedOver(path=str(file), reason=HIDDEN, size=file.lstat().st_size)


def _reason(path: Path, source: Path, listed: set[Path], saved: set[Path]) -> str | None:
    """Return why a file is not read, or None if it is."""
    name, suffix = path.name.lower(), suffix_of(path)
    is_text = suffix is None or suffix.startswith((".txt", ".json.")) or suffix == ".json"
    patterns = (*DESCRIPTIONS, *(DESCRIPTIONS_IN_TEXT if is_text else ()))
    if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
        return DESCRIBES
    if path.parent in saved and suffix == ".arrow" and path not in listed:
        return CACHE
    if suffix is None:
        return UNREADABLE if looks_like_data(path) else OTHER_KIND
    return None


def _take(found: Found, path: Path, source: Path, seen: set[tuple[int, int]]) -> None:
    """Add a file, unless it was added under another name or its content is not what its name says."""
    status = path.stat()
    if _is_known(status, seen):
        found.passed_over.append(PassedOver(path=str(path), reason=SAME_FILE))
        return
    try:
        words = belied(path)
    except OSError as error:
        found.problem(path, f"cannot be read ({error.strerror})")
        return
    if words is not None:
        found.problem(path, f"is {words}")
        return
    parts = (source.name, *path.relative_to(source).parts) if path != source else (source.parent.name, source.name)
    found.files.append(SourceFile(path=path, source=source, parts=parts, size=status.st_size))


def _saved_files(found: Found, states: Sequence[Path]) -> set[Path]:
    """Return the Arrow files that the state.json files of datasets.save_to_disk list. Missing ones are problems."""
    listed: set[Path] = set()
    for state in states:
        content = read_json(state)
        items = content.get("_data_files") if isinstance(content, dict) else None
        if not isinstance(items, list) or not all(
            isinstance(item, dict) and isinstance(item.get("filename"), str) for item in items
        ):
            continue
        if content.get("_indices_data_files"):
            raise UserError(
                f"{state.parent} keeps its rows in another order than its files: call flatten_indices() and save it "
                "again"
            )
        for path in (inside(state.parent, *item["filename"].split("/")) for item in items):
            listed.add(path)
            if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for names that are too long
                found.problem(path, f"is missing, though {state} lists it")
    return listed


def _check_shards(found: Found) -> None:
    """Note the files that are missing from series such as train-00000-of-00003.parquet."""
    series: dict[tuple[str, ...], dict[int, Path]] = defaultdict(dict)
    missing = {item.path for item in found.passed_over if item.reason == UNREADABLE}
    for path in (file.path for file in found.files):
        match = _SHARD.fullmatch(path.name)
        if match:
            series[str(path.parent), match["before"], match["count"]][int(match["number"])] = path
    for (_, _, count), there in series.items():
        first = 1 if int(count) in there else 0
        for number in range(first, int(count) + first):
            if number not in there:
                example = next(iter(there.values()))
                match = _SHARD.fullmatch(example.name)
                assert match is not None
                name = f"{match['before']}{number:0{len(match['number'])}d}-of-{count}{match['after']}"
                if str(example.parent / name) not in missing:
                    found.problem(example.parent / name, f"is missing: {example.name} is one of {int(count)} files")


def copies(files: Sequence[SourceFile]) -> list[SourceFile]:
    """Return those of the files whose bytes are the same as those of an earlier file that is not empty."""
    return [
        file
        for same_size in _groups([file for file in files if file.size], lambda file: file.size)
        for same_start in _groups(same_size, lambda file: _start(file.path))
        for same in _groups(same_start, lambda file: _digest(file.path))
        for file in same[1:]
    ]


def _groups(files: Sequence[SourceFile], key: Callable[[SourceFile], object]) -> list[list[SourceFile]]:
    """Return the groups of two or more files that have the same key, in order."""
    groups: dict[object, list[SourceFile]] = defaultdict(list)
    for file in files:
        groups[key(file)].append(file)
    return [group for group in groups.values() if group[1:]]


def _start(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(START_BYTES)


def _digest(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
