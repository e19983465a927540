"""Every file below a source is read, or it is named as passed over; every document is kept, or it is counted."""

import gzip
import json
import os
import shutil

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard
from support.text_sources import TEXTS, as_saved, lines, make_texts, prepare, refusal, tokens_in

from dlm.core.files import read_json, read_jsonl, write_json
from dlm.data.prepare.documents import Unit, read_unit


def documents_in(out):
    """The documents of both splits, in order."""
    both = bytes(tokens_in(out, "train")) + bytes(tokens_in(out, "validation"))
    return sorted(document.decode() for document in both.split(b"\0")[:-1])


@pytest.fixture
def prepared(source, tmp_path, capsys):
    """Prepare the source, and return the documents and the notes of the manifest."""

    def run(*options, folder=source):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        assert prepare(folder, "--out", out, "--tokenizer", "bytes", "--workers", "1", *options) == 0
        return documents_in(out), read_json(out / "manifest.json")["notes"]

    return run


def test_links_are_followed_once_and_json_is_read_in_every_form(source, tmp_path, prepared):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (source / "a.jsonl").write_bytes(lines(TEXTS[:30]))
    (source / "b.json.gz").write_bytes(gzip.compress(lines(TEXTS[30:60])))
    (source / "c.json").write_text(json.dumps([{"text": text} for text in TEXTS[60:90]], indent=1))
    (source / "d.json.zst").write_bytes(zstandard.compress(json.dumps([{"text": t} for t in TEXTS[90:110]]).encode()))
    (elsewhere / "e.jsonl").write_bytes(lines(TEXTS[110:120]))
    (source / "linked").symlink_to(elsewhere)
    (source / "again").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(source)
    (source / "same.jsonl").symlink_to(source / "a.jsonl")
    os.link(source / "a.jsonl", source / "z.jsonl")
    documents, notes = prepared()
    assert documents == sorted(TEXTS[:120])
    assert {kind: (item["files"], item["documents"]) for kind, item in notes["read"].items()} == {
        ".jsonl": (2, 40), ".json.gz": (1, 30), ".json": (1, 30), ".json.zst": (1, 20),
    }  # fmt: skip
    assert notes["passed_over"]["reached already by another path"]["files"] == 4


@pytest.mark.parametrize("content", ["", " ", "\n", "\ufeff"])
@pytest.mark.parametrize("chars", [1, 7, 100, 10**6])
def test_an_array_is_read_in_pieces_of_any_size(content, chars, source, prepared, monkeypatch):
    monkeypatch.setattr("dlm.data.prepare.rows.ARRAY_CHARS", chars)
    rows = [{"text": text, "n": [n, {"m": "]"}]} for n, text in enumerate(TEXTS[:9])]
    (source / "a.json").write_text(content + json.dumps(rows) + content.strip("\ufeff"))
    unit = Unit(split=None, kind=".json", paths=(str(source / "a.json"),), size=1)
    assert list(read_unit(unit, "text")) == TEXTS[:9]
    (source / "a.json").write_text(" [ ] ")
    assert list(read_unit(unit, "text")) == []


