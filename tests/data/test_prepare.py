"""Anyone's own text -> packed tokens: every kind of source and tokenizer, against encoding documents one by one."""

import gzip
import hashlib
import io
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import tokenizers
import zstandard

from dlm.core.errors import UserError
from dlm.core.files import read_jsonl
from dlm.core.paths import PACKAGE
from dlm.data.manifest import read_manifest
from dlm.data.packed import open_packed
from dlm.data.prepare import documents, progress
from dlm.data.prepare.command import main
from dlm.data.prepare.documents import Unit, find_splits, make_units, read_unit
from dlm.data.prepare.tokenizer import load_tokenizer

WORDS = ("the", "quick", "brown", "fox", "over", "lazy", "dogs", "¿qué?", "日本", "é\n")


def make_texts(count, seed=0, words=60):
    random = np.random.default_rng(seed)
    return [f"{n} " + " ".join(random.choice(WORDS, random.integers(1, words))) for n in range(count)]


TEXTS = make_texts(200)


def lines(texts, key="text"):
    return "".join(json.dumps({key: text, "meta": {"n": n}}) + "\n" for n, text in enumerate(texts)).encode()


def as_jsonl(texts, folder):
    (folder / "a.jsonl").write_bytes(lines(texts[:90]))
    (folder / "b.jsonl").write_bytes(lines(texts[90:])[:-1])  # the last line need not end


def as_zst(texts, folder):
    parts = [zstandard.ZstdCompressor().compress(lines(part)) for part in (texts[:50], texts[50:120], texts[120:])]
    (folder / "a.jsonl.zst").write_bytes(parts[0] + parts[1])  # two frames in one file
    (folder / "b.jsonl.zst").write_bytes(parts[2])


def as_gz(texts, folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "a.jsonl.gz").write_bytes(gzip.compress(lines(texts)))


def as_parquet(texts, folder):
    table = pa.table({"n": range(len(texts)), "text": texts})
    pq.write_table(table, folder / "a.parquet", row_group_size=70)


def as_text(texts, folder):
    for number, text in enumerate(texts):
        (folder / f"{number:05d}.txt").write_bytes(text.encode())
    (folder / "README.md").write_text("no source")


def as_saved(texts, folder):
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "saved", num_shards=3)


FORMS = {form.__name__: form for form in (as_jsonl, as_zst, as_gz, as_parquet, as_text, as_saved)}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A Hugging Face tokenizer as people have them: its file truncates, pads and adds special tokens."""
    folder = tmp_path_factory.mktemp("tokenizers") / "tiny-bpe"
    folder.mkdir()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.enable_truncation(7)
    model.enable_padding(length=9)
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def spm(tmp_path_factory):
    """A sentencepiece model with Llama-2's ids: 0 unknown, 1 begin, 2 end."""
    path = tmp_path_factory.mktemp("tokenizers") / "tiny.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def prepare(*arguments):
    return main(["text", *map(str, arguments)])


def refusal(capsys, *arguments):
    """The one line that a preparation ends with."""
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
    """Both splits, one document after another."""
    result = {"train": [], "validation": []}
    for text in texts:
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        result["validation" if key < share * 2**64 else "train"] += [*bos, *encode(text), eos]
    return result


def as_bytes(text):
    return list(text.encode())


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
    FORMS[form](TEXTS, source)
    monkeypatch.setattr(documents, "UNIT_BYTES", slice_bytes)
    units = make_units(find_splits([source], []))
    assert [text for unit in units for text in read_unit(unit, "text")] == TEXTS
    assert (len(units) > 2) == (slice_bytes < 10**9)


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


def folders(root, train, held_out, name="validation"):
    """As SlimPajama lies on a disk."""
    for split, texts in (("train", train), (name, held_out)):
        (root / split / "chunk1").mkdir(parents=True)
        (root / split / "chunk1" / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines(texts)))


def stream(texts):
    return [token for text in texts for token in (*text.encode(), 0)]


