"""A preparation that was stopped is continued, and nothing that is there is overwritten or mixed with another."""

import gzip
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.text_sources import TEXTS, as_jsonl, files_of, lines, many_units, prepare, refusal, tokens_in

from dlm.core.files import read_jsonl
from dlm.core.paths import PACKAGE
from dlm.data.prepare import progress
from dlm.data.prepare.command import main


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


def ignores_ctrl_c(pid):
    """The parent stops its workers; Ctrl-C while they import would print a traceback for each."""
    masks = re.findall(r"Sig(?:Blk|Ign):\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return any(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_preparation_that_is_killed_continues_to_the_same_bytes(bpe, source, tmp_path):
    many_units(source, 16, 200, words=300)
    arguments = ["text", str(source), "--tokenizer", str(bpe), "--workers", "2", "--name", "mine", "--out"]
    assert main([*arguments, str(tmp_path / "undisturbed")]) == 0
    building = tmp_path / ".out.building"
    process = subprocess.Popen(
        [sys.executable, "-m", "dlm.data.prepare.command", *arguments, str(tmp_path / "out")], cwd=PACKAGE.parent
    )
    wait_until(lambda: len(read_jsonl(building / "done.jsonl")) >= 3)
    workers = children(process.pid)
    assert len(workers) >= 2 and all(ignores_ctrl_c(pid) for pid in workers)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))  # none is left behind
    done = read_jsonl(building / "done.jsonl")
    assert 3 <= len(done) < 16
    first = (building / "data" / done[0]["files"]["train"][0]["name"]).stat()
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    kept = [path.stat() for path in (tmp_path / "out").iterdir()]
    assert (first.st_mtime_ns, first.st_ino) in [(s.st_mtime_ns, s.st_ino) for s in kept]  # it was not done again
    assert not building.exists()


def test_without_a_terminal_progress_is_printed_in_lines(source, tmp_path, monkeypatch, capsys):
    many_units(source, 3, 20)
    monkeypatch.setattr(progress, "LINE_SEC", -1)
    assert prepare(source, "--out", tmp_path / "out", "--tokenizer", "bytes") == 0
    lines_said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines_said[:3]] == [f"preparing: {n} of 3 parts" for n in (1, 2, 3)]
    tokens = sum(len(tokens_in(tmp_path / "out", split)) for split in ("train", "validation"))
    assert f"60 documents, {tokens:,} tokens" in lines_said[2]


def test_an_unfinished_preparation_is_never_mixed_with_another(source, tmp_path, capsys):
    (source / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    (source / "c.jsonl").write_bytes(lines(["fine"]) + b'{"text": "torn\n')
    options = ("--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", "1")
    assert "has no key 'body'" in refusal(capsys, source, *options, "--text-key", "body")  # nothing is done
    assert "c.jsonl:2 is not valid JSON" in refusal(capsys, source, *options)
    assert not (tmp_path / "out").exists()
    said = refusal(capsys, source, *options, "--validation-share", "0.1")
    assert "validation_share was 0.005, is 0.1" in said and "delete that folder" in said
    (source / "c.jsonl").write_bytes(lines(["fine"]))
    assert prepare(source, *options) == 0


def test_a_finished_data_set_is_kept_and_only_made_again_when_damaged(source, tmp_path, capsys):
    as_jsonl(TEXTS, source)
    out = tmp_path / "out"
    options = (source, "--out", out, "--tokenizer", "bytes")
    assert prepare(*options) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(*options) == 0  # the same again
    assert f"{out} is complete: nothing to do" in capsys.readouterr().out
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


def test_a_failed_preparation_ends_no_other_process_of_the_program(source, tmp_path, capsys):
    (source / "a.jsonl").write_bytes(b'{"text": "torn\n')
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    refusal(capsys, source, "--out", tmp_path / "out", "--tokenizer", "bytes")
    alive = other.is_alive()
    other.kill()
    other.join()
    assert alive
