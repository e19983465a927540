"""What several tests need: prepared text, a work directory, and dlm's commands, here or in a process of their own."""

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

# A law holds however busy the machine is.
settings.register_profile("dlm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dlm")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that a user's mistake shows."""
        lines = self.err.strip().splitlines()
        assert self.code == 2 and len(lines) == 1 and lines[0].startswith("dlm: "), self
        return lines[0]


@pytest.fixture(scope="session")
def stdlib_data(tmp_path_factory):
    """DLM_DATA with data=stdlib prepared: once, for all worker processes."""
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
    """DLM_WORKDIR, empty."""
    folder = tmp_path / "workdir"
    folder.mkdir()
    monkeypatch.setenv("DLM_WORKDIR", str(folder))
    return folder


@pytest.fixture
def command():
    """`python -m MODULE ...` in a process of its own, to its end."""

    def run(module: str, *arguments: str | Path, timeout: float = 600) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            capture_output=True, text=True, cwd=PACKAGE.parent, timeout=timeout, check=False,
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def start(stdlib_data, workdir):
    """`python -m dlm.launch ...` in a process of its own, to be stopped half-way."""
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
    """`python -m dlm.launch ...` in this process, which has torch loaded already: its main, with its arguments."""
    from dlm import launch as module
    from dlm.train.callbacks.preemption import SIGNALS

    handlers = {number: signal.getsignal(number) for number in SIGNALS}  # a run takes them over
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*overrides: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["dlm.launch", *overrides])
        capfd.readouterr()
        code = module.main()
        return Ended(int(code), *capfd.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
