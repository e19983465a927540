"""Whatever lies in a folder: each document that was written is in a split, or its row or file is listed."""

import gzip
import json
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm.core.files import read_json
from dlm.data.packed import open_packed
from dlm.data.prepare.command import main


def as_lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_table(write):
    def made(path, rows):
        write(pa.table({"text": pa.array([row["text"] for row in rows], pa.string())}), path)

    return made


def as_bytes(encode):
    return lambda path, rows: path.write_bytes(encode(rows))


def as_arrow(table, path):
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)


WRITERS = {
    "a.jsonl": as_bytes(as_lines),
    "b.jsonl.gz": as_bytes(lambda rows: gzip.compress(as_lines(rows))),
    "c.ndjson.zst": as_bytes(lambda rows: zstandard.compress(as_lines(rows))),
    "d.json": as_bytes(lambda rows: json.dumps(rows, indent=1).encode()),
    "e.json.zst": as_bytes(lambda rows: zstandard.compress(json.dumps(rows).encode())),
    "f.parquet": as_table(pq.write_table),
    "g.arrow": as_table(as_arrow),
    "h.feather": as_table(pyarrow.feather.write_feather),
    "i.txt": None,  # one document
}
FOLDERS = ("", "train/", "validation/", "test/", "web/", ".hidden/", "train/deep/")
TEXT = st.one_of(st.none(), st.just("\ud800"), st.text("aé\n\0<s>", max_size=6))
FILE = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(sorted(WRITERS)), st.lists(TEXT, max_size=4), st.booleans())


def write(root, number, folder, name, texts, is_torn):
    """Write one file, and return the documents in it with a mark that makes each unique."""
    path = root / folder / f"{number}{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    marked = [text if text is None else f"{number}.{place}:{text}" for place, text in enumerate(texts)]
    if WRITERS[name] is None:
        marked = [text for text in marked if text and "\ud800" not in text][:1] or [f"{number}"]
        path.write_text(marked[0])
        return path, marked
    if name.endswith(("parquet", "arrow", "feather")):
        marked = [text for text in marked if text is None or "\ud800" not in text]
    WRITERS[name](path, [{"text": text} for text in marked])
    if is_torn:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
    return path, marked


@settings(max_examples=40, deadline=None)
@given(st.lists(FILE, min_size=1, max_size=6), st.sets(st.sampled_from(["copy", "link", "twice", "part"])))
def test_every_document_is_in_a_split_or_listed(files, more):
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "source", Path(folder) / "out"
        root.mkdir()
        (root / "always.jsonl").write_bytes(as_lines([{"text": f"always {n}"} for n in range(9)]))
        written = [write(root, number, *file) for number, file in enumerate(files)]
        sources = [root, *([root] if "twice" in more else []), *([written[0][0]] if "part" in more else [])]
        if "copy" in more:
            shutil.copy(written[0][0], root / f"copy of {written[0][0].name}")
        if "link" in more:
            (root / "link").symlink_to(written[0][0].parent)
        options = ["--skip-bad", "99", "--skip-unreadable", "--validation-share", "0.3", "--workers", "1"]
        code = main(["text", *map(str, sources), "--out", str(out), "--tokenizer", "bytes", *options])
        if code == 2:  # the files that are named validation hold no documents
            assert any(file[0] == "validation/" for file in files)
            return
        notes = read_json(out / "manifest.json")["notes"]
        kept = b"".join(open_packed(path).tobytes() for path in sorted(out.glob("*.bin"))).split(b"\0")[:-1]
        assert len(kept) == len(set(kept)) == sum(notes["documents"].values())
        num_read = sum(item["documents"] for item in notes["read"].values())
        skipped = dict(notes["skipped"])
        assert skipped.pop("without text") == len(notes["rows_without_text"])
        assert num_read == len(kept) + sum(skipped.values())
        passed_over = [name for item in notes["passed_over"].values() for name in item["names"]]
        listed = [*notes["unreadable"], *notes["rows_without_text"]]
        with_nul = 0
        for path, texts in written:
            for text in texts:
                if text is not None and "\0" in text:
                    with_nul += 1
                elif text is None or "\ud800" in text or text.encode() not in kept:
                    assert str(path) in passed_over or any(line.startswith(str(path)) for line in listed), (path, text)
        assert notes["skipped"]["with NUL"] <= with_nul
