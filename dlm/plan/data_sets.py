"""Find the data sets that the cells of a plan read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dlm.core import paths
from dlm.core.identity import canonical_json, content_hash
from dlm.data.manifest import DataSet


class DataSets:
    """The data sets of the cells, each read once."""

    def __init__(self, read: Callable[[Mapping[str, Any]], DataSet | None]) -> None:
        self.read = read
        self.found: dict[str, DataSet | None] = {}

    def of(self, config: Mapping[str, Any]) -> DataSet | None:
        """Return the data set of a cell; None if it is not prepared."""
        node = resolved(config["data"])
        key = canonical_json({name: node.get(name) for name in ("data_dir", "sources")})
        if key not in self.found:
            self.found[key] = self.read(node)
        return self.found[key]

    @property
    def hash(self) -> str | None:
        """The hash of all of them, which is that of a single one; None while any of them is not prepared."""
        hashes = [data.hash for data in self.found.values() if data is not None]
        if len(hashes) < len(self.found):
            return None
        return hashes[0] if len(hashes) == 1 else content_hash(sorted(hashes))[:16]


def data_key(node: Mapping[str, Any]) -> str:
    """Return what all cells that read the same data in the same way share, whatever their batches are."""
    return canonical_json({key: value for key, value in node.items() if key not in ("batch_size", "micro_batch_size")})


def resolved(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``data`` node with ``${paths.data_dir}`` resolved as Hydra does."""
    return dict(_in_place(node))


def _in_place(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_place(item) for key, item in value.items()}
    return value.replace("${paths.data_dir}", str(paths.data_dir())) if isinstance(value, str) else value
