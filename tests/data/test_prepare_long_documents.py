"""A document that is longer than --max-document is never held in memory: it is refused, or left out as a bad row."""

import gzip
import itertools
import json

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard
from support.limited import run_limited
from support.text_sources import files_of, prepare, refusal

from dlm.data.manifest import read_manifest
from dlm.data.prepare.compressed import BUFFER_BYTES, open_bytes
from dlm.data.prepare.documents import Unit, read_unit

MIB = 1024 * 1024
LONG, FINE = "a" * (MIB + 1), ["first", "last"]
ROWS = [{"text": text} for text in (FINE[0], LONG, FINE[1])]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
AT_LIMIT = json.dumps({"text": "a" * (MIB - len(b'{"text": ""}'))}).encode() + b"\n"
IN_ALL = ["--tokenizer", "bytes", "--eos-id", 0, "--workers", 1]


def as_zst(path, head: bytes, tail: bytes, mebibytes: int):
    """Write a zstd file of ``mebibytes`` times the letter a between ``head`` and ``tail``."""
    block = b"a" * (16 * MIB)
    with open(path, "wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as stream:
        stream.write(head)
        for _ in range(mebibytes // 16):
            stream.write(block)
        stream.write(tail)


def tables(kind: str, path):
    texts = pa.array([row["text"] for row in ROWS])
    if kind == "dictionary":
        texts = texts.dictionary_encode()
    table = pa.table({"text": texts})
    if path.suffix == ".parquet":
        pq.write_table(table, path, store_schema=kind == "dictionary")
    else:
        feather.write_feather(table, str(path), compression="zstd")


def read(path, kind, **options):
    bad = []
    found = list(read_unit(Unit(split=None, kind=kind, paths=(str(path),), size=1), "text", bad.append, **options))
    return found, [str(item) for item in bad]


@pytest.mark.parametrize(
    ("kind", "pack"), [(".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.zst", zstandard.compress)]
)
def test_a_long_line_is_a_bad_row_and_the_next_one_is_read(kind, pack, tmp_path):
    path = tmp_path / f"a{kind}"
    path.write_bytes(pack(LINES + AT_LIMIT))
    found, bad = read(path, kind, max_document=1)
    assert found == [*FINE, json.loads(AT_LIMIT)["text"]]
    assert bad == [f"{path}:2 is longer than 1 MiB, which is --max-document"]
    assert read(path, kind, max_document=2) == ([FINE[0], LONG, FINE[1], found[2]], [])


@pytest.mark.parametrize("kind", ["plain", "dictionary"])
@pytest.mark.parametrize("suffix", [".parquet", ".feather"])
def test_a_long_cell_is_a_bad_row(suffix, kind, tmp_path):
    path = tmp_path / f"a{suffix}"
    tables(kind, path)
    found, bad = read(path, suffix, max_document=1)
    assert (found, bad) == (FINE, [f"{path} row 2 is longer than 1 MiB, which is --max-document"])
    assert read(path, suffix, max_document=2) == ([FINE[0], LONG, FINE[1]], [])


def test_a_long_element_or_text_file_is_a_file_that_cannot_be_read(tmp_path):
    array, text = tmp_path / "a.json", tmp_path / "a.txt"
    array.write_text(json.dumps(ROWS))
    text.write_text(LONG)
    found, bad = read(array, ".json", max_document=1)
    assert (found, bad) == (FINE[:1], [f"{array} is longer than 1 MiB at element 2, which is --max-document"])
    assert read(text, ".txt", max_document=1) == (
        [], [f"{text} is one document of more than 1 MiB, which is --max-document"],
    )  # fmt: skip
    assert read(array, ".json", max_document=2) == ([FINE[0], LONG, FINE[1]], [])
    assert read(text, ".txt", max_document=2) == ([LONG], [])


def test_a_long_first_line_of_a_json_file_is_a_bad_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"".join(LINES.splitlines(keepends=True)[1:]))
    assert read(path, ".json", max_document=1) == (
        FINE[1:], [f"{path}:1 is longer than 1 MiB, which is --max-document"],
    )  # fmt: skip
    assert read(path, ".json", max_document=2) == ([LONG, FINE[1]], [])


@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".jsonl", ".json", ".parquet"])
def test_a_high_limit_takes_no_memory_of_its_own(kind, tmp_path):
    path = tmp_path / f"a{kind}"
    rows = LINES.splitlines(keepends=True)[0]
    content = {".txt": b"first", ".txt.gz": gzip.compress(b"first")}.get(kind, rows)
    path.write_bytes(content)
    if kind == ".parquet":
        pq.write_table(pa.table({"text": FINE[:1]}), path)
    assert read(path, kind, max_document=2**40) == (FINE[:1], [])


