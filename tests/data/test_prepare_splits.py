"""Which documents are held out: the splits of the sources are kept, and no document is in both."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.text_sources import TEXTS, as_jsonl, lines, prepare, refusal, tokens_in


def folders(root, train, held_out, name="validation"):
    """As SlimPajama lies on a disk."""
    for split, texts in (("train", train), (name, held_out)):
        (root / split / "chunk1").mkdir(parents=True)
        (root / split / "chunk1" / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines(texts)))


def stream(texts):
    return [token for text in texts for token in (*text.encode(), 0)]


@pytest.mark.parametrize("how", ["folders", "test folder", "files", "saved", "hub", "named"])
def test_the_splits_of_the_sources_are_kept_and_stay_disjoint(how, source, tmp_path, capsys):
    train, held_out = TEXTS[:150], [*TEXTS[150:], TEXTS[7]]  # one document is in both
    arguments = [source]
    if how == "folders":
        folders(source, train, held_out)
        (source / "test").mkdir()
        (source / "test" / "x.jsonl").write_bytes(lines(["a test text"]))
    elif how == "test folder":
        folders(source, train, held_out, "test")
    elif how == "saved":
        import datasets

        parts = {"train": train, "validation": held_out}
        datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in parts.items()}).save_to_disk(
            source
        )
    elif how == "hub":
        (source / "data").mkdir()
        for name, texts in (("train-00000-of-00001-abc", train), ("validation-00000-of-00001", held_out)):
            pq.write_table(pa.table({"text": texts}), source / "data" / f"{name}.parquet")
    else:
        names = ("train", "valid") if how == "files" else ("one", "two")
        for name, texts in zip(names, (train, held_out), strict=True):
            (source / f"{name}.jsonl").write_bytes(lines(texts))
        if how == "named":
            arguments = [source / "one.jsonl", "--validation-source", source / "two.jsonl"]
    assert prepare(*arguments, "--out", tmp_path / "out", "--tokenizer", "bytes") == 0
    assert tokens_in(tmp_path / "out", "validation") == stream(held_out)
    assert tokens_in(tmp_path / "out", "train") == stream([text for text in train if text != TEXTS[7]])
    assert "left out: 1 in validation" in capsys.readouterr().out


def test_equal_documents_are_never_in_both_splits(source, tmp_path):
    as_jsonl(TEXTS * 3, source)
    assert prepare(source, "--out", tmp_path / "out", "--tokenizer", "bytes", "--validation-share", "0.3") == 0
    sets = [set(bytes(tokens_in(tmp_path / "out", split)).split(b"\0")[:-1]) for split in ("train", "validation")]
    assert not sets[0] & sets[1] and sets[0] | sets[1] == {text.encode() for text in TEXTS}


def test_three_documents_make_a_data_set(source, tmp_path, capsys):
    (source / "a.txt").write_text("one")
    (source / "b.txt").write_text("two")
    (source / "c.jsonl").write_bytes(lines(["", "three", "nul\0within"]))
    assert prepare(source, "--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "7") == 0
    assert "2 train, 1 validation documents; left out: 1 empty, 1 with NUL" in capsys.readouterr().out
    both = tokens_in(tmp_path / "out", "train") + tokens_in(tmp_path / "out", "validation")
    assert sorted(bytes(both).split(b"\0")[:-1]) == [b"one", b"three", b"two"]


def test_a_refused_preparation_blocks_no_later_command(source, tmp_path, capsys):
    (source / "a.jsonl").write_bytes(lines(["", ""]))
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes")
    assert "holds no documents" in refusal(capsys, source, *options)
    (source / "a.jsonl").write_bytes(lines(["one document"]))
    assert "no documents to train on" in refusal(capsys, source, *options)
    (source / "b.jsonl").write_bytes(lines([""]))
    held_out = ("--validation-source", source / "b.jsonl")
    assert "validation files" in refusal(capsys, source / "a.jsonl", *options, *held_out)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (source / "b.jsonl").write_bytes(lines(["another"]))
    assert prepare(source / "a.jsonl", *options, *held_out) == 0