def test_what_a_set_says_of_itself_is_checked(source, tmp_path, capsys, prepared):
    as_saved(TEXTS, source)
    capsys.readouterr()  # the progress bar of datasets
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes")
    (source / "saved" / "data-00001-of-00003.arrow").unlink()
    said = refusal(capsys, source, *options)
    assert "data-00001-of-00003.arrow is missing" in said and "state.json" in said and "--skip-unreadable" in said
    documents, notes = prepared("--skip-unreadable")
    assert len(documents) == 133 and "data-00001-of-00003.arrow is missing" in notes["unreadable"][0]
    shutil.rmtree(source / "saved")
    for number in (0, 2):
        pq.write_table(pa.table({"text": TEXTS[number::3]}), source / f"train-{number:05d}-of-00003-ab.parquet")
    assert "train-00001-of-00003-ab.parquet is missing" in refusal(capsys, source, *options)
    assert len(prepared("--skip-unreadable")[0]) == 134 - 1
    assert len(prepared(folder=source / "train-00000-of-00003-ab.parquet")[0]) == 67  # a file that is named itself


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("b.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of git-lfs"),
        ("b.jsonl", gzip.compress(lines(TEXTS)), "is a gzip file"),
        ("b.parquet", b"ARROW1\0\0", "is an Arrow file"),
        ("b.feather", b"FEA1", "is a Feather file of version 1"),
        ("b.jsonl.bz2", b"BZh9", "of a kind that dlm does not read"),
        ("b.csv", b"text\na\n", "of a kind that dlm does not read"),
        ("b.jsonl", None, "is a link that leads nowhere"),
        ("b.parquet", b"", "is damaged or no .parquet file"),
        ("b.jsonl.zst", zstandard.compress(lines(TEXTS))[:-20], "is damaged or no .jsonl.zst file (Truncated"),
        ("b.json", b'[{"text": "a"}, {"text": "b"} {', "is no valid JSON array"),
        ("b.json", b'[{"text": "a"}', "is no valid JSON array"),
        ("b.txt", b"caf\xe9", "is not UTF-8 text"),
        ("b.json", b'{"data": [{"text": "a"}]}\n', "is one JSON object without the key 'text'"),
        ("b.json", b'{\n "text": "a"\n}\n', "or over several lines"),
        ("b.jsonl.gz", b"", "is damaged or no .jsonl.gz file (it is empty)"),
        ("part-00000", lines(TEXTS), "of a kind that dlm does not read"),
    ],
)
def test_what_looks_like_data_and_cannot_be_read_is_an_error_or_noted(
    name, content, words, source, tmp_path, capsys, prepared
):
    (source / "a.jsonl").write_bytes(lines(TEXTS))
    if content is None:
        (source / name).symlink_to(source / "gone.jsonl")
    else:
        (source / name).write_bytes(content)
    said = refusal(capsys, source, "--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "1")
    assert words in said and name in said and "--skip-unreadable" in said
    documents, notes = prepared("--skip-unreadable")
    assert set(TEXTS) <= set(documents) and words in notes["unreadable"][0]


def test_hidden_files_descriptions_and_copies_are_passed_over_and_said(source, prepared, capsys):
    (source / "a.jsonl").write_bytes(lines(TEXTS))
    (source / "b.jsonl").write_bytes(lines(TEXTS))
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", ".git/x/y.txt", "README.txt", "LICENSE", "SHA256SUMS.txt",
                 "dataset_info.json", "notes.md", "__MACOSX/._a.jsonl", ".a.jsonl.swp"):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text('{"text": "no document"}\n')
    (source / "readme_corpus.jsonl").write_bytes(lines(["a corpus of readme files"]))
    documents, notes = prepared()
    assert documents == sorted([*TEXTS, "a corpus of readme files"])
    assert {reason: item["files"] for reason, item in notes["passed_over"].items()} == {
        "hidden": 4, "no documents, by their names": 4, "of a kind that dlm does not read": 1,
        "copies of other files": 1,
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "read 2 .jsonl files (201 documents)" in said
    assert f"passed over 1 file, {len(lines(TEXTS)):,} bytes, copies of other files: {source / 'b.jsonl'}" in said


def test_zstd_of_any_window_arrow_files_and_feather_are_read(source, prepared):
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    with open(source / "a.jsonl.zst", "wb") as stream, zstandard.ZstdCompressor(
        compression_params=wide
    ).stream_writer(stream) as writer:  # fmt: skip
        writer.write(lines(TEXTS[:50]))
    table = pa.table({"text": TEXTS[50:100]})
    with pa.ipc.new_file(source / "b.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=7)
    pa.feather.write_feather(pa.table({"text": TEXTS[100:150]}), source / "c.feather", compression="zstd")
    with pa.ipc.new_stream(source / "d.arrow", table.schema) as file:
        file.write_table(pa.table({"text": TEXTS[150:]}))
    assert prepared()[0] == sorted(TEXTS)


BAD_ROWS = {
    "null": (b'{"text": null}', "'text' is null, no text"),
    "surrogate": (b'{"text": "a\\ud800b"}', "U+D800, one half of a surrogate pair"),
    "digits": (b'{"text": "a", "n": %s}' % (b"1" * 5000), "Exceeds the limit (4300 digits)"),
    "nesting": (b'{"text": "a", "n": %s%s}' % (b"[" * 200_000, b"]" * 200_000), "nested too deeply"),
    "torn": (b'{"text": "a', "is not valid JSON"),
    "twice": (b'{"text": "a", "text": "b"}', "has a key twice"),
    "no object": (b"[1]", "is no JSON object"),
    "another key": (b'{"body": "a"}', "has no key 'text': it has body"),
    "bytes": (b'{"text": "\xff"}', "is not valid JSON"),
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named_and_can_be_left_out(row, source, tmp_path, capsys, prepared):
    content, words = BAD_ROWS[row]
    (source / "a.jsonl").write_bytes(lines(TEXTS[:3]) + content + b"\n" + lines(TEXTS[3:]))
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "1")
    said = refusal(capsys, source, *options)
    assert "a.jsonl:4" in said and words in said and "--skip-bad" in said and len(said) < 400
    documents, notes = prepared("--skip-bad", "1")  # the work so far is continued
    assert documents == sorted(TEXTS) and notes["skipped"]["without text"] == 1
    assert len(notes["rows_without_text"]) == 1 and words in notes["rows_without_text"][0]


def test_bad_values_of_tables_are_named_by_their_row(source, tmp_path, capsys, prepared):
    data = pa.array([b"fine", b"\xff\xfe", b"fine too"])
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, data.buffers())}), source / "a.parquet")
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes")
    assert "a.parquet row 2 is not UTF-8 text (byte 0)" in refusal(capsys, source, *options)
    assert prepared("--skip-bad", "1")[0] == ["fine", "fine too"]
    two = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(two, source / "b.parquet")
    shutil.rmtree(tmp_path / "out")
    said = refusal(capsys, source, *options, "--skip-bad", "1")
    assert "b.parquet has 2 columns 'text'" in said


