"""Measure dlm and a peer in turn, compare their medians, and write the result file of a benchmark."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = 5
Side = Callable[[], dict[str, float]]


def alternate(ours: Side, peer: Side, windows: int = WINDOWS) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Run both sides in turn, after one window of each that does not count. Returns what each measured."""
    results: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for window in range(windows + 1):
        for side, kept in zip((ours, peer), results, strict=True):
            measured = side()
            if window:
                kept.append(measured)
    return results


def compared(ours: list[dict[str, float]], peer: list[dict[str, float]]) -> dict[str, Any]:
    """For every quantity that both measured: the medians, their ratio, and the spread of the windows."""
    row = {}
    for key in ours[0].keys() & peer[0].keys():
        left, right = [item[key] for item in ours], [item[key] for item in peer]
        row[key] = {
            "ours": statistics.median(left),
            "peer": statistics.median(right),
            "ratio": statistics.median(left) / statistics.median(right),
            "spread_ours": [min(left), max(left)],
            "spread_peer": [min(right), max(right)],
        }
    return row


def commit(repository: Path) -> str | None:
    """The commit that a repository is at, if it is one."""
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def write_result(name: str, rows: dict[str, Any], *, command: str, packages: Iterable[str], **more: Any) -> Path:
    """Write benchmarks/results/NAME.json with the rows and with the command, the machine and the packages."""
    result = {
        "date": name[-10:],
        "command": command,
        "commit": commit(ROOT),
        "windows": WINDOWS,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), **more},
        "packages": {package: metadata.version(package) for package in packages},
        "rows": rows,
    }
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
