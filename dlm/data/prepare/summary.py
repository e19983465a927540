"""Count what a preparation read, left out and passed over: for the manifest, and in words for the user."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlm.core.text import counted
from dlm.data.prepare.documents import Unit
from dlm.data.prepare.encode import NO_TEXT, SKIPPED, UnitRecord
from dlm.data.prepare.sources import UNREADABLE, PassedOver
from dlm.data.prepare.splits import TRAIN, VALIDATION, Splits

MOST_NAMES = 1000  # of files that are passed over for one reason; those that cannot be read are all named
MOST_LINES = 10  # of rows and files that are named on the screen


def num_documents(records: Sequence[UnitRecord]) -> dict[str, int]:
    """Return the number of documents in each split."""
    return {split: sum(record.documents.get(split, 0) for record in records) for split in (TRAIN, VALIDATION)}


def notes_on(splits: Splits, units: Sequence[Unit], records: Sequence[UnitRecord]) -> dict[str, Any]:
    """Return the notes of a manifest on what was read and what was not.

    Args:
        splits: The files that were found.
        units: All units, in order.
        records: Their records.
    """
    num_read: Counter[str] = Counter()
    for unit, record in zip(units, records, strict=True):
        left_out = sum(count for reason, count in record.skipped.items() if reason != NO_TEXT)
        num_read[unit.kind] += sum(record.documents.values()) + left_out
    unreadable = [f"{item.path} {item.detail}" for item in splits.found.passed_over if item.reason == UNREADABLE]
    return {
        "files": len({path for unit in units for path in unit.paths}),
        "bytes": sum(unit.size for unit in units),
        "read": {kind: {**_files_of(kind, units), "documents": num_read[kind]} for kind in sorted(num_read)},
        "passed_over": _by_reason([item for item in splits.found.passed_over if item.reason != UNREADABLE]),
        "unreadable": unreadable + [line for record in records for line in record.unreadable],
        "split": splits.rule,
        "documents": num_documents(records),
        "skipped": {reason: sum(record.skipped[reason] for record in records) for reason in SKIPPED},
        "rows_without_text": [row for record in records for row in record.bad],
    }


def _files_of(kind: str, units: Sequence[Unit]) -> dict[str, int]:
    mine = [unit for unit in units if unit.kind == kind]
    return {"files": len({path for unit in mine for path in unit.paths}), "bytes": sum(unit.size for unit in mine)}


def _by_reason(items: Sequence[PassedOver]) -> dict[str, dict[str, Any]]:
    reasons: dict[str, list[PassedOver]] = defaultdict(list)
    for item in items:
        reasons[item.reason].append(item)
    return {
        reason: {
            "files": len(group),
            "bytes": sum(item.size for item in group),
            "suffixes": dict(Counter("".join(Path(item.path).suffixes) for item in group).most_common()),
            "names": [item.path for item in group[:MOST_NAMES]],
        }
        for reason, group in reasons.items()
    }


def in_words(notes: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that tell a user what was read and what was not.

    Args:
        notes: Those of a manifest. Manifests of earlier versions hold only the counts of documents.
    """
    if "read" in notes:
        kinds = ", ".join(
            f"{counted(item['files'], kind + ' file')} ({counted(item['documents'], 'document')})"
            for kind, item in notes["read"].items()
        )
        yield f"read {kinds}, {notes['bytes']:,} bytes"
        for reason, item in notes["passed_over"].items():
            size = f"{counted(item['files'], 'file')}, {item['bytes']:,} bytes"
            more = f" and {item['files'] - 1:,} more" if item["files"] > 1 else ""
            yield f"passed over {size}, {reason}: {item['names'][0]}{more}"
        yield from _some("not read, or only in part", notes["unreadable"])
        yield from _some("was left out", notes["rows_without_text"])
        yield f"split: {notes['split']}"
    counts = ", ".join(f"{count:,} {split}" for split, count in notes["documents"].items())
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in notes["skipped"].items() if count)
    yield f"{counts} documents{f'; left out: {left_out}' if left_out else ''}"


def _some(words: str, lines: Sequence[str]) -> Iterator[str]:
    for line in lines[:MOST_LINES]:
        yield f"{words}: {line}"
    if len(lines) > MOST_LINES:
        yield f"{words}: {len(lines) - MOST_LINES:,} more, which manifest.json names"