def test_more_bad_rows_than_allowed_are_refused_across_files(source, tmp_path, capsys, prepared):
    for number in range(3):
        content = lines(make_texts(20, seed=number)) + b'{"text": null}\n'
        suffix = ("jsonl", "jsonl.gz")[number % 2]  # no two files share a unit
        (source / f"{number}.{suffix}").write_bytes(gzip.compress(content) if number % 2 else content)
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "1")
    said = refusal(capsys, source, *options, "--skip-bad", "2")
    assert "3 rows or more hold no text, and --skip-bad allows 2" in said
    documents, notes = prepared("--skip-bad", "3")
    assert len(documents) == 60 and len(notes["rows_without_text"]) == 3
    assert "must be 0 or above" in refusal(capsys, source, *options, "--skip-bad", "-1")


def test_rows_that_an_earlier_command_left_out_still_count(source, tmp_path, capsys, prepared):
    (source / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS) + b'{"text": null}\n'))
    (source / "b.txt").write_bytes(b"caf\xe9")
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "1")
    assert "b.txt is not UTF-8" in refusal(capsys, source, *options, "--skip-bad", "1")
    (source / "b.txt").write_text("text")
    assert "--skip-bad allows 0" in refusal(capsys, source, *options)
    assert len(prepared("--skip-bad", "1")[0]) == 201


def test_units_whose_files_did_not_change_are_not_encoded_again(source, tmp_path, capsys):
    for number in range(4):
        content = lines(make_texts(50, seed=number)) + (b'{"text": null}\n' if number == 2 else b"")
        suffix = ("jsonl", "jsonl.gz")[number % 2]
        (source / f"{number}.{suffix}").write_bytes(gzip.compress(content) if number % 2 else content)
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "1", "--validation-share", "0.1")
    assert "2.jsonl:51" in refusal(capsys, source, *options)
    building = tmp_path / ".out.building"
    done = {record["key"] for record in read_jsonl(building / "done.jsonl")}
    assert len(done) >= 2
    inodes = {path.stat().st_ino for path in (building / "data").glob("*_out_*") if path.name.split("_")[2] in done}
    (source / "2.jsonl").write_bytes(lines(make_texts(50, seed=2)))
    assert prepare(source, *options) == 0
    assert inodes <= {path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    assert prepare(source, *options[:1], tmp_path / "anew", *options[2:], "--name", "out") == 0
    anew, out = tmp_path / "anew", tmp_path / "out"
    assert {p.name: p.read_bytes() for p in anew.glob("*.bin")} == {p.name: p.read_bytes() for p in out.glob("*.bin")}
    building.mkdir()
    write_json(building / "plan.json", {"name": "out"})
    (building / "done.jsonl").write_text('{"unit": 0}\n')
    shutil.rmtree(out)
    assert "of another version of dlm: delete that folder" in refusal(capsys, source, *options)


def test_a_data_set_is_not_built_in_a_folder_that_others_put_there(source, tmp_path, capsys, monkeypatch):
    (source / "a.jsonl").write_bytes(lines(TEXTS))
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "1")
    building, elsewhere = tmp_path / ".out.building", tmp_path / "elsewhere"
    elsewhere.mkdir()
    building.symlink_to(elsewhere)
    assert ".out.building is a link" in refusal(capsys, source, *options)
    assert not any(elsewhere.iterdir())
    building.unlink()
    building.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: building.stat().st_uid + 1)
        assert ".out.building belongs to another user" in refusal(capsys, source, *options)
    assert prepare(source, *options) == 0


def test_a_changed_validation_file_is_held_out_of_training(source, tmp_path, capsys):
    (source / "train_0.jsonl").write_bytes(lines(TEXTS))
    (source / "train_1.jsonl.gz").write_bytes(gzip.compress(b'{"text": null}\n'))  # stops after the first file
    (source / "valid.jsonl").write_bytes(lines(["held out"]))
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "1")
    refusal(capsys, source, *options)
    (source / "train_1.jsonl.gz").unlink()
    (source / "valid.jsonl").write_bytes(lines(["held out", TEXTS[7]]))
    assert prepare(source, *options) == 0
    assert "left out: 1 in validation" in capsys.readouterr().out


