"""Refuse a YAML text or an override that is small and means something huge: aliases, deep nesting, endless numbers.

An alias costs its author three characters and stands for a value of any size. YAML reads that value once, but all that
goes over the content afterwards, to check it, to copy it or to write it, meets it as often as its alias stands there.
What counts is therefore the text with every alias written out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from dlm.core.errors import UserError, shown
from dlm.core.json_text import MAX_DIGITS

MAX_BYTES = 10 * 1024 * 1024  # of a file, and of its text with every alias written out
MAX_VALUES = 20_000  # keys, values, lists and mappings, with every alias written out
MOST_CELLS = 10_000  # of a plan, unless its definition allows more, and of one multirun of Hydra
MAX_DEPTH = 50  # lists and mappings inside each other; libyaml ends the process at some ten thousand
_WHOLE = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|[0-9_:]+)")


@dataclass(slots=True)
class _Extent:
    """How much a node holds, with every alias written out."""

    anchor: str | None = None
    values: int = 1
    chars: int = 0
    depth: int = 0

    def add(self, inner: _Extent) -> None:
        self.values += inner.values
        self.chars += inner.chars
        self.depth = max(self.depth, inner.depth + 1)


def read_limited(path: Path) -> bytes:
    """Read a YAML file. Raises UserError if it is larger than MAX_BYTES."""
    with open(path, "rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES // 1024**2} MiB: it cannot be the YAML file that was meant")
    return content


def check_extent(events: Iterable[yaml.Event], source: str) -> None:
    """Raise UserError if a text nests or holds too much. The ``events`` are read only as far as the text is allowed."""
    root = _Extent()
    above, named = [root], dict[str | None, _Extent]()
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            above.append(_Extent(event.anchor))
            _check(above[-1], len(above) - 1, event, source)
            continue
        if isinstance(event, yaml.ScalarEvent):
            _check_digits(event, source)
            extent = _Extent(event.anchor, chars=len(event.value))
        elif isinstance(event, yaml.AliasEvent):  # an alias of what is still open, or of nothing, is refused later
            extent = named.get(event.anchor, _Extent())
        elif isinstance(event, yaml.CollectionEndEvent):
            extent = above.pop()
        else:
            continue
        if not isinstance(event, yaml.AliasEvent) and extent.anchor is not None:
            named[extent.anchor] = extent
        above[-1].add(extent)
        _check(above[-1], len(above) - 2 + above[-1].depth, event, source)


def _check(extent: _Extent, depth: int, event: yaml.Event, source: str) -> None:
    line = f"{source}, line {_line(event)}"
    if depth > MAX_DEPTH:
        raise UserError(f"{line}: more than {MAX_DEPTH} lists and mappings stand inside each other: write them flatter")
    if extent.values > MAX_VALUES or extent.chars > MAX_BYTES:
        most = f"{MAX_VALUES:,} values or {MAX_BYTES // 1024**2} MiB"
        raise UserError(f"{line}: with every alias (*NAME) written out, this is more than {most}: leave some out")


def _check_digits(event: yaml.ScalarEvent, source: str) -> None:
    if event.implicit[0] and len(event.value) > MAX_DIGITS and _WHOLE.fullmatch(event.value):
        digits = f"{len(event.value):,} digits"
        raise UserError(f"{source}, line {_line(event)}: a number has {digits}, and at most {MAX_DIGITS} are allowed")


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def check_override_extents(words: Iterable[str]) -> None:
    """Raise UserError for an override that Hydra cannot read, because it nests too much or has too many digits.

    Brackets and digits inside quotes count too.
    """
    for word in words:
        depth = deepest = 0
        for bracket in re.findall(r"[\[\](){}]", word):
            depth += 1 if bracket in "[({" else -1
            deepest = max(deepest, depth)
        if deepest > MAX_DEPTH:
            raise UserError(f"{shown(word)}: more than {MAX_DEPTH} brackets stand inside each other: write it flatter")
        if word.partition("=")[0].count(".") > MAX_DEPTH:
            raise UserError(f"{shown(word)}: a key has at most {MAX_DEPTH} dots: it cannot be the one that was meant")
        if found := re.search(rf"[0-9_]{{{MAX_DIGITS + 1},}}", word):
            digits = f"{len(found[0]):,} digits"
            raise UserError(f"{shown(word)}: a number has {digits}, and at most {MAX_DIGITS} are allowed")
