"""Files that survive crashes: whole or old, logs by whole lines, one process per run directory."""

import errno
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import NAMES

from dlm.core.errors import UserError
from dlm.core.files import (
    OWNER_ONLY,
    append_jsonl,
    check_writable,
    explain_os_error,
    patiently,
    read_json,
    read_jsonl,
    temporary_beside,
    write_atomic,
    write_if_changed,
    write_json,
    write_through,
)
from dlm.core.lease import STALE_SEC, Lease, holds, live_holder
from dlm.core.paths import PACKAGE


def python(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=PACKAGE.parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_umask_decides_who_may_read_a_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_a_write_waits_while_its_folder_is_away(tmp_path):
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    folder.rename(away)
    threading.Timer(0.7, lambda: away.rename(folder)).start()
    patiently(folder, lambda: write_json(folder / "a.json", {}))
    assert (folder / "a.json").is_file()
    with pytest.raises(FileNotFoundError):
        patiently(away, lambda: write_json(away / "a.json", {}), patience_sec=0)
    assert not away.exists()  # nothing was put in its place
    calls = []
    with pytest.raises(PermissionError):
        patiently(folder, lambda: calls.append(1) or write_to_forbidden(folder))
    assert calls == [1]  # waiting does not help here


def write_to_forbidden(folder):
    raise PermissionError(errno.EACCES, "Permission denied", str(folder / "a.json"))


@pytest.mark.parametrize(
    ("number", "path", "words"),
    [
        (errno.EACCES, "/w/a", "cannot read or write /w/a: permission denied"),
        (errno.EROFS, "/w/a", "cannot read or write /w/a: read-only file system"),
        (errno.ESTALE, "/w/a", "cannot read or write /w/a: stale file handle"),
        (errno.ENOENT, "/nowhere/a/b", "cannot read or write /nowhere/a/b: its folder does not exist"),
        (errno.ENOENT, "/nowhere", None),  # the folder / is there: a bug of dlm
        (errno.EISDIR, "/w/a", None),
    ],
)
def test_what_the_user_can_mend_on_a_disk_is_one_line(number, path, words, monkeypatch):
    monkeypatch.setenv("DLM_WORKDIR", "/w")
    said = explain_os_error(OSError(number, os.strerror(number), path))
    where = " (DLM_WORKDIR names the folder of all sweeps)" if path.startswith("/w/") else ""
    assert said == (words and words + where)
    assert explain_os_error(OSError(number, os.strerror(number))) is None  # no path to name
    full = explain_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert full == "no space left on device: make room, and run the same command again"


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(broken, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.json"]


def test_a_reader_never_sees_a_part(tmp_path):
    """A writer is killed in the middle of its work, again and again: what is there is always whole."""
    path = tmp_path / "a.json"
    code = (
        "import sys, itertools; from pathlib import Path; from dlm.core.files import write_json\n"
        "for n in itertools.count(): write_json(Path(sys.argv[1]), [n] * 200_000); print(n, flush=True)"
    )
    for delay in (0.003, 0.011, 0.017):
        writer = python(code, path)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.kill()
        writer.communicate()
        values = read_json(path)
        assert len(values) == 200_000 and len(set(values)) == 1


def test_a_file_that_says_the_same_is_not_written_again(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_if_changed(path, "one")
    before = path.stat().st_mtime_ns
    write_if_changed(path, "one")
    assert path.stat().st_mtime_ns == before
    write_if_changed(path, "two")
    assert path.read_text() == "two"


def test_nan_is_refused_and_a_damaged_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.json").write_bytes(b'{"loss": 1.')
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


rows = st.lists(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=8), max_size=3), max_size=5)


@given(before=rows, after=rows, cut=st.integers(0, 200))
def test_a_half_written_line_is_no_row_and_damages_no_other(before, after, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    for row in before:
        append_jsonl(path, row)
    whole = path.read_bytes() if path.exists() else b""
    torn = whole[: min(cut, len(whole))]
    path.write_bytes(torn)
    kept = before[: torn.count(b"\n")]
    if torn and not torn.endswith(b"\n") and torn + b"\n" == whole[: len(torn) + 1]:
        kept = before[: len(kept) + 1]  # only its line break is lost: the row is whole
    assert read_jsonl(path) == kept
    for row in after:
        append_jsonl(path, row)
    assert read_jsonl(path) == kept + after


def test_lines_that_are_no_row_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == []
    path.write_bytes(b'{"a": 1}\n[1, 2]\n7\n\n\xff\xfe\n{"a": 2}\n{"a": ')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


HOLD = """
import sys, time
from pathlib import Path
from dlm.core.errors import UserError
from dlm.core.lease import Lease
try:
    with Lease(Path(sys.argv[1])):
        print("mine", flush=True)
        time.sleep(float(sys.argv[2]))
except UserError as error:
    print(error, flush=True)
"""


def test_a_live_holder_keeps_others_out_and_a_killed_one_does_not(tmp_path):
    holder = python(HOLD, tmp_path, 60)
    assert holder.stdout is not None and holder.stdout.readline() == "mine\n"
    found = live_holder(tmp_path)
    assert found is not None and found["pid"] == holder.pid and found["host"] == socket.gethostname()
    with pytest.raises(UserError, match=f"run by process {holder.pid} on "), Lease(tmp_path):
        pass
    assert live_holder(tmp_path) is not None  # the refusal took nothing away
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped by its parent
    assert live_holder(tmp_path) is None
    holder.communicate()
    assert (tmp_path / "lease.json").exists() and live_holder(tmp_path) is None
    with Lease(tmp_path):
        mine = live_holder(tmp_path)
        assert mine is not None and mine["pid"] == os.getpid()
    assert live_holder(tmp_path) is None and not (tmp_path / "lease.json").exists()


def test_only_one_of_many_processes_takes_a_lease(tmp_path):
    (tmp_path / "lease.json").write_text('{"host": "gone"')  # torn, as a crash may leave it
    starters = [python(HOLD, tmp_path, 4) for _ in range(4)]
    said = [starter.communicate()[0] for starter in starters]
    assert sorted(text.startswith("mine") for text in said) == [False, False, False, True]
    assert sum("is being run by process" in text for text in said) == 3


@pytest.mark.parametrize("clock", [0, 3600, -3600])
def test_a_holder_on_another_host_is_alive_while_its_heartbeat_is_fresh(tmp_path, clock, monkeypatch):
    holder = {"host": "another", "pid": os.getpid(), "started": "1"}
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + clock)
    write_json(tmp_path / "lease.json", holder)
    os.utime(tmp_path / "lease.json", (now - STALE_SEC / 2,) * 2)
    assert live_holder(tmp_path) == holder == live_holder(tmp_path, now=now)
    os.utime(tmp_path / "lease.json", (now - 2 * STALE_SEC,) * 2)
    assert live_holder(tmp_path) is None
    assert live_holder(tmp_path, now=now - STALE_SEC * 1.5) == holder


def test_a_holder_on_another_host_whose_heartbeat_lies_in_the_future_is_dead(tmp_path):
    holder = {"host": "another", "pid": os.getpid(), "started": "1"}
    write_json(tmp_path / "lease.json", holder)
    now = time.time()
    os.utime(tmp_path / "lease.json", (now + STALE_SEC / 2,) * 2)  # clocks that differ a little do no harm
    assert live_holder(tmp_path) == holder
    os.utime(tmp_path / "lease.json", (now + 3600,) * 2)
    assert live_holder(tmp_path) is None
    with Lease(tmp_path):
        assert live_holder(tmp_path) != holder


def test_a_process_that_waits_takes_the_lease_of_one_that_ends(tmp_path):
    holder = python(HOLD, tmp_path, 1.5)
    assert holder.stdout is not None and holder.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match="is being submitted by"), Lease(tmp_path, doing="submitted", patience_sec=0.3):
        pass
    with Lease(tmp_path, patience_sec=20):
        mine = live_holder(tmp_path)
        assert mine is not None and mine["pid"] == os.getpid()
    holder.communicate()


