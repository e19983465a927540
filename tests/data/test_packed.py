"""LITPKDS files byte for byte, sequences by number, and manifests that notice what is wrong."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm.core.errors import UserError
from dlm.data.manifest import read_manifest
from dlm.data.packed import DTYPES, PackedTokens, encode_packed, open_packed, open_split
from dlm.data.prepare import index
from dlm.data.prepare.command import ensure_data, index_packed, main, prepare_stdlib


def write(path, tokens, dtype="<u2"):
    path.write_bytes(encode_packed(np.asarray(list(tokens), dtype=dtype)))
    return path


def test_the_bytes_are_those_of_the_format(tmp_path):
    header = b"LITPKDS" + struct.pack("<Q", 1) + struct.pack("<B", 8) + struct.pack("<Q", 3)
    assert len(header) == 24
    assert encode_packed(np.array([1, 2, 258], dtype=np.uint16)) == header + b"\x01\x00\x02\x00\x02\x01"
    (tmp_path / "a.bin").write_bytes(header + b"\x01\x00\x02\x00\x02\x01")
    assert open_packed(tmp_path / "a.bin").tolist() == [1, 2, 258]
    codes = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f4", 7: "f8", 8: "u2"}  # lit-gpt packed_dataset.py
    assert {code: name.removeprefix("<") for code, name in DTYPES.items()} == codes


@given(code=st.sampled_from([1, 2, 3, 4, 5, 8]), tokens=st.lists(st.integers(0, 127), max_size=50))
def test_tokens_are_read_as_they_were_written(code, tokens, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("packed") / "a.bin", tokens, DTYPES[code])
    assert open_packed(path).tolist() == tokens and path.read_bytes()[15] == code


GOOD = encode_packed(np.arange(10, dtype=np.uint16))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "begin with the bytes LITPKDS"),
        (GOOD[:20], "begin with the bytes LITPKDS"),
        (b"LITPKDX" + GOOD[7:], "begin with the bytes LITPKDS"),
        (GOOD[:7] + struct.pack("<Q", 2) + GOOD[15:], "version 2"),
        (GOOD[:15] + b"\x09" + GOOD[16:], "dtype code 9"),
        (GOOD[:15] + b"\x06" + GOOD[16:], "dtype code 6"),  # floats are no tokens
        (GOOD[:-1], "inside a token"),
    ],
)
def test_a_file_that_is_no_packed_file_is_refused(content, word, tmp_path):
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(UserError, match=word) as error:
        open_packed(tmp_path / "bad.bin")
    assert "bad.bin" in str(error.value) and "\n" not in str(error.value)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), block=st.integers(1, 7), gap=st.integers(0, 2),
       order=st.randoms(use_true_random=False))  # fmt: skip
def test_any_order_of_rows_is_reading_one_after_another(lengths, block, gap, order, tmp_path_factory):
    folder, stride = tmp_path_factory.mktemp("packed"), block + gap
    paths, token = [], 0
    for number, length in enumerate(lengths):
        paths.append(write(folder / f"{number}.bin", range(token, token + length)))
        token += length
    everything = list(range(token))  # no file's tail is lost: the next file goes on
    expected = [everything[i : i + block] for i in range(0, token, stride) if i + block <= token]
    packed = PackedTokens(paths, block_size=block, stride=stride)
    assert len(packed) == len(expected)
    if expected:
        index = np.array([order.randrange(len(expected)) for _ in range(20)])
        rows = packed.rows(index)
        assert rows.dtype == np.int64 and rows.tolist() == [expected[i] for i in index]


def test_blocks_of_2049_hold_sequences_of_2048(tmp_path):
    tokens = np.arange(3 * 2049)
    packed = PackedTokens([write(tmp_path / "a.bin", tokens)], block_size=2048, stride=2049)
    assert len(packed) == 3  # the third has no token to spare, and needs none
    assert packed.rows(np.array([2, 0])).tolist() == [tokens[4098:6146].tolist(), tokens[:2048].tolist()]
    shorter = PackedTokens([write(tmp_path / "b.bin", tokens[:-2])], block_size=2048, stride=2049)
    assert len(shorter) == 2


@pytest.fixture
def folder(tmp_path):
    """A folder of packed files as TinyLlama's scripts leave it."""
    made = tmp_path / "slim"
    made.mkdir()
    for name, n in (("train_slim_0_0", 500), ("train_slim_1_0", 300), ("validation_0", 100)):
        write(made / f"{name}.bin", np.arange(n) % 97)
    return made


