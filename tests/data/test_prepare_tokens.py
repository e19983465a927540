"""Text of every kind and with every tokenizer becomes the tokens of its documents, encoded one by one."""

import hashlib

import numpy as np
import pytest
import sentencepiece
import tokenizers
from support.text_sources import FORMS, TEXTS, as_bytes, as_jsonl, expected, prepare, tokens_in

from dlm.data.manifest import read_manifest
from dlm.data.packed import open_packed
from dlm.data.prepare import units as units_of
from dlm.data.prepare.documents import read_unit
from dlm.data.prepare.splits import find_splits
from dlm.data.prepare.tokenizer import load_tokenizer
from dlm.data.prepare.units import make_units


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_source_gives_the_same_tokens_and_no_tail_is_lost(form, source, tmp_path, capsys):
    FORMS[form](TEXTS, source)
    assert prepare(source, "--out", tmp_path / "out", "--tokenizer", "bytes", "--validation-share", "0.1") == 0
    out, whole = tmp_path / "out", expected(TEXTS, as_bytes, 0, 0.1)
    assert {split: tokens_in(out, split) for split in whole} == whole and whole["validation"]
    manifest = read_manifest(out)
    assert (manifest.vocab_size, manifest.bos_id, manifest.tokenizer) == (256, 0, "bytes")
    assert sum(manifest.notes["documents"].values()) == 200 and not any(manifest.notes["skipped"].values())
    assert f"hash {manifest.hash}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    named = {file.name for files in manifest.splits.values() for file in files}
    assert {path.name for path in out.iterdir()} == {"manifest.json", *named}
    assert all(open_packed(out / name).dtype == np.uint8 for name in named)


@pytest.mark.parametrize("slice_bytes", [1, 100, 1000, 10**9])
@pytest.mark.parametrize("form", ["as_jsonl", "as_parquet"])
def test_slices_of_large_files_hold_every_document_once(form, slice_bytes, source, monkeypatch):
    texts = TEXTS[:100] if slice_bytes == 1 else TEXTS  # one unit per byte
    FORMS[form](texts, source)
    monkeypatch.setattr(units_of, "UNIT_BYTES", slice_bytes)
    units = make_units(find_splits([source]).files)
    assert [text for unit in units for text in read_unit(unit, "text")] == texts
    assert (len(units) > 1) == (slice_bytes < 10**9)


def test_hugging_face_ids_are_those_of_single_documents(bpe, source, tmp_path):
    as_jsonl(TEXTS, source)
    assert prepare(source, "--out", tmp_path / "out", "--tokenizer", bpe, "--validation-share", "0.1") == 0
    model = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    model.no_truncation()
    model.no_padding()

    def encode(text):
        return model.encode(text, add_special_tokens=False).ids

    whole = expected(TEXTS, encode, model.token_to_id("</s>"), 0.1)
    assert {split: tokens_in(tmp_path / "out", split) for split in whole} == whole
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.vocab_size, manifest.bos_id, manifest.tokenizer) == (400, 0, "tiny-bpe")
    assert manifest.notes["tokenizer_sha256"] == hashlib.sha256((bpe / "tokenizer.json").read_bytes()).hexdigest()


def test_sentencepiece_ids_are_those_of_single_documents(spm, source, tmp_path):
    as_jsonl(TEXTS, source)
    options = ("--tokenizer", spm, "--validation-share", "0.1")
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    assert prepare(source, "--out", tmp_path / "out", *options) == 0
    whole = expected(TEXTS, model.encode, 2, 0.1)  # as Llama-2's: the end after every document, no beginning
    assert {split: tokens_in(tmp_path / "out", split) for split in whole} == whole
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.vocab_size, manifest.bos_id, manifest.notes["eos_id"]) == (320, 1, 2)
    assert open_packed(tmp_path / "out" / manifest.splits["train"][0].name).dtype == np.uint16

    assert prepare(source, "--out", tmp_path / "bos", *options, "--add-bos", "--eos-id", "5", "--bos-id", "4") == 0
    assert tokens_in(tmp_path / "bos", "train") == expected(TEXTS, model.encode, 5, 0.1, bos=[4])["train"]
    assert read_manifest(tmp_path / "bos").bos_id == 4


def test_a_large_vocabulary_takes_four_bytes(source, tmp_path):
    as_jsonl(TEXTS, source)
    vocab = {f"w{n}": n for n in range(70_000)} | {"</s>": 70_000, "[UNK]": 70_001}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "words.json"))
    options = ("--out", tmp_path / "out", "--tokenizer", tmp_path / "words.json")
    assert prepare(source, *options) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.vocab_size, manifest.bos_id) == (70_002, 70_000)  # without a beginning, the end stands before
    tokens = open_packed(tmp_path / "out" / manifest.splits["train"][0].name)
    assert tokens.dtype == np.int32 and tokens.max() == 70_001


def test_the_end_token_of_an_unusual_tokenizer_is_read_from_its_config(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<|im_end|>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    model.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eos_id is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert load_tokenizer(str(tmp_path)).eos_id == 1
