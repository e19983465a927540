"""Fixtures for all tests: prepared data, a work directory, and dlm's commands in this process or in a new process."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from dlm.core.paths import PACKAGE

# Properties must hold on a busy machine too, so no example has a time limit.
settings.register_profile("dlm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dlm")


def pytest_collection_modifyitems(items):
    """Begin with the files that contain slow tests, so that no worker process is left with a long file at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@dataclass(frozen=True)
class Ended:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The error message, after asserting that it is the single line of a user error (exit code 2)."""
        lines = self.err.strip().splitlines()
        assert self.code == 2 and len(lines) == 1 and lines[0].startswith("dlm: "), self
        return lines[0]


@pytest.fixture(scope="session")
def stdlib_data(tmp_path_factory):
    """Set DLM_DATA to a folder in which data=stdlib is prepared, once for all worker processes. Yields the folder."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data"
    with FileLock(root.with_suffix(".lock")):
        from dlm.data.prepare.command import ensure_data

        ensure_data({"data_dir": root / "stdlib", "prepare": "stdlib"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLM_DATA", str(root))
        yield root


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Set DLM_WORKDIR to an empty folder, and return the folder."""
    folder = tmp_path / "workdir"
    folder.mkdir()
    monkeypatch.setenv("DLM_WORKDIR", str(folder))
    return folder


@pytest.fixture
def command():
    """Return a function that runs `python -m MODULE ...` in a new process and waits for its end."""

    def run(module: str, *arguments: str | Path, timeout: float = 600) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            capture_output=True, text=True, cwd=PACKAGE.parent, timeout=timeout, check=False,
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def start(stdlib_data, workdir):
    """Yield a function that starts `python -m dlm.launch ...` in a new process, which the test can interrupt."""
    started: list[subprocess.Popen] = []

    def popen(*overrides: str) -> subprocess.Popen:
        arguments = [sys.executable, "-m", "dlm.launch", *overrides]
        started.append(
            subprocess.Popen(arguments, cwd=PACKAGE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def launch(stdlib_data, workdir, monkeypatch, capfd):
    """Yield a function that calls the main function of dlm.launch in this process, where torch is loaded already."""
    from dlm import launch as module
    from dlm.train.callbacks.preemption import SIGNALS

    handlers = {number: signal.getsignal(number) for number in SIGNALS}  # a run replaces them
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*overrides: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["dlm.launch", *overrides])
        capfd.readouterr()
        code = module.main()
        return Ended(int(code), *capfd.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
