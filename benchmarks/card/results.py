"""Keep the results of the card script: one file for each device, code and scale, written after every measurement."""

from __future__ import annotations

import datetime
import hashlib
import math
import re
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import ROOT
from dlm.core.errors import UserError
from dlm.core.files import read_json, write_json

SAME = ("device", "torch", "python", "cpu", "cores", "code", "scale", "memory_gib")  # what a resumed file must share
READ = ("dlm", "configs", "benchmarks/card", "benchmarks/gpu.py", "benchmarks/peers.py", "benchmarks/side_by_side.py")


def code_hash() -> str:
    """Return a hash of all files that the script runs, so that a file is never continued by other code."""
    digest = hashlib.sha256()
    for path in sorted(path for name in READ for path in _files(ROOT / name)):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for kind in ("*.py", "*.pyi", "*.yaml") for file in path.rglob(kind)]


class Results:
    """The results file, as it is in memory and on disk.

    Args:
        folder: Where the file is, or will be.
        about: The device, the versions and the code.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        words = (about["device"], f"torch{about['torch']}", about["code"], about["scale"])
        self.path = folder / f"card_{'_'.join(re.sub(r'[^0-9A-Za-z.]+', '-', str(word)) for word in words)}.json"
        self.content: dict[str, Any] = {"about": about, "calls": [], "rows": {}, "not_run": {}}
        if self.path.is_file():
            found = read_json(self.path)
            differing = [name for name in SAME if found["about"].get(name) != about[name]]
            if differing:
                raise UserError(f"{self.path} has another {', '.join(differing)}: give another --out")
            self.content = {**found, "not_run": {}}

    def call(self, command: str) -> None:
        """Take note of a new call of the script, and write the file."""
        self.content["calls"].append({"command": command, "began": str(datetime.datetime.now(datetime.UTC))})
        self.write()

    def row(self, name: str) -> dict[str, Any]:
        """Return what is known of a row; {} if it was never tried."""
        found: dict[str, Any] = self.content["rows"].get(name, {})
        return found

    def is_measured(self, name: str) -> bool:
        """Whether a row has its numbers."""
        return "measured" in self.row(name)

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Keep the record of a row, and write the file."""
        self.content["rows"][name] = finite(record)
        self.content["not_run"].pop(name, None)
        self._relate()
        self.write()

    def leave_out(self, name: str, *, estimated_sec: float, left_sec: float) -> None:
        """Name a row that this call does not start, because it would take longer than what is left."""
        self.content["not_run"][name] = {"estimated_sec": estimated_sec, "left_sec": left_sec}

    def _relate(self) -> None:
        """Give each speed as a share of that of the matrix product, once both are measured."""
        product = self.row("product").get("measured", {}).get("flops_per_sec")
        for record in self.content["rows"].values():
            measured = record.get("measured", {})
            if product and isinstance(measured.get("flops_per_sec"), float):
                measured["share_of_product"] = measured["flops_per_sec"] / product

    def write(self) -> None:
        """Write the whole file atomically."""
        write_json(self.path, self.content)


def finite(value: Any) -> Any:
    """Return nested values with NaN and infinity as text, which JSON can hold: they are results of a broken kernel."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