@pytest.mark.parametrize("how", ["folders", "test folder", "files", "saved", "hub", "named"])
def test_splits_that_are_there_are_kept_and_stay_disjoint(how, source, tmp_path, capsys):
    train, held_out = TEXTS[:150], [*TEXTS[150:], TEXTS[7]]  # one document is in both
    arguments = [source]
    if how == "folders":
        folders(source, train, held_out)
        (source / "test").mkdir()
        (source / "test" / "x.jsonl").write_bytes(lines(["a test text"]))
    elif how == "test folder":
        folders(source, train, held_out, "test")
    elif how == "saved":
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


def test_tiny_sets_just_work(source, tmp_path, capsys):
    (source / "a.txt").write_text("one")
    (source / "b.txt").write_text("two")
    (source / "c.jsonl").write_bytes(lines(["", "three", "nul\0within"]))
    assert prepare(source, "--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "7") == 0
    assert "2 train, 1 validation documents; left out: 1 empty, 1 with NUL" in capsys.readouterr().out
    both = tokens_in(tmp_path / "out", "train") + tokens_in(tmp_path / "out", "validation")
    assert sorted(bytes(both).split(b"\0")[:-1]) == [b"one", b"three", b"two"]


def many_units(source, count, texts_each, **options):
    """Files that cannot be put together: their kinds alternate."""
    for number in range(count):
        content = lines(make_texts(texts_each, seed=number, **options))
        name, content = ("jsonl", content) if number % 2 else ("jsonl.gz", gzip.compress(content, mtime=0))
        (source / f"{number:03d}.{name}").write_bytes(content)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_number_of_workers_changes_no_byte(bpe, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    many_units(source, 7, 40)
    for workers in (1, 2, 3):
        folder = tmp_path / f"{workers}" / "out"
        assert prepare("source", "--out", folder, "--tokenizer", bpe, "--workers", workers) == 0
    first = files_of(tmp_path / "1" / "out")
    assert len(first) > 7 and first == files_of(tmp_path / "2" / "out") == files_of(tmp_path / "3" / "out")


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_without_warning_it_goes_on_to_the_same_bytes(bpe, source, tmp_path):
    many_units(source, 16, 400, words=400)
    arguments = ["text", str(source), "--tokenizer", str(bpe), "--workers", "2", "--name", "mine", "--out"]
    assert main([*arguments, str(tmp_path / "undisturbed")]) == 0
    building = tmp_path / ".out.building"
    process = subprocess.Popen(
        [sys.executable, "-m", "dlm.data.prepare.command", *arguments, str(tmp_path / "out")], cwd=PACKAGE.parent
    )
    wait_until(lambda: len(read_jsonl(building / "done.jsonl")) >= 3)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))  # none is left behind
    done = read_jsonl(building / "done.jsonl")
    assert 3 <= len(done) < 16
    first = building / "data" / done[0]["files"]["train"][0]["name"]
    written, inode = first.stat().st_mtime_ns, first.stat().st_ino
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    kept = (tmp_path / "out" / first.name).stat()
    assert (kept.st_mtime_ns, kept.st_ino) == (written, inode)  # what was done was not done again
    assert not building.exists()


def test_progress_is_said_in_lines_where_there_is_no_terminal(source, tmp_path, monkeypatch, capsys):
    many_units(source, 3, 20)
    monkeypatch.setattr(progress, "LINE_SEC", -1)
    assert prepare(source, "--out", tmp_path / "out", "--tokenizer", "bytes") == 0
    lines_said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines_said[:3]] == [f"preparing: {n} of 3 parts" for n in (1, 2, 3)]
    tokens = sum(len(tokens_in(tmp_path / "out", split)) for split in ("train", "validation"))
    assert f"60 documents, {tokens:,} tokens" in lines_said[2]


def test_preparing_loads_no_library_that_it_does_not_use():
    code = "import sys, dlm.data.prepare.command; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert {"torch", "tokenizers", "sentencepiece", "zstandard", "pyarrow", "datasets"}.isdisjoint(done.stdout.split())


def test_an_unfinished_preparation_is_never_mixed_with_another(source, tmp_path, capsys):
    as_jsonl(TEXTS, source)
    (source / "c.jsonl").write_bytes(lines(["fine"]) + b'{"text": "torn\n')
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes")
    assert "c.jsonl:2 is not valid JSON" in refusal(capsys, source, *options)
    assert not (tmp_path / "out").exists()
    said = refusal(capsys, source, *options, "--validation-share", "0.1")
    assert "validation_share was 0.005, is 0.1" in said and "delete that folder" in said
    (source / "c.jsonl").write_bytes(lines(["fine"]))
    assert "c.jsonl changed" in refusal(capsys, source, *options)


