"""Say which files hold documents: by the suffix of their names and the first bytes of their contents."""

from __future__ import annotations

import re
from pathlib import Path

# suffix -> format. The formats that are text may also be compressed.
TEXT_FORMATS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".txt": "text"}
TABLE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
COMPRESSIONS = ("", ".gz", ".zst")
FORMATS = {
    **{suffix + compression: form for suffix, form in TEXT_FORMATS.items() for compression in COMPRESSIONS},
    **TABLE_FORMATS,
}

# Suffixes that a file with data may have, though dlm does not read it. Such a file is not passed over without a word.
OTHER_DATA = {
    ".7z", ".avro", ".bin", ".bz2", ".csv", ".db", ".gz", ".h5", ".hdf5", ".idx", ".jl", ".jsonlines", ".lmdb", ".lz4",
    ".mds", ".msgpack", ".npy", ".npz", ".orc", ".parq", ".part", ".pickle", ".pkl", ".pt", ".rar", ".sqlite", ".tar",
    ".text", ".tfrecord", ".tgz", ".tmp", ".tsv", ".warc", ".xlsx", ".xml", ".xz", ".zip", ".zst",
}  # fmt: skip
_PART = re.compile(r"part[-_.]?\d+")  # what Hadoop and Spark call the parts of a data set, with or without a suffix

# First bytes -> what the file is, and the suffixes with which it may have these bytes.
SIGNATURES = {
    b"version https://git-lfs": ("a pointer of git-lfs, not the data themselves", ()),
    b"PAR1": ("a Parquet file", (".parquet",)),
    b"ARROW1": ("an Arrow file", (".arrow", ".feather")),
    b"FEA1": ("a Feather file of version 1", ()),
    b"\x1f\x8b": ("a gzip file", (".gz",)),
    b"\x28\xb5\x2f\xfd": ("a zstd file", (".zst",)),
    b"PK\x03\x04": ("a zip file", ()),
    b"BZh": ("a bzip2 file", ()),
    b"\xfd7zXZ": ("an xz file", ()),
    b"SQLite format 3": ("an SQLite database", ()),
    b"\x89HDF": ("an HDF5 file", ()),
}
HEAD_BYTES = max(map(len, SIGNATURES))


def suffix_of(path: Path) -> str | None:
    """Return the suffix of a file that holds documents, such as ".jsonl.zst"; None for any other file."""
    return next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), None)


def looks_like_data(path: Path) -> bool:
    """Return whether a file that dlm does not read has a name of data, such as a.csv, a.jsonl.bz2 or part-00000."""
    return bool(_PART.fullmatch(path.name)) or any(
        suffix.lower() in OTHER_DATA or suffix.lower() in FORMATS for suffix in path.suffixes
    )


def belied(path: Path) -> str | None:
    """Return what the content of a file is, in words, if the suffix of its name says otherwise; else None."""
    with open(path, "rb") as stream:
        head = stream.read(HEAD_BYTES)
    for signature, (words, suffixes) in SIGNATURES.items():
        if head.startswith(signature):
            return None if suffixes and path.name.lower().endswith(suffixes) else words
    return None
