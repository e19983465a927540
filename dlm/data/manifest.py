"""Describe prepared data: one data set, or a weighted mixture of several.

A mixture is read in blocks of BLOCK_SAMPLES sequences. Each source has the same number of samples in every block: its
share of the weights, rounded once to whole samples. The result of a run depends on this rounded number, not on the
weight in the config.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.core.errors import UserError
from dlm.core.files import write_json
from dlm.core.identity import content_hash
from dlm.core.typed import read_typed

MANIFEST = "manifest.json"


# Large enough to round a share of two sources by at most 1/16384, and small enough that even the shortest run reads the
# sources in their proportions.
BLOCK_SAMPLES = 8192


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """One LITPKDS file."""

    name: str
    tokens: int
    bytes: int  # file size, header included; reveals a truncated file without reading it
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared data set: its vocabulary and, per split, its files in order."""

    name: str
    tokenizer: str
    vocab_size: int
    bos_id: int  # the token that the autoregressive model reads before the first token of a sequence
    splits: Mapping[str, tuple[PackedFile, ...]]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # provenance of the data; not hashed

    def tokens(self, split: str) -> int:
        """Return the number of tokens in one split."""
        return sum(file.tokens for file in self.splits[split])

    @property
    def hash(self) -> str:
        """The hash of the vocabulary size, the bos id and the contents of the files, 16 hex digits.

        Names and notes do not affect it.
        """
        splits = {split: [[file.tokens, file.sha256] for file in files] for split, files in self.splits.items()}
        return content_hash({"vocab_size": self.vocab_size, "bos_id": self.bos_id, "splits": splits})[:16]


def write_manifest(data_dir: Path, manifest: Manifest) -> None:
    """Write ``data_dir``/manifest.json.

    This is the last step of preparing data, so a folder with a manifest is complete.
    """
    write_json(data_dir / MANIFEST, {**dataclasses.asdict(manifest), "hash": manifest.hash})