def test_what_is_there_is_kept(source, tmp_path, capsys):
    as_jsonl(TEXTS, source)
    out = tmp_path / "out"
    options = (source, "--out", out, "--tokenizer", "bytes")
    assert prepare(*options) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(*options) == 0  # the same again: nothing to do
    capsys.readouterr()
    assert "choose another --out" in refusal(capsys, *options, "--validation-share", "0.1")
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    whole = files_of(out)
    next(out.glob("train*")).write_bytes(b"torn")
    assert prepare(*options) == 0  # the same, damaged: made again
    assert files_of(out) == whole
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    refusal(capsys, source, "--out", tmp_path / "mine", "--tokenizer", "bytes")
    assert files_of(tmp_path / "mine") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', ["a.jsonl:2", "not valid JSON"]),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', ["a.jsonl:3", "no JSON object"]),
        ("a.jsonl", b'{"content": "x", "id": 1}\n', ["a.jsonl:1", "no key 'text'", "content, id", "--text-key"]),
        ("a.jsonl", b'{"text": 7}\n', ["a.jsonl:1", "'text' is '7'"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl:1", "not valid JSON"]),
        ("a.jsonl.zst", zstandard.compress(lines(TEXTS))[:-20], ["a.jsonl.zst is damaged", "Truncated"]),
        ("a.jsonl.zst", lines(TEXTS), ["a.jsonl.zst is damaged or no zst file"]),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-20], ["a.jsonl.gz is damaged", "Truncated"]),
        ("a.jsonl.gz", lines(TEXTS), ["a.jsonl.gz is damaged"]),
        ("a.parquet", b"PAR1 no more", ["a.parquet is damaged or no parquet file"]),
        ("a.arrow", b"no arrow at all", ["a.arrow is damaged"]),
        ("a.txt", b"caf\xe9", ["a.txt is not UTF-8", "byte 3"]),
    ],
)
def test_what_is_no_document_is_named_with_its_place(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    (unit,) = make_units(find_splits([tmp_path], []))
    with pytest.raises(UserError) as error:
        list(read_unit(unit, "text"))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_a_bad_line_of_a_slice_has_its_number_in_the_file(tmp_path):
    content = lines(TEXTS) + b"bad\n" + lines(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(content)
    start = len(lines(TEXTS[:70])) + 3
    unit = Unit(split=None, kind="jsonl", paths=(str(tmp_path / "a.jsonl"),), size=1, start=start, stop=len(content))
    with pytest.raises(UserError, match=r"a\.jsonl:201 is not valid JSON"):
        list(read_unit(unit, "text"))


def test_tables_without_the_text_name_their_columns(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    for name, words in (("a", ["no column 'text'", "body, id"]), ("b", ["b.parquet row 2", "'None', no text"])):
        unit = Unit(split=None, kind="parquet", paths=(str(tmp_path / f"{name}.parquet"),), size=1)
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
def test_what_makes_no_data_set_is_refused_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
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


def test_a_refused_empty_set_blocks_no_other_command(source, tmp_path, capsys):
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


def test_a_tokenizer_without_an_end_wants_one(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<|im_end|>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    model.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eos_id is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert load_tokenizer(str(tmp_path)).eos_id == 1


def test_main_returns_the_exit_code_of_help_and_of_wrong_arguments(capsys):
    assert main(["text", "--help"]) == 0 and "--tokenizer" in capsys.readouterr().out
    assert main(["text"]) == 2 and "required: SOURCE" in capsys.readouterr().err
    assert main([]) == 2 and "text,stdlib,packed" in capsys.readouterr().err


def test_a_failed_preparation_ends_no_other_process_of_the_program(source, tmp_path, capsys):
    (source / "a.jsonl").write_bytes(b'{"text": "torn\n')
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    refusal(capsys, source, "--out", tmp_path / "out", "--tokenizer", "bytes")
    alive = other.is_alive()
    other.kill()
    other.join()
    assert alive