@pytest.mark.parametrize("cuts", [range(0, len(LINES), 100_000), [0, LINES.rindex(b"{")]])
def test_slices_of_a_file_with_a_long_line_hold_its_rows_once(cuts, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    found, bad = [], []
    for start, stop in itertools.pairwise([*cuts, len(LINES)]):
        unit = Unit(split=None, kind=".jsonl", paths=(str(path),), size=1, start=start, stop=stop)
        found += read_unit(unit, "text", bad.append, max_document=1)
    assert found == FINE
    assert [str(item) for item in bad] == [f"{path}:2 is longer than 1 MiB, which is --max-document"]


def test_the_command_refuses_a_long_row_leaves_it_out_or_takes_it(source, tmp_path, capsys):
    (source / "a.jsonl").write_bytes(
        LINES + b"".join(json.dumps({"text": f"text {k}"}).encode() + b"\n" for k in range(99))
    )
    words = [source, "--out", tmp_path / "out", *IN_ALL]
    line = refusal(capsys, *words, "--max-document", 1)
    advice = "raise --max-document, correct or remove that row, or leave out such rows with --skip-bad N"
    assert f"a.jsonl:2 is longer than 1 MiB, which is --max-document: {advice}" in line
    for wrong in (0, 2**43):
        assert f"--max-document is {wrong}: it must be a whole number" in refusal(
            capsys, *words, "--max-document", wrong
        )
    assert prepare(*words) == 0
    whole, notes = files_of(tmp_path / "out"), read_manifest(tmp_path / "out").notes
    assert "max_document" not in json.dumps(notes)
    other = [source, "--out", tmp_path / "other", *IN_ALL, "--max-document", 1, "--skip-bad", 1]
    assert prepare(*other) == 0
    assert sum(map(len, whole.values())) - sum(map(len, files_of(tmp_path / "other").values())) > MIB / 2


LOWER = ["--max-document", 1, "--skip-bad", 1]


@pytest.mark.parametrize(("first", "then"), [(LOWER, []), ([], LOWER)])
def test_another_limit_continues_an_unfinished_preparation_as_if_it_had_begun_it(source, tmp_path, capsys, first, then):
    (source / "a.jsonl").write_bytes(LINES)
    (source / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % k for k in range(99))))
    (source / "c.json").write_bytes(b"no row\n")
    out = tmp_path / "out"
    words = [source, "--out", out, "--name", "x", *IN_ALL]
    refusal(capsys, *words, *first)  # a and b are done, c is not
    (source / "c.json").write_bytes(b'{"text": "row"}\n')
    assert prepare(*words, *then) == 0
    fresh = tmp_path / "fresh"
    assert prepare(source, "--out", fresh, "--name", "x", *IN_ALL, *then) == 0
    assert files_of(out) == files_of(fresh)


def test_a_document_of_gigabytes_in_a_small_file_takes_little_memory(source, tmp_path):
    for name, head, tail in (("a.jsonl.zst", b'{"text": "', b'"}\n{"text": "b"}\n'), ("b.txt.zst", b"", b"")):
        as_zst(source / name, head, tail, 640)
        assert (source / name).stat().st_size < 200_000
        ended = run_limited("dlm.cli", "prepare", "text", source / name, "--out", tmp_path / "out", *IN_ALL)
        assert " MiB, which is --max-document: raise --max-document" in ended.complaint


def test_a_small_file_is_decompressed_in_small_pieces(tmp_path):
    as_zst(tmp_path / "a.txt.zst", b"", b"", 64)
    with open_bytes(tmp_path / "a.txt.zst") as stream:
        raw = stream.raw
        first = raw.read(BUFFER_BYTES)
        assert len(raw._ready) + len(first) <= 32 * MIB
        assert len(stream.read()) + len(first) == 64 * MIB


def test_a_text_that_a_dictionary_holds_once_and_every_row_repeats_is_read_row_by_row(source, tmp_path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["a" * (16 * MIB)]))
    pq.write_table(pa.table({"text": texts}), source / "a.parquet", compression="zstd", store_schema=False)
    words = ["prepare", "text", source, "--out", tmp_path / "out", *IN_ALL, "--max-document", 8]
    assert "a.parquet row 1 is longer than 8 MiB" in run_limited("dlm.cli", *words).complaint