TAKEN = """
import sys, time
from pathlib import Path
from dlm.core import lease
lease.HEARTBEAT_SEC = 0.2
with lease.Lease(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(30)
"""


def test_a_process_that_stood_still_ends_when_another_has_taken_over(tmp_path):
    sleeper = python(TAKEN, tmp_path)
    assert sleeper.stdout is not None and sleeper.stdout.readline() == "mine\n"
    time.sleep(0.5)
    write_json(tmp_path / "lease.json", {"host": "another", "pid": 1, "started": "1"})
    assert sleeper.wait(10) == 75
    assert json.loads((tmp_path / "lease.json").read_text())["host"] == "another"  # and took nothing back


def test_another_process_with_the_same_pid_is_not_the_holder(tmp_path):
    with Lease(tmp_path):
        holder = json.loads((tmp_path / "lease.json").read_text())
    write_json(tmp_path / "lease.json", {**holder, "started": "12345"})  # this very process began at another time
    assert live_holder(tmp_path) is None


def test_a_lock_that_a_crash_left_behind_is_removed(tmp_path):
    lock = tmp_path / "lease.lock"
    lock.touch()
    os.utime(lock, (1, 1))
    with Lease(tmp_path):
        assert live_holder(tmp_path) is not None
    assert not lock.exists()