def test_a_folder_of_packed_files_is_indexed(folder, capsys):
    assert main(["packed", str(folder), "--vocab-size", "100"]) == 0
    assert "800 train, 100 validation" in capsys.readouterr().out
    manifest = read_manifest(folder)
    assert manifest is not None and (manifest.tokens("train"), manifest.vocab_size) == (800, 100)
    for file in manifest.splits["train"]:
        data = (folder / file.name).read_bytes()
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(open_split(folder, manifest, "train", block_size=100, stride=100)) == 8
    with pytest.raises(UserError, match="not one sequence of 101"):
        open_split(folder, manifest, "validation", block_size=101, stride=101)


def test_a_folder_that_cannot_be_indexed_is_refused(folder, tmp_path, capsys):
    assert main(["packed", str(folder), "--vocab-size", "90"]) == 2
    assert "holds token 96" in capsys.readouterr().err
    assert main(["packed", str(tmp_path)]) == 2
    assert "holds no train*.bin" in capsys.readouterr().err
    for split, empty in (("train", "none_*.bin"), ("validation", "none_0.bin")):
        write(folder / "none_0.bin", [])
        assert main(["packed", str(folder), "--vocab-size", "100", f"--{split}", empty]) == 2
        assert "none_0.bin holds no tokens: copy it again" in capsys.readouterr().err
        skipping = ["--skip-unreadable", "--vocab-size", "100", f"--{split}", empty]
        assert main(["packed", str(folder), *skipping]) == 2
        said = f"dlm: the {empty} of {folder} hold no tokens: set --{split} to files that do\n"
        assert capsys.readouterr().err == said
    write(folder / "train_slim_2_0.bin", [3, -1], "<i4")
    assert main(["packed", str(folder), "--vocab-size", "100"]) == 2
    assert "holds token -1" in capsys.readouterr().err
    assert read_manifest(folder) is None
    with pytest.raises(UserError, match="no prepared data in"):
        ensure_data({"data_dir": folder, "prepare": None})


def test_damage_to_prepared_data_is_noticed(folder):
    index_packed(folder, vocab_size=100, bos_id=1, tokenizer="none")
    stated = (folder / "manifest.json").read_text()
    path = folder / "train_slim_1_0.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"train_slim_1_0\.bin holds 622 bytes where its manifest says 624"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"train_slim_1_0\.bin is missing"):
        read_manifest(folder)
    path.write_bytes(whole)
    assert read_manifest(folder) is not None
    for damaged, word in (
        (stated.replace('"tokens": 500', '"tokens": 501'), "does not match its own hash"),
        (stated[:100], "not valid JSON"),
        ("{}", "is no manifest"),
        ("[]", "is no manifest"),
    ):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(UserError, match=word):
            read_manifest(folder)


def test_the_hash_is_of_the_content_and_of_nothing_else(folder, tmp_path):
    first = index_packed(folder, vocab_size=100, bos_id=1, tokenizer="none")
    elsewhere = folder.rename(tmp_path / "elsewhere")
    assert index_packed(elsewhere, vocab_size=100, bos_id=1, tokenizer="other").hash == first.hash
    assert index_packed(elsewhere, vocab_size=101, bos_id=1, tokenizer="none").hash != first.hash
    write(elsewhere / "validation_0.bin", [1] * 100)
    assert index_packed(elsewhere, vocab_size=100, bos_id=1, tokenizer="none").hash != first.hash


def test_the_standard_library_is_prepared_with_disjoint_splits(stdlib_data, tmp_path):
    folder = stdlib_data / "stdlib"
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.vocab_size == 256 and manifest.bos_id == 0
    splits = {}
    for split, files in manifest.splits.items():
        data = b"".join(open_packed(folder / file.name).tobytes() for file in files)
        assert data.endswith(b"\0")
        splits[split] = data[:-1].split(b"\0")
    assert Path(json.__file__).read_bytes() in splits["train"] + splits["validation"]
    assert not set(splits["train"]) & set(splits["validation"])  # no document is in both
    assert 0.02 < manifest.tokens("validation") / manifest.tokens("train") < 0.1
    assert prepare_stdlib(tmp_path / "again").hash == manifest.hash
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.fixture
def small_library(tmp_path_factory, monkeypatch):
    """A standard library of forty short files."""
    root = tmp_path_factory.mktemp("lib")
    for number in range(40):
        (root / f"module_{number}.py").write_text(f"x = {number}\n" * 10)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})