def read_manifest(data_dir: Path) -> Manifest | None:
    """Read the manifest of ``data_dir``; return None if the data are not prepared.

    Raises:
        UserError: The manifest is damaged, or a data file is missing or does not have the size in the manifest.
    """
    path = data_dir / MANIFEST
    if data_dir.is_file():
        raise UserError(
            f"{data_dir} is a file, and a folder of prepared data belongs there: move it away or change DLM_DATA"
        )
    if not path.is_file():
        return None
    stored = read_typed(path, _Stored, what="manifest", otherwise="prepare the data again with dlm prepare")
    manifest = Manifest(**{field.name: getattr(stored, field.name) for field in dataclasses.fields(Manifest)})
    if manifest.hash != stored.hash:
        raise UserError(f"{path} does not match its own hash: prepare the data again with dlm prepare")
    for files in manifest.splits.values():
        for file in files:
            _check_size(data_dir / file.name, file.bytes)
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The content of manifest.json: the fields of a Manifest, and its hash."""

    name: str
    tokenizer: str
    vocab_size: int
    bos_id: int
    splits: Mapping[str, tuple[PackedFile, ...]]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hash: str


@dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """One prepared data set and its share of the mixture."""

    data_dir: Path
    manifest: Manifest
    samples: int  # samples from this source in every BLOCK_SAMPLES


@dataclass(frozen=True, kw_only=True)
class Unique:
    """The limit on the training text of a run: it reads the first sequences of a fixed order, again and again."""

    tokens: int  # rounded down to whole sequences
    block_size: int  # tokens of a sequence
    stride: int  # tokens from one packed sequence to the next


def unique_of(data: Mapping[str, Any]) -> Unique | None:
    """Return the limit that a ``data`` node sets; None if ``unique_tokens`` is null or absent."""
    tokens = data.get("unique_tokens")
    if tokens is None:
        return None
    return Unique(tokens=int(tokens), block_size=int(data["block_size"]), stride=int(data["stride"]))


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The data of a run: one source, or several in fixed proportions."""

    sources: tuple[WeightedSource, ...]  # sorted by hash, so neither their names nor their order in a config matters

    @property
    def hash(self) -> str:
        """The hash of the data set, 16 hex digits.

        A single source keeps its own hash. With several sources, the hashes and samples of all of them are hashed.
        """
        if len(self.sources) == 1:
            return self.sources[0].manifest.hash
        samples = [[source.manifest.hash, source.samples] for source in self.sources]
        return content_hash({"block": BLOCK_SAMPLES, "sources": samples})[:16]

    @property
    def vocab_size(self) -> int:
        """The vocabulary size, the same for every source."""
        return self.sources[0].manifest.vocab_size

    @property
    def bos_id(self) -> int:
        """The token that the autoregressive model reads before a sequence, the same for every source."""
        return self.sources[0].manifest.bos_id

    def epochs(self, tokens: int, *, unique: Unique | None = None) -> float:
        """Return the epochs of the most repeated source when ``tokens`` tokens are read from all sources together.

        Args:
            tokens: The tokens that a run reads.
            unique: The limit on the training sequences that are read; by default all are read.
        """
        held = [source.manifest.tokens("train") for source in self.sources]
        if unique is not None:
            held = [count * unique.block_size for count in self.limits(unique)]
        return max(
            tokens * source.samples / BLOCK_SAMPLES / max(own, 1)
            for source, own in zip(self.sources, held, strict=True)
        )

    def limits(self, unique: Unique) -> list[int]:
        """Return how many training sequences of each source a run reads at most.

        The sequences are divided over the sources like the samples of a mixture.

        Raises:
            UserError: A source holds fewer sequences than its share, or its share is less than one sequence.
        """
        counts = apportion(unique.tokens // unique.block_size, [source.samples for source in self.sources])
        for source, count in zip(self.sources, counts, strict=True):
            held = max((source.manifest.tokens("train") - unique.block_size) // unique.stride + 1, 0)
            wanted, have = count * unique.block_size, held * unique.block_size
            if not count:
                raise UserError(
                    f"data.unique_tokens is {unique.tokens}, less than one sequence of {unique.block_size} tokens from "
                    f"{source.data_dir}: raise data.unique_tokens or lower data.block_size"
                )
            if count > held:
                raise UserError(
                    f"data.unique_tokens is {unique.tokens}, which takes {wanted} tokens of {source.data_dir}, and its "
                    f"training split has {have} in whole sequences: lower data.unique_tokens, or set it to null"
                )
        return counts


def source_weights(data: Mapping[str, Any]) -> dict[Path, float]:
    """Return the folder and the weight of every source that is read.

    Args:
        data: A resolved ``data`` node. If it has ``sources``, they are read, except those of weight zero. Otherwise its
            ``data_dir`` is the only source.

    Returns:
        Folder -> weight.

    Raises:
        UserError: The weights do not define a mixture.
    """
    if not data.get("sources"):
        return {Path(data["data_dir"]): 1.0}
    weights: dict[Path, float] = {}
    for name, source in data["sources"].items():
        weight = _weight(name, source)
        if weight and Path(source["data_dir"]) in weights:
            raise UserError(f"data.sources.{name}.data_dir is that of another source: add their weights in one of them")
        if weight:
            weights[Path(source["data_dir"])] = weight
    if not weights:
        raise UserError(f"data.sources: every weight of {', '.join(data['sources'])} is 0: raise one above zero")
    return weights


def _weight(name: str, source: Any) -> float:
    if not isinstance(source, Mapping) or source.keys() != {"data_dir", "weight"}:
        raise UserError(f"data.sources.{name} is {source!r}: its keys must be data_dir and weight")
    weight = source["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise UserError(f"data.sources.{name}.weight is {weight!r}: it must be a number of at least 0")
    return float(weight)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide ``total`` into integers in proportion to ``weights``, by the largest-remainder method."""
    exact = [total * weight / math.fsum(weights) for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: (parts[place] - exact[place], place))
    for place in by_remainder[: total - sum(parts)]:
        parts[place] += 1
    return parts


def unprepared(data: Mapping[str, Any]) -> list[Path]:
    """Return the folders that a resolved ``data`` node reads and that are not prepared yet."""
    return [folder for folder in source_weights(data) if read_manifest(folder) is None]


def read_data(data: Mapping[str, Any]) -> DataSet | None:
    """Return the data set of a resolved ``data`` node, or None while any of its sources is not prepared.

    Raises:
        UserError: The data are damaged, the weights do not define a mixture, or the sources are incompatible or hold
            the same data.
    """
    found = [(read_manifest(folder), folder, weight) for folder, weight in source_weights(data).items()]
    known = [(manifest, folder, weight) for manifest, folder, weight in found if manifest is not None]
    if len(known) < len(found):
        return None
    known.sort(key=lambda item: item[0].hash)
    samples = apportion(BLOCK_SAMPLES, [weight for *_, weight in known])
    sources = [
        WeightedSource(data_dir=folder, manifest=manifest, samples=count)
        for (manifest, folder, _), count in zip(known, samples, strict=True)
    ]
    _check_together(sources)
    return DataSet(sources=tuple(sources))


def _check_together(sources: Sequence[WeightedSource]) -> None:
    first = sources[0]
    for before, source in itertools.pairwise(sources):
        if source.manifest.hash == before.manifest.hash:
            raise UserError(
                f"{before.data_dir} and {source.data_dir} hold the same data: add their weights in one of data.sources"
            )
        for key in ("vocab_size", "bos_id"):
            here, there = getattr(first.manifest, key), getattr(source.manifest, key)
            if here != there:
                raise UserError(
                    f"{first.data_dir} has {key} {here}, {source.data_dir} has {there}: data.sources must be prepared "
                    "with the same tokenizer"
                )
    for source in sources:
        if not source.samples:
            raise UserError(
                f"the weight of {source.data_dir} is less than half a sample in {BLOCK_SAMPLES}: raise it in "
                "data.sources, or set it to 0"
            )


def _check_size(path: Path, expected_bytes: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: prepare the data again with dlm prepare")
    if path.stat().st_size != expected_bytes:
        raise UserError(
            f"{path} holds {path.stat().st_size} bytes where its manifest says {expected_bytes}: "
            "it is truncated or replaced; prepare the data again with dlm prepare"
        )
