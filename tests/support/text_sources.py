"""Write text sources of every kind, and compute the data set that must result from them."""

import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from dlm.data.manifest import read_manifest
from dlm.data.packed import open_packed
from dlm.data.prepare.command import main

WORDS = ("the", "quick", "brown", "fox", "over", "lazy", "dogs", "¿qué?", "日本", "é\n")


def make_texts(count, seed=0, words=60):
    random = np.random.default_rng(seed)
    return [f"{n} " + " ".join(random.choice(WORDS, random.integers(1, words))) for n in range(count)]


TEXTS = make_texts(200)


def lines(texts, key="text"):
    return "".join(json.dumps({key: text, "meta": {"n": n}}) + "\n" for n, text in enumerate(texts)).encode()


def as_jsonl(texts, folder):
    (folder / "a.jsonl").write_bytes(lines(texts[:90]))
    (folder / "b.jsonl").write_bytes(lines(texts[90:])[:-1])  # without a newline after the last line


def as_zst(texts, folder):
    parts = [zstandard.ZstdCompressor().compress(lines(part)) for part in (texts[:50], texts[50:120], texts[120:])]
    (folder / "a.jsonl.zst").write_bytes(parts[0] + parts[1])  # two frames in one file
    (folder / "b.jsonl.zst").write_bytes(parts[2])


def as_gz(texts, folder):
    (folder / "deep").mkdir()
    padding = bytes(512)  # with which a tape fills up its last block
    (folder / "deep" / "a.jsonl.gz").write_bytes(gzip.compress(lines(texts)) + padding)


def as_parquet(texts, folder):
    table = pa.table({"n": range(len(texts)), "text": texts})
    pq.write_table(table, folder / "a.parquet", row_group_size=70)


def as_text(texts, folder):
    for number, text in enumerate(texts):
        (folder / f"{number:05d}.txt").write_bytes(text.encode())
    (folder / "README.md").write_text("no source")


def as_saved(texts, folder):
    import datasets  # takes a second, which every process that collects the tests would spend

    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "saved", num_shards=3)


FORMS = {form.__name__: form for form in (as_jsonl, as_zst, as_gz, as_parquet, as_text, as_saved)}


def many_units(source, count, texts_each, **options):
    """Write files of alternating kinds, so that no two of them can share a unit."""
    for number in range(count):
        content = lines(make_texts(texts_each, seed=number, **options))
        name, content = ("jsonl", content) if number % 2 else ("jsonl.gz", gzip.compress(content, mtime=0))
        (source / f"{number:03d}.{name}").write_bytes(content)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare(*arguments):
    return main(["text", *map(str, arguments)])


def refusal(capsys, *arguments):
    """Run a preparation that must fail with a user error, and return its single line on stderr."""
    assert prepare(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dlm: ") and captured.err.count("\n") == 1, captured
    return captured.err


def tokens_in(out, split):
    manifest = read_manifest(out)
    parts = [open_packed(out / file.name) for file in manifest.splits[split]]
    assert sum(map(len, parts)) == manifest.tokens(split)
    return np.concatenate(parts).tolist() if parts else []


def expected(texts, encode, eos, share, *, bos=()):
    """Return the expected tokens of both splits, with the documents in order."""
    result = {"train": [], "validation": []}
    for text in texts:
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        result["validation" if key < share * 2**64 else "train"] += [*bos, *encode(text), eos]
    return result


def as_bytes(text):
    return list(text.encode())
