"""A data set of the Hugging Face hub becomes the same tokens as its files on this disk, and only as many as needed.

The commands run in a process of their own, because huggingface_hub reads HF_ENDPOINT when it is imported. They talk to
a server on this machine.
"""

import gzip
import io
import json
import os
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.hub_server import HubServer
from support.text_sources import files_of, lines, make_texts, prepare, tokens_in

from dlm.core.errors import UserError
from dlm.core.files import read_jsonl
from dlm.core.paths import PACKAGE
from dlm.data.manifest import read_manifest
from dlm.data.prepare.hub import HubData, _Downloads, parse_tokens

SERVE = """
import contextlib, io, json, sys
from dlm.data.prepare.command import main
if __name__ == "__main__":
    for line in sys.stdin:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["text", *json.loads(line)])
        print(json.dumps([code, err.getvalue()]), flush=True)
"""


def parquet(texts):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), buffer, row_group_size=30)
    return buffer.getvalue()


def corpus(num_files=5, texts_each=40):
    """Return the files of a data set like SlimPajama: three splits of compressed JSON lines in folders."""
    files = {"README.md": b"# A corpus\n"}
    for number in range(num_files):
        content = lines(make_texts(texts_each, seed=number))
        files[f"train/chunk{number // 3}/example_train_{number}.jsonl.zst"] = zstandard.compress(content)
    shared = make_texts(3, seed=0)  # the first documents of train, too
    files["validation/chunk1/example_holdout_0.jsonl.zst"] = zstandard.compress(
        lines([*shared, *make_texts(9, seed=90)])
    )
    files["test/chunk1/example_test_0.jsonl.zst"] = zstandard.compress(lines(make_texts(9, seed=91)))
    return files


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    others = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    home = str(tmp_path_factory.mktemp("home of the hub's client"))
    return {**others, "HF_ENDPOINT": hub.url, "HF_HOME": home, "PYTHONPATH": str(PACKAGE.parent)}


@pytest.fixture(scope="module")
def run(environment, tmp_path_factory):
    """Run a command in a process that all tests share; return its exit code and what it wrote to stderr."""
    script = tmp_path_factory.mktemp("script") / "serve.py"
    script.write_text(SERVE)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, script], env=environment, **pipes) as process:

        def run(*words):
            words = (*words, *(() if "--workers" in words else ("--workers", "1")))  # a process takes half a second
            print(json.dumps([str(word) for word in words]), file=process.stdin, flush=True)
            return tuple(json.loads(process.stdout.readline()))

        yield run
        process.stdin.close()


def write(files, folder):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_a_data_set_of_the_hub_gives_the_tokens_of_its_files(hub, run, bpe, tmp_path):
    files = corpus() | {"extra.jsonl": lines(["in no split"])}
    sha = hub.commit("owner/whole", files)
    options = ("--tokenizer", bpe, "--name", "mine", "--out")
    assert run("hf://owner/whole", *options, tmp_path / "out") == (0, "")
    local = {name: content for name, content in files.items() if name.startswith(("train", "validation"))}
    write(local, tmp_path / "local")
    assert prepare(tmp_path / "local", "--workers", "1", *options, tmp_path / "local out") == 0
    out, same = read_manifest(tmp_path / "out"), read_manifest(tmp_path / "local out")
    assert out.hash == same.hash and out.notes["skipped"]["in validation"] == 3
    assert (out.notes["hub"]["revision"], out.notes["hub"]["left_out"]) == (sha, ["test"])
    unused = out.notes["passed_over"]["in no split of the hub"]
    assert unused["names"] == ["hf://owner/whole/extra.jsonl"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "local", "local out"}