def test_a_new_file_never_replaces_one_that_has_come_to_exist(tmp_path):
    path = tmp_path / "weights.pt"
    with (
        pytest.raises(UserError, match="exists and is not overwritten"),
        write_through(path, replaces=False) as building,
    ):
        building.write_text("ours")
        path.write_text("another's")
    assert path.read_text() == "another's" and list(tmp_path.iterdir()) == [path]
    path.unlink()
    with write_through(path, replaces=False) as building:
        building.write_text("ours")
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_a_holder_is_recognised_as_soon_as_the_lease_names_it(tmp_path, monkeypatch):
    recognised, beat = [], Lease._beat

    def noting(lease):
        recognised.append(holds(os.getpid(), tmp_path))
        beat(lease)

    monkeypatch.setattr(Lease, "_beat", noting)
    assert not holds(os.getpid(), tmp_path)
    with Lease(tmp_path):
        assert recognised[0] and holds(os.getpid(), tmp_path)
    assert not holds(os.getpid(), tmp_path)


def test_nobody_can_guess_the_name_of_a_temporary_file_and_a_link_there_is_not_followed(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    names = {temporary_beside(path).name for _ in range(100)}
    assert len(names) == 100 and all(len(name.removeprefix(".weights.pt.")) >= 16 for name in names)  # 64 bits
    with write_through(path) as building:
        assert len(building.name) == len(next(iter(names))) and building.parent == tmp_path
        building.write_text("ours")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "precious").write_text("theirs")
    (tmp_path / ".weights.pt.guessed").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_atomic(path, "new")
    assert (tmp_path / "precious").read_text() == "theirs" and path.read_text() == "ours"


def test_a_file_for_its_owner_is_never_readable_for_others(tmp_path):
    path = tmp_path / "follower.json"
    path.touch(0o644)
    with write_through(path, mode=OWNER_ONLY) as building:
        assert building.stat().st_mode & 0o777 == 0o600
    write_json(path, {}, mode=OWNER_ONLY)
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "dangling", "loop"):
        for folder in (tmp_path / name, tmp_path / name / "deeper"):
            with pytest.raises(UserError, match=f"{name} is no folder"):
                check_writable(folder)
    with pytest.raises(OSError) as caught:
        write_atomic(tmp_path / "file" / "a", "")
    assert explain_os_error(caught.value) == f"{tmp_path / 'file'} is no folder, and one belongs there"
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_a_name_with_a_line_break_adds_no_row_to_a_log(tmp_path):
    for name in NAMES:
        append_jsonl(tmp_path / "log.jsonl", {"cell": name})
    assert [row["cell"] for row in read_jsonl(tmp_path / "log.jsonl")] == [*NAMES]
