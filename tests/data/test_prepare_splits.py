"""Which documents are held out: the splits of the sources are kept, and no document is in both."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.text_sources import TEXTS, as_jsonl, lines, prepare, refusal, tokens_in

from dlm.data.prepare.splits import find_splits


def folders(root, train, held_out, name="validation"):
    """As SlimPajama lies on a disk."""
    for split, texts in (("train", train), (name, held_out)):
        (root / split / "chunk1").mkdir(parents=True)
        (root / split / "chunk1" / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines(texts)))


def stream(texts):
    return [token for text in texts for token in (*text.encode(), 0)]


@pytest.mark.parametrize("how", ["folders", "files", "saved", "hub", "named"])
def test_the_splits_of_the_sources_are_kept_and_stay_disjoint(how, source, tmp_path, capsys):
    train, held_out = TEXTS[:150], [*TEXTS[150:], TEXTS[7]]  # one document is in both
    arguments = [source]
    if how == "folders":
        folders(source, train, held_out)
        (source / "test").mkdir()
        (source / "test" / "x.jsonl").write_bytes(lines(["a test text"]))
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


NAMES = {  # files -> the split of each: t train, v validation, h by hash, - left out
    "folders within a folder": {"data/train/a": "t", "data/validation/a": "v"},
    "numbers": {"train_0": "t", "train_1": "t", "valid_0": "v"},
    "parts of names": {"web.train": "t", "web.valid": "v", "web.test": "-"},
    "SlimPajama": {"train/chunk1/example_train_0": "t", "validation/chunk1/example_holdout_0": "v",
                   "test/chunk1/example_holdout_9": "-"},
    "C4": {"c4-train.00000-of-00001": "t", "c4-validation.00000-of-00001": "v"},
    "capitals": {"Train/a": "t", "Validation/a": "v"},
    "only validation is named": {"validation/a": "v", "part0": "t", "part1": "t"},
    "two names of validation": {"train/a": "t", "valid/a": "v", "dev/a": "-"},
    "val beside others": {"val/a": "v", "part0": "t"},
    "validation and test alone": {"validation/a": "h", "test/a": "-"},
    "no names": {"a": "h", "b": "h"},
    "only train is named": {"train/a": "h", "train/b": "h"},
    "train and test": {"train": "h", "test": "-"},
    "only test is named": {"test/a": "h", "test/b": "h"},
    "words that are no splits": {"dev_tools": "h", "driving_test": "h", "training_day": "h", "val_di_fassa": "h"},
    "a folder called dev above all": {"dev/corpus/train/a": "t", "dev/corpus/valid/a": "v"},
    "the outer folder counts": {"train/test/a": "t", "valid/train/a": "v"},
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_the_names_of_files_and_folders_tell_the_splits(case, source, tmp_path, capsys):
    for number, name in enumerate(NAMES[case]):
        (source / f"{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (source / f"{name}.jsonl").write_bytes(lines([f"{number}"]))
    found = find_splits([source])
    kinds = {"train": "t", "validation": "v", None: "h"}
    shown = {path.relative_to(source).as_posix().removesuffix(".jsonl"): kinds[split] for split, path in found.files}
    left_out = {path: "-" for path in NAMES[case] if path not in shown}
    assert shown | left_out == NAMES[case]
    assert {item.path for item in found.found.passed_over} == {str(source / f"{name}.jsonl") for name in left_out}
    assert [split for split, _ in found.files] == sorted(
        (split for split, _ in found.files), key=lambda split: split != "validation"
    )


def test_sources_that_are_named_after_splits_are_the_splits(source):
    folders(source, TEXTS[:5], TEXTS[5:])
    found = find_splits([source / "train", source / "validation"])
    assert [split for split, _ in found.files] == ["validation", "train"]


def test_the_rule_and_the_counts_are_printed_and_patterns_overrule_names(source, tmp_path, capsys):
    folders(source, TEXTS[:50], TEXTS[50:60])
    (source / "more").mkdir()
    (source / "more" / "x1.jsonl").write_bytes(lines(TEXTS[60:80]))
    (source / "more" / "x2.jsonl").write_bytes(lines(TEXTS[80:]))
    options = ("--tokenizer", "bytes", "--workers", "1", "--out")
    assert prepare(source, *options, tmp_path / "names") == 0
    said = capsys.readouterr().out
    assert "split: files and folders named train and validation" in said
    assert "190 train, 10 validation documents" in said
    assert prepare(source, *options, tmp_path / "globs", "--train", "more/x*", "--validation", "validation/*") == 0
    said = capsys.readouterr().out
    assert "140 train, 10 validation documents" in said and "named by neither --train nor --validation" in said
    assert prepare(source, *options, tmp_path / "rest", "--validation", "x1*") == 0
    assert "180 train, 20 validation documents" in capsys.readouterr().out
    assert prepare(source, *options, tmp_path / "hash", "--train", "x?.jsonl", "--validation-share", "0.2") == 0
    assert (
        "no names say it" not in (said := capsys.readouterr().out)
        and "split: --train names the files, and the hash" in said
    )
    both = ("--validation", "x1*", "--validation", "x2*")
    assert prepare(source, *options, tmp_path / "both", *both) == 0
    assert "60 train, 140 validation documents" in capsys.readouterr().out
    two = ("--validation-source", source / "more" / "x1.jsonl", "--validation-source", source / "more" / "x2.jsonl")
    assert prepare(source / "train", source / "more", *options, tmp_path / "two", *two) == 0
    assert "50 train, 140 validation documents" in capsys.readouterr().out
    out = ("--tokenizer", "bytes", "--out", tmp_path / "none")
    assert "--train y* names none of the 4 files" in refusal(capsys, source, *out, "--train", "y*")
    assert "name it once" in refusal(capsys, source, *out, "--train", "x*", "--validation", "x1*")
    assert "give --validation" in refusal(
        capsys, source / "more", *out, "--train", "x*", "--validation-source", source / "validation"
    )
