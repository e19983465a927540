"""What is no document, no source or no option is named in one line, with its place."""

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.text_sources import TEXTS, lines, refusal

from dlm.core.errors import UserError
from dlm.core.paths import PACKAGE
from dlm.data.prepare.command import main
from dlm.data.prepare.documents import Unit, read_unit
from dlm.data.prepare.splits import find_splits
from dlm.data.prepare.units import make_units


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', ["a.jsonl:2", "not valid JSON"]),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', ["a.jsonl:3", "no JSON object"]),
        ("a.jsonl", b'{"content": "x", "id": 1}\n', ["a.jsonl:1", "no key 'text'", "content, id", "--text-key"]),
        ("a.jsonl", b'{"text": 7}\n', ["a.jsonl:1", "'text' is 7"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl:1", "not valid JSON"]),
        ("a.jsonl.zst", zstandard.compress(lines(TEXTS))[:-20], ["a.jsonl.zst is damaged", "Truncated"]),
        ("a.jsonl.zst", lines(TEXTS), ["a.jsonl.zst is damaged or no .jsonl.zst file"]),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-20], ["a.jsonl.gz is damaged", "ended before the end"]),
        ("a.jsonl.gz", lines(TEXTS), ["a.jsonl.gz is damaged"]),
        ("a.parquet", b"PAR1 no more", ["a.parquet is damaged or no .parquet file"]),
        ("a.arrow", b"no arrow at all", ["a.arrow is damaged"]),
        ("a.txt", b"caf\xe9", ["a.txt is not UTF-8", "byte 3"]),
    ],
)
def test_a_line_or_file_that_is_no_document_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    (unit,) = make_units(find_splits([tmp_path]).files)
    with pytest.raises(UserError) as error:
        list(read_unit(unit, "text"))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_a_bad_line_of_a_slice_has_its_number_in_the_file(tmp_path):
    content = lines(TEXTS) + b"bad\n" + lines(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(content)
    start = len(lines(TEXTS[:70])) + 3
    unit = Unit(split=None, kind=".jsonl", paths=(str(tmp_path / "a.jsonl"),), size=1, start=start, stop=len(content))
    with pytest.raises(UserError, match=r"a\.jsonl:201 is not valid JSON"):
        list(read_unit(unit, "text"))


def test_tables_without_the_text_name_their_columns(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    for name, words in (("a", ["no column 'text'", "body, id"]), ("b", ["b.parquet row 2", "null, no text"])):
        unit = Unit(split=None, kind=".parquet", paths=(str(tmp_path / f"{name}.parquet"),), size=1)
        with pytest.raises(UserError) as error:
            list(read_unit(unit, "text"))
        assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--tokenizer", "bytes"], ["nowhere does not exist"]),
        (["empty", "--tokenizer", "bytes"], ["empty holds no documents", ".jsonl"]),
        (["blank", "--tokenizer", "bytes"], ["blank holds no documents"]),
        (["one", "--tokenizer", "bytes"], ["no documents to train on", "--validation-share"]),
        (["empty/notes.md", "--tokenizer", "bytes"], ["notes.md is of a kind that dlm does not read", ".parquet"]),
        (["one", "--tokenizer", "missing.model"], ["no tokenizer in missing.model", "bytes"]),
        (["one", "--tokenizer", "empty"], ["no tokenizer in empty"]),
        (["one", "--tokenizer", "torn.json"], ["torn.json is no Hugging Face tokenizer"]),
        (["one", "--tokenizer", "torn.model"], ["torn.model is no sentencepiece model"]),
        (["one", "--tokenizer", "bytes", "--validation-share", "0"], ["--validation-share is 0"]),
        (["one", "--tokenizer", "bytes", "--eos-id", "256"], ["--eos-id is 256", "256"]),
        (["one", "--tokenizer", "bytes", "--workers", "0"], ["--workers is 0"]),
        (["one", "--tokenizer", "bytes", "--name", "a/b"], ["--name is 'a/b'"]),
        (["one", "--tokenizer", "bytes", "--vocab-size", "50", "--validation-share", ".5"], ["gives token", "50"]),
    ],
)
def test_a_command_that_makes_no_data_set_is_refused_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "blank", "one"):
        Path(name).mkdir()
    Path("empty/notes.md").write_text("x")
    Path("blank/a.jsonl").write_bytes(b"\n" + lines([""]))
    Path("one/a.txt").write_text("one document")
    Path("torn.json").write_text("{")
    Path("torn.model").write_text("{")
    said = refusal(capsys, *arguments, "--out", "out")
    assert all(word in said for word in words), said
    assert not Path("out").exists()


def test_main_returns_the_exit_code_of_help_and_of_wrong_arguments(capsys):
    assert main(["text", "--help"]) == 0 and "--tokenizer" in capsys.readouterr().out
    assert main(["text"]) == 2 and "required: SOURCE" in capsys.readouterr().err
    assert main([]) == 2 and "text,stdlib,packed" in capsys.readouterr().err


def test_preparing_loads_no_library_that_it_does_not_use():
    code = "import sys, dlm.data.prepare.command; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert {"torch", "tokenizers", "sentencepiece", "zstandard", "pyarrow", "datasets"}.isdisjoint(done.stdout.split())
