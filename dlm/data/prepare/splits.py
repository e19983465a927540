"""Assign source files to the training and the validation split, by what the user says or by the names of the files."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlm.core.errors import UserError
from dlm.data.prepare.kinds import suffix_of
from dlm.data.prepare.sources import COPY, Found, SourceFile, copies, find

TRAIN, VALIDATION, TEST = "train", "validation", "test"

# Word in a name -> split. Of the names of the validation split, the first that exists is used.
VALIDATION_NAMES = (VALIDATION, "valid", "val", "dev", "eval", "heldout", "holdout")
WORDS = {TRAIN: TRAIN, "training": TRAIN, TEST: TEST, "testing": TEST} | {name: name for name in VALIDATION_NAMES}
PLAIN = VALIDATION_NAMES[:3]  # these names say it even where no file is named train

BY_HASH = "no names say it, so the hash of each document decides"
ONLY_HELD = "validation is named and nothing to train on, so the hash of each document decides"
ONLY_TRAIN = "train is named and no validation, so the hash of each document decides"
BY_SOURCE = "--validation-source names what is held out"
BY_GLOB = "--train and --validation name the files"
BY_TRAIN_GLOB = "--train names the files, and the hash of each document decides"
UNNAMED = "named by neither --train nor --validation"

_SERIES = re.compile(r"[-._]\d+-of-\d+.*")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The files of each split, and how they were divided."""

    files: list[tuple[str | None, Path]]  # validation first; a split of None: the hash of each document decides
    rule: str
    found: Found  # the files that are read and those that are passed over


@dataclass(frozen=True)
class _Choice:
    """What becomes of one file."""

    split: str | None
    left_out: str = ""  # why the file is passed over, if it is


def find_splits(
    sources: Sequence[Path],
    validation: Sequence[Path] = (),
    *,
    train_globs: Sequence[str] = (),
    validation_globs: Sequence[str] = (),
    skip_unreadable: bool = False,
) -> Splits:
    """Find the files of the sources and assign each to a split.

    Args:
        sources: Files and folders of text.
        validation: Files and folders whose documents are held out.
        train_globs: Patterns of the paths of the training files. A pattern without a slash is one of names of files.
        validation_globs: The same for the files that are held out.
        skip_unreadable: Pass over what looks like data and cannot be read.

    Raises:
        UserError: No documents are found, a file cannot be read, or the patterns do not divide the files.
    """
    found = find([*validation, *sources], skip_unreadable=skip_unreadable)
    if validation:
        choices, rule = _by_source(found.files, set(validation)), BY_SOURCE
    elif train_globs or validation_globs:
        choices = _by_glob(found.files, train_globs, validation_globs)
        rule = BY_GLOB if validation_globs else BY_TRAIN_GLOB
    else:
        choices, rule = _by_name(found.files)
    chosen = dict(zip([file.path for file in found.files], choices, strict=True))
    found.leave_out({path: choice.left_out for path, choice in chosen.items() if choice.left_out})
    found.files.sort(key=lambda file: chosen[file.path].split != VALIDATION)  # a stable sort
    found.leave_out({file.path: COPY for file in copies(found.files)})
    files = [(chosen[file.path].split, file.path) for file in found.files]
    return Splits(files=files, rule=rule, found=found)


def _by_source(files: Sequence[SourceFile], validation: set[Path]) -> list[_Choice]:
    labels = _labels(files)
    return [
        _Choice(VALIDATION)
        if file.source in validation
        else _Choice(TRAIN)
        if label in (None, TRAIN)
        else _Choice(None, _of_split(label))
        for file, label in zip(files, labels, strict=True)
    ]


def _by_glob(files: Sequence[SourceFile], train: Sequence[str], validation: Sequence[str]) -> list[_Choice]:
    for option, pattern in (*(("--train", p) for p in train), *(("--validation", p) for p in validation)):
        if not any(_matches(file, pattern) for file in files):
            raise UserError(f"{option} {pattern} names none of the {len(files)} files, such as {_path(files[0])}")
    choices = []
    for file in files:
        in_train, held_out = (any(_matches(file, pattern) for pattern in given) for given in (train, validation))
        if in_train and held_out:
            raise UserError(f"{file.path} is named by --train and by --validation: name it once")
        if held_out:
            choices.append(_Choice(VALIDATION))
        elif in_train or not train:
            choices.append(_Choice(TRAIN if validation else None))
        else:
            choices.append(_Choice(None, UNNAMED))
    return choices


def _path(file: SourceFile) -> str:
    return "/".join(file.parts[1:])


def _matches(file: SourceFile, pattern: str) -> bool:
    return fnmatch.fnmatchcase(_path(file) if "/" in pattern else file.path.name, pattern)


def _by_name(files: Sequence[SourceFile]) -> tuple[list[_Choice], str]:
    """Use the names if some files are named for training and others for validation, or if some are named validation.

    Files without such a name are then for training.
    """
    labels = _labels(files)
    held = next((name for name in VALIDATION_NAMES if name in labels), None)
    others_left = any(label in (None, TRAIN) for label in labels)
    if held is not None and others_left and (TRAIN in labels or held in PLAIN):
        rule = f"files and folders named {TRAIN} and {held}" if TRAIN in labels else f"those named {held} are held out"
        kept = {TRAIN: TRAIN, None: TRAIN, held: VALIDATION}
        return [_Choice(kept[label]) if label in kept else _Choice(None, _of_split(label)) for label in labels], rule
    rule = ONLY_TRAIN if TRAIN in labels else BY_HASH if held is None else ONLY_HELD
    is_left_out = [label == TEST and any(label != TEST for label in labels) for label in labels]
    return [_Choice(None, _of_split(TEST) if out else "") for out in is_left_out], rule


def _of_split(label: str | None) -> str:
    return f"of the {label} split, which dlm does not use"


def _labels(files: Sequence[SourceFile]) -> list[str | None]:
    """Return the split that each file is named after, or None.

    The outermost folder in which the paths differ takes precedence over folders within it, and folders over the name
    of the file. A word that is only a part of a file's name, as in web.train.jsonl, counts if the rest of the name is
    also that of a file of another split.
    """
    shared = _num_shared([file.parts[:-1] for file in files])
    named = [_label(file.parts[shared:]) for file in files]
    labels_of: dict[tuple[str, ...], set[str | None]] = defaultdict(set)
    for label, rest in named:
        labels_of[rest].add(label)
    divided = any(TRAIN in labels and labels - {TRAIN, None} for labels in labels_of.values())
    return [label if divided or not rest else None for label, rest in named]


def _num_shared(folders: Sequence[tuple[str, ...]]) -> int:
    """Return how many of the first folders are the same in all paths."""
    return sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False)))


def _label(parts: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """Return the split that a path names, and the other words in the name of the file if it is only a part of it.

    Examples are train/a.jsonl, Train_0.jsonl and train-00000-of-00002.parquet, and web.train.jsonl with the rest "web".
    """
    for folder in parts[:-1]:
        if folder.lower() in WORDS:
            return WORDS[folder.lower()], ()
    name = parts[-1].lower()
    suffix = suffix_of(Path(name)) or ""
    stem = _SERIES.sub("", name.removesuffix(suffix))
    words = [word for word in re.split(r"[-._\s]+", stem) if word and not word.isdigit()]
    for place in {0, len(words) - 1} if words else ():
        if words[place] in WORDS:
            return WORDS[words[place]], (*words[:place], *words[place + 1 :])
    return None, ()