@pytest.mark.parametrize("splits", ["train and validation", "train"])
def test_only_as_many_tokens_are_taken_as_asked_for(splits, hub, run, spm, tmp_path):
    names = ("README.md", *splits.split(" and "))
    files = {name: content for name, content in corpus().items() if name.startswith(names)}
    hub.commit(f"owner/{len(files)}", files)
    source = f"hf://datasets/owner/{len(files)}"
    options = ("--tokenizer", spm, "--add-bos", "--validation-share", "0.1")
    assert run(source, *options, "--out", tmp_path / "all", "--name", "mine") == (0, "")
    hub.downloads.clear()
    asked = (1000, 2500)
    for tokens in asked:
        own = (
            "--tokens",
            tokens,
            "--out",
            os.path.relpath(tmp_path / f"{tokens}"),
            "--name",
            "mine",
            "--workers",
            1 + tokens % 3,
        )
        assert run(source, *options, *own, "--workers", 1 + tokens % 3) == (0, "")
    whole = tokens_in(tmp_path / "all", "train")
    for tokens in asked:
        part = tokens_in(tmp_path / f"{tokens}", "train")
        assert part == whole[: len(part)] and len(part) >= tokens
        last = len(part) - 1 - part[::-1].index(1)  # the beginning of the last document
        assert last < tokens
    assert not any(path.startswith("test") for path in hub.downloads)
    assert sum(path.startswith("train") for path in hub.downloads) < 2 * 5


def test_a_preparation_that_is_killed_goes_on_where_it_was(hub, run, environment, bpe, tmp_path):
    files = corpus(30)
    first = hub.commit("owner/killed", files)
    command = ["hf://owner/killed", "--tokenizer", str(bpe), "--tokens", "20k", "--name", "mine", "--out"]
    hub.downloads.clear()
    assert run(*command, tmp_path / "undisturbed") == (0, "")
    needed = [path for path in hub.downloads if path.startswith("train")]
    hub.downloads.clear()
    hub.hold_after = 12  # the server answers no more
    arguments = [sys.executable, "-m", "dlm.data.prepare.command", "text", *command, str(tmp_path / "out")]
    process = subprocess.Popen(arguments, env=environment)
    assert hub.held.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.go_on()
    taken = read_jsonl(tmp_path / ".out.building" / "hub.jsonl")
    assert len(taken) >= 5
    hub.commit("owner/killed", {**files, "train/chunk0/new.jsonl.zst": zstandard.compress(lines(["new"]))})
    hub.downloads.clear()
    moved = f"hf://owner/killed@{first}"
    code, said = run(*command, tmp_path / "out")
    assert code == 2 and said.count("\n") == 1 and moved in said
    assert run(moved, *command[1:], tmp_path / "out") == (0, "")
    code, said = run(*command, tmp_path / "out")
    assert code == 2 and said.count("\n") == 1 and moved in said
    assert len(hub.downloads) <= len(needed) - len(taken) + 1 and taken[0]["file"] not in hub.downloads
    assert not any(path.startswith("validation") for path in hub.downloads)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_a_data_set_with_fewer_tokens_is_taken_whole_with_a_warning(hub, run, tmp_path):
    hub.commit("owner/small", {"data/train-00000-of-00001.parquet": parquet(make_texts(50))})
    options = ("--tokenizer", "bytes", "--validation-share", "0.1")
    code, said = run("hf://owner/small", *options, "--tokens", "1B", "--out", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    tokens = manifest.tokens("train")
    assert code == 0 and f"holds {tokens:,} training tokens, fewer than --tokens 1,000,000,000" in said
    assert manifest.notes["hub"]["tokens_asked"] == 10**9 and sum(manifest.notes["documents"].values()) == 50


def test_what_cannot_be_read_from_the_hub_is_said_in_one_line(hub, run, tmp_path):
    named = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("en", "de"))
    configs = f"---\nconfigs:\n{named}---\n".encode()
    texts = lines(make_texts(40))
    hub.commit("owner/two", {"README.md": configs, "en/a.jsonl": texts, "de/b.jsonl": lines(make_texts(40, seed=2))})
    hub.commit("owner/gated", {"README.md": b"x", "train.jsonl": texts})
    hub.gated.add("owner/gated")
    hub.commit("owner/empty", {"README.md": b"x"})
    hub.commit("owner/tested", {"test.jsonl": texts})
    hub.commit("owner/table", {"train.csv": b"text\nhello\n"})
    hub.commit("owner/keys", {"train.jsonl": lines(make_texts(40), key="content")})
    refused = {
        ("hf://owner/nothing",): "hub has no data set hf://owner/nothing",
        ("hf://owner/two",): "several configs: set --config to one of en, de",
        ("hf://owner/two", "--config", "fr"): "--config 'fr'",
        ("hf://owner/two@v9",): "no such revision",
        ("hf://owner/gated",): "is gated: accept its terms",
        ("hf://owner/tested",): "no split train: it has test",
        ("hf://owner/table",): "train.csv, of a kind that dlm does not read",
        ("hf://owner/keys",): "no key 'text': it has content, meta: set --text-key",
        ("hf://owner/two/en/more",): "write hf://OWNER/NAME",
        ("hf://owner/two", "hf://owner/keys"): "must be the only source",
        ("hf://owner/two", "--validation-source", "a.jsonl"): "must be the only source",
        ("hf://owner/two", "--tokens", "many"): "--tokens is 'many'",
        ("hf://owner/two", "--train", "a*"): "--train is 'a*': the hub names the splits of hf://owner/two",
        ("hf://owner/two", "--validation", "b*"): "--validation is 'b*': the hub names the splits of hf://owner/two",
        ("hf://owner/empty",): "hf://owner/empty holds no files of data",
        ("a.jsonl", "--tokens", "25B"): "it is for a source of the hub",
        ("a.jsonl", "--config", "en"): "it is for a source of the hub",
    }
    out = ("--tokenizer", "bytes", "--out")
    for number, (words, expected) in enumerate(refused.items()):
        code, said = run(*words, *out, tmp_path / f"{number}")
        assert code == 2 and said.startswith("dlm: ") and said.count("\n") == 1 and expected in said, said
    assert run("hf://owner/two", "--config", "de", "--validation-share", "0.2", *out, tmp_path / "de") == (0, "")