def test_sources_that_overlap_are_read_once(source, tmp_path, prepared):
    (source / "x").mkdir()
    (source / "x" / "a.jsonl").write_bytes(lines(TEXTS[:90]))
    (source / "x" / "b.jsonl").write_bytes(lines(TEXTS[90:]))
    options = ("--out", tmp_path / "both", "--tokenizer", "bytes", "--workers", "1")
    for sources in ((source, source), (source / "x" / "a.jsonl", source), (source, source / "x")):
        assert prepare(*sources, *options) == 0
        assert documents_in(tmp_path / "both") == sorted(TEXTS)
        shutil.rmtree(tmp_path / "both")
    for held_out in (source / "x" / "b.jsonl", source / "x"):
        (source / "more.jsonl").write_bytes(lines(["more"]))
        documents, notes = prepared("--validation-source", str(held_out))
        assert documents == sorted([*TEXTS, "more"])
        assert notes["documents"]["validation"] == (110 if held_out.suffix else 200)


def test_files_of_one_size_that_begin_alike_are_no_copies(source, prepared, monkeypatch):
    monkeypatch.setattr("dlm.data.prepare.sources.START_BYTES", 10)
    (source / "a.jsonl").write_bytes(lines(["one document"]))
    (source / "b.jsonl").write_bytes(lines(["two document"]))
    assert prepared()[0] == ["one document", "two document"]


def test_only_arrow_files_beside_a_saved_set_are_its_cache(source, prepared):
    as_saved(TEXTS, source)
    (source / "saved" / "more.jsonl").write_bytes(lines(["more"]))
    shutil.copy(source / "saved" / "data-00000-of-00003.arrow", source / "saved" / "cache-1.arrow")
    documents, notes = prepared()
    assert documents == sorted([*TEXTS, "more"])
    assert notes["passed_over"]["cache files, which state.json does not list"]["files"] == 1
    for items in (["x"], [{"filename": 3}], [{"name": "x"}], None):
        write_json(source / "state.json", {"_data_files": items})
        assert prepared()[0] == documents


def test_series_may_count_from_one(source, tmp_path, capsys, prepared):
    for number in (1, 2, 3):
        (source / f"a-{number:05d}-of-00003.jsonl").write_bytes(lines(TEXTS[number::3]))
    assert len(prepared()[0]) == 66 + 66 + 67
    (source / "a-00002-of-00003.jsonl").unlink()
    said = refusal(capsys, source, "--out", tmp_path / "none", "--tokenizer", "bytes")
    assert "a-00002-of-00003.jsonl is missing" in said and "more of the kind" not in said


@pytest.mark.parametrize(
    "edit",
    [
        lambda content, batch: content[:batch] + b"\xff\xff\xff\xff\0\0\0\0" + content[batch + 8 :],  # an early end
        lambda content, batch: content[:batch],
        lambda content, batch: content[:batch] + bytes(len(content) - batch),
    ],
)
def test_an_arrow_stream_of_which_the_end_is_lost_is_damaged(edit, source, tmp_path, capsys):
    as_saved(TEXTS, source)
    capsys.readouterr()
    for path in (source / "saved").glob("*.arrow"):
        content = bytearray(path.read_bytes())
        second = content.find(b"\xff\xff\xff\xff", 8)  # the mark of the first batch, behind the schema
        path.write_bytes(edit(content, second))
    said = refusal(capsys, source, "--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "1")
    assert "has no mark at the end of its stream" in said


def test_the_target_may_lie_within_the_source(source, capsys):
    (source / "a.jsonl").write_bytes(lines(TEXTS))
    for _ in range(2):
        assert prepare(source, "--out", source / "out", "--tokenizer", "bytes", "--workers", "1") == 0
    options = ("--out", source / "two", "--tokenizer", "bytes", "--workers", "1")
    assert prepare(source, *options) == 0
    assert "prepared data of dlm" in capsys.readouterr().out


def test_the_end_of_a_document_is_no_byte_of_text(source, tmp_path, capsys, prepared):
    (source / "a.jsonl").write_bytes(lines(TEXTS))
    said = refusal(capsys, source, "--out", tmp_path / "out", "--tokenizer", "bytes", "--eos-id", "10")
    assert "--eos-id is 10, a byte that documents hold" in said
    said = refusal(capsys, source, "--out", tmp_path / "out", "--tokenizer", "bytes", "--bos-id", "65")
    assert "--bos-id is 65, a byte that documents hold" in said
    prepared("--eos-id", "255")


def test_a_name_that_is_no_text_is_printed(source, prepared, capsys):
    (source / "a.jsonl").write_bytes(lines(TEXTS[:5]) + b'{"\ud800": 1}\n')
    with open(os.fsencode(source) + b"/n\xff.md", "w"):
        pass
    prepared("--skip-bad", "1")
    assert "\\udcff.md" in capsys.readouterr().out