def test_damaged_data_are_prepared_again(tmp_path, small_library):
    folder = tmp_path / "stdlib"
    whole = prepare_stdlib(folder)
    first = folder / whole.splits["train"][0].name
    for damage in (
        lambda: first.write_bytes(first.read_bytes()[:100]),
        first.unlink,
        (folder / "manifest.json").unlink,
        lambda: (folder / "manifest.json").write_text('{"name": '),
    ):
        damage()
        prepare_stdlib(folder)
        assert read_manifest(folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["stdlib"]


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path, small_library):
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="stdlib exists and holds something else: move it away"):
        prepare_stdlib(tmp_path / "stdlib")
    assert [path.name for path in tmp_path.iterdir()] == ["stdlib"]
    assert (tmp_path / "stdlib" / "thesis.txt").read_text() == "mine"


def test_the_filling_of_a_builder_is_left_out_and_said(tmp_path, capsys):
    """TinyLlama's `write_reminder` writes a whole chunk, of which only the beginning is text."""
    text = np.arange(1, 5001, dtype=np.uint16) % 90
    write(tmp_path / "train_0.bin", text)
    write(tmp_path / "train_1.bin", [*text[:4001], *[1] * 9000])
    write(tmp_path / "train_2.bin", [*text[:9], *[7] * 2500, *text[:9]])
    write(tmp_path / "validation_0.bin", [*text[:4001], *[1] * 2048])  # no longer than a sequence: it may be text
    write(tmp_path / "test_0.bin", text)
    write(tmp_path / "train_3.bin", text)
    assert main(["packed", str(tmp_path), "--vocab-size", "100"]) == 0
    said = capsys.readouterr().out
    assert "train_1.bin ends in 8,999 times the same token" in said and "left out" in said
    assert "train_2.bin holds 2,500 tokens in runs of one token that are longer than 2,048: they are kept" in said
    assert "train_3.bin holds the same bytes as another file" in said
    assert "passed over 1 .bin files that no pattern names, such as test_0.bin" in said
    manifest = read_manifest(tmp_path)
    assert [file.tokens for file in manifest.splits["train"]] == [5000, 4002, 2518, 5000]
    assert manifest.tokens("validation") == 6049
    tokens = open_split(tmp_path, manifest, "train", block_size=100, stride=100)
    assert len(tokens) == (5000 + 4002 + 2518 + 5000) // 100
    stream = [*text, *text[:4001], 1, *text[:9], *[7] * 2500, *text[:9], *text]
    assert tokens.rows(np.arange(len(tokens))).reshape(-1).tolist() == stream[: len(tokens) * 100]
    assert main(["packed", str(tmp_path), "--vocab-size", "100", "--no-strip-filling"]) == 0
    assert "kept, because of --no-strip-filling" in capsys.readouterr().out
    assert read_manifest(tmp_path).tokens("train") == 5000 + 13001 + 2518 + 5000


def test_runs_are_found_across_the_parts_in_which_a_file_is_scanned(monkeypatch):
    monkeypatch.setattr(index, "SCAN_TOKENS", 10)
    monkeypatch.setattr(index, "BLOCK_TOKENS", 4)
    for at_end, within in ((0, 0), (0, 7), (12, 7), (25, 31)):
        tokens = np.array([1, 2, *[3] * within, 1, 2, *[4] * at_end])
        assert index.long_runs(tokens) == index.Runs(at_end=at_end, within=within)


def test_a_packed_file_of_which_the_header_says_more_is_refused(tmp_path, capsys):
    data = encode_packed(np.arange(16392, dtype=np.uint16) % 90)
    write(tmp_path / "train_0.bin", np.arange(100, dtype=np.uint16) % 90)
    (tmp_path / "train_1.bin").write_bytes(data[: 24 + 8196 * 2])
    (tmp_path / "train_2.bin").write_bytes(data + data[24 : 24 + 100 * 2])  # a chunk and a part of another
    write(tmp_path / "validation_0.bin", [1, 2])
    assert main(["packed", str(tmp_path), "--vocab-size", "100"]) == 2
    said = capsys.readouterr().err
    assert "train_1.bin is truncated" in said and "8,196 tokens and its header says 16,392" in said
    assert main(["packed", str(tmp_path), "--vocab-size", "100", "--skip-unreadable"]) == 0
    said = capsys.readouterr().out
    assert "8,196 tokens and its header says 16,392" in said and "16,492 tokens and its header" in said
    manifest = read_manifest(tmp_path)
    assert manifest.tokens("train") == 100 and "train_1.bin" in manifest.notes["unreadable"][0]
