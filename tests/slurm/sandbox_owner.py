"""The owner of a sandbox, and what is cleared when it is dead: processes, a line in /etc/hosts, a folder in /tmp.

The process that makes a sandbox holds a lock on a file in the sandbox's folder. The kernel releases the lock when the
process ends, however it ends, so the lock alone says whether a sandbox has an owner. A second process, the guard, waits
for the lock and then clears what the owner has not removed itself. Whoever starts a sandbox looks for folders that
nobody has locked and clears them too, because the guard may have been killed as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDERS = Path("/tmp")  # a short path, because that of a socket has 107 characters at most
HOSTS = Path("/etc/hosts")
PREFIX = "dlm-slurm-"
LOCK = "owner.lock"
MARK = "DLM_SANDBOX"  # an environment variable of all daemons: the folder of their sandbox


class SandboxError(Exception):
    """What keeps a sandbox from standing or from going, in one line."""


def name_of(folder: Path) -> str:
    """The name of a sandbox's cluster, with which the names of its nodes begin."""
    return folder.name.removeprefix(PREFIX).lower().replace("_", "x")


@contextlib.contextmanager
def owned_folder() -> Iterator[Path]:
    """Yield a new folder that belongs to this process. At the end, it goes with all that belongs to the sandbox."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=FOLDERS))
    lock = _lock_new(folder)
    with open(folder / LOCK) as waits:  # opened again: the guard must not share the lock of this process
        guard = subprocess.Popen([sys.executable, __file__, folder], stdin=waits, stdout=subprocess.DEVNULL,
                                 cwd="/", start_new_session=True)  # fmt: skip
    try:
        yield folder
    finally:
        clear(folder)
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)
        guard.wait()


def _lock_new(folder: Path) -> int:
    """Lock a new folder. The file has another name until it is locked, so that nobody finds it without its lock."""
    new = folder / f"{LOCK}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(folder / LOCK)
    return lock


def _lock_dead(folder: Path) -> int | None:
    """Lock the folder of a dead owner. None if the owner lives, or if the folder is no sandbox of this user."""
    try:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return None
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def clear_dead() -> None:
    """Clear what sandboxes without an owner have left. Raises SandboxError if a process of theirs does not end."""
    for folder in FOLDERS.glob(f"{PREFIX}*"):
        lock = _lock_dead(folder)
        if lock is not None:
            clear(folder)
            os.close(lock)
    # A machine that starts anew may empty /tmp and keep /etc/hosts. A sandbox makes its folder before its line.
    named = re.findall(rf" # ({re.escape(str(FOLDERS / PREFIX))}\w+)$", HOSTS.read_text(), re.MULTILINE)
    for folder in map(Path, named):
        if not os.path.lexists(folder) and not processes_of(folder):
            forget_hosts(folder)


def clear(folder: Path, *, seconds: float = 20) -> None:
    """Kill the processes of a sandbox, and remove its line in /etc/hosts and its folder."""
    deadline = time.monotonic() + seconds
    while pids := processes_of(folder):
        if time.monotonic() > deadline:
            raise SandboxError(f"processes of the sandbox {folder} do not end: {', '.join(map(str, pids))}")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    forget_hosts(folder)
    if folder.exists():
        shutil.rmtree(folder)


def processes_of(folder: Path) -> list[int]:
    """The processes of a sandbox, by their environment: its daemons, and all that runs in the jobs of its nodes."""
    daemon, job = f"{MARK}={folder}".encode(), f"SLURMD_NODENAME={name_of(folder)}-n".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or it is not ours
        if any(word == daemon or word.startswith(job) for word in environment):
            found.append(int(process.name))
    return found


def add_hosts(folder: Path, names: tuple[str, ...]) -> None:
    """Give the nodes of a sandbox the address 127.0.0.1."""
    line = f"127.0.0.1 {' '.join(names)} # {folder}\n"
    _change_hosts(lambda text: f"{text}{line}" if text.endswith("\n") else f"{text}\n{line}")


def forget_hosts(folder: Path) -> None:
    """Remove the line of a sandbox from /etc/hosts."""
    line = re.compile(rf"^127\.0\.0\.1 .* # {re.escape(str(folder))}$\n?", re.MULTILINE)
    _change_hosts(lambda text: line.sub("", text))


def _change_hosts(change: Callable[[str], str]) -> None:
    """Change /etc/hosts. A lock keeps sandboxes that begin or end at once from losing lines."""
    with open(HOSTS, "r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        changed = change(stream.read())
        stream.seek(0)  # the file is never empty, because other processes look names up in it
        stream.write(changed)
        stream.truncate()


def guard() -> None:
    """Wait for the lock of the owner, and clear what the owner has left."""
    fcntl.flock(sys.stdin, fcntl.LOCK_EX)
    if os.fstat(sys.stdin.fileno()).st_nlink:  # else the owner has removed the folder itself
        clear(Path(sys.argv[1]))


if __name__ == "__main__":
    guard()