def test_texts_that_look_like_dates_stay_as_they_are(hub, run, tmp_path):
    hub.commit("owner/dates", {"train.jsonl": lines(["2020-01-02", "2021-03-04", "2022-05-06"])})
    options = ("--tokenizer", "bytes", "--validation-share", "0.2", "--out", tmp_path / "dates")
    assert run("hf://owner/dates", *options) == (0, "")
    tokens = [token for split in ("train", "validation") for token in tokens_in(tmp_path / "dates", split)]
    assert sorted(bytes(tokens).split(b"\0")) == [b"", b"2020-01-02", b"2021-03-04", b"2022-05-06"]


def test_a_hub_that_does_not_answer_is_named_in_one_line(hub, run, tmp_path):
    hub.is_down = True
    code, said = run("hf://owner/small", "--tokenizer", "bytes", "--out", tmp_path / "out")
    hub.is_down = False
    assert code == 75 and said.count("\n") == 1 and f"cannot get hf://owner/small from {hub.url}" in said


@pytest.mark.parametrize(("status", "expected"), [(500, 75), (429, 75), (403, 2)])
def test_only_a_failure_that_may_pass_is_worth_another_try(status, expected, hub, run, tmp_path):
    hub.failure = status
    code, said = run("hf://owner/small", "--tokenizer", "bytes", "--out", tmp_path / "out")
    hub.failure = None
    assert code == expected and said.count("\n") == 1 and str(status) in said
    assert ("the same command continues when the hub answers" in said) == (expected == 75)


def test_a_folder_that_cannot_be_written_is_no_fault_of_the_hub(hub, run, tmp_path):
    hub.commit("owner/blocked", {"train.jsonl": lines(make_texts(40))})
    in_the_way = tmp_path / ".out.building" / "hub"
    in_the_way.parent.mkdir()
    in_the_way.write_text("a file where the folder of the downloads belongs")
    code, said = run("hf://owner/blocked", "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert (code, said) == (2, f"dlm: {in_the_way} is no folder, and one belongs there\n")


NULL = b'{"text": null}\n'


def with_bad_rows(numbers, more=()):
    """Return three files of 20 documents of 15 tokens each, with a row without text as fifth row of some of them."""
    files = {"README.md": b"x", **dict(more)}
    for number in range(3):
        rows = lines([f"document {number}-{row:03d}" for row in range(20)]).splitlines(keepends=True)
        files[f"train/{number}.jsonl"] = b"".join([*rows[:4], *([NULL] if number in numbers else ()), *rows[4:]])
    return files


def test_rows_that_are_left_out_of_the_last_file_are_in_the_manifest(hub, run, tmp_path):
    hub.commit("owner/bad", with_bad_rows({1}))
    asked = 15 * 30  # in the middle of the second file
    options = ("hf://owner/bad", "--tokenizer", "bytes", "--validation-share", "0.1", "--tokens", asked, "--out")
    where = "hf://owner/bad/train/1.jsonl:5: 'text' is null, no text"
    code, said = run(*options, tmp_path / "refused")
    assert code == 2 and said.count("\n") == 1 and where in said and "--skip-bad N" in said
    assert run(*options, tmp_path / "out", "--skip-bad", "1") == (0, "")
    manifest = read_manifest(tmp_path / "out")
    assert asked <= manifest.tokens("train") < asked + 15
    assert manifest.notes["rows_without_text"] == [where]
    assert manifest.notes["skipped"]["without text"] == 1
    assert manifest.notes["read"][".jsonl"]["files"] == 2


def test_rows_to_leave_out_are_counted_over_all_files_before_more_are_downloaded(hub, run, tmp_path):
    held_out = {"validation/a.jsonl": NULL + lines(["a document that is held out"])}
    hub.commit("owner/worse", with_bad_rows({0, 1}, held_out))
    options = ("hf://owner/worse", "--tokenizer", "bytes", "--tokens", 15 * 50, "--out", tmp_path / "out")
    hub.downloads.clear()
    for _ in range(2):  # the second time, the first training file is already counted
        code, said = run(*options, "--skip-bad", "2")
        assert code == 2 and said.count("\n") == 1 and "3 rows or more hold no text, and --skip-bad allows 2" in said
        assert hub.downloads == ["validation/a.jsonl", "train/0.jsonl", "train/1.jsonl"]
    assert run(*options, "--skip-bad", "3") == (0, "")
    assert len(read_manifest(tmp_path / "out").notes["rows_without_text"]) == 3


def test_a_file_that_is_torn_is_named_by_its_place_on_the_hub(hub, run, tmp_path):
    torn = gzip.compress(lines(make_texts(200)))[:-12]
    hub.commit("owner/torn", {**with_bad_rows(()), "train/0.jsonl.gz": torn})
    options = ("--tokenizer", "bytes", "--validation-share", "0.1", "--skip-unreadable", "--out", tmp_path / "out")
    assert run("hf://owner/torn", *options) == (0, "")
    (line,) = read_manifest(tmp_path / "out").notes["unreadable"]
    assert line.startswith("hf://owner/torn/train/0.jsonl.gz is damaged")


def test_without_the_package_one_line_says_how_to_install_it(environment, tmp_path):
    (tmp_path / "datasets.py").write_text("raise ModuleNotFoundError('none', name='datasets')")
    without = {**environment, "PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}"}
    words = ("text", "hf://owner/x", "--tokenizer", "bytes", "--out", str(tmp_path / "out"))
    command = [sys.executable, "-m", "dlm.data.prepare.command", *words]
    done = subprocess.run(command, env=without, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "-m pip install datasets" in done.stderr


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        ("25e9", 25 * 10**9),
        ("25B", 25 * 10**9),
        ("1.1B", 1_100_000_000),
        ("300M", 3 * 10**8),
        ("20k", 20_000),
        ("7", 7),
    ],
)
def test_numbers_of_tokens_are_written_as_people_write_them(value, tokens):
    assert parse_tokens(value) == tokens


@pytest.mark.parametrize(
    "value", ["", "0", "-5", "1.5", "25 B", "inf", "nan", "25G", "1e-3", "1e18", "1e99999", "1e999999B", "9" * 5000]
)
def test_other_numbers_of_tokens_are_refused(value):
    with pytest.raises(UserError, match="such as 25e9, 25B or 300M"):
        parse_tokens(value)


@pytest.mark.parametrize("path", ["../x.jsonl", "/etc/x.jsonl", "train/../../x.jsonl", "train//x.jsonl", "nul\0.jsonl"])
def test_a_file_of_the_hub_cannot_lead_out_of_its_folder(tmp_path, path):
    names = {"repo": "o/n", "revision": "0", "config": "default"}
    found = HubData(**names, train=(path,), validation=(), left_out=(), unused=())
    with pytest.raises(UserError, match="cannot be the name of a file in "):  # nothing is asked of the hub
        _Downloads(found, tmp_path / "hub").get(path)
