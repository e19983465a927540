"""Ctrl-C ends a command of dlm with exit code 130, one line and no traceback, whatever Python is doing."""

import importlib
import os
import signal
import subprocess
import sys

import pytest

from dlm import launch
from dlm.cli import verbs
from dlm.core import signals
from dlm.core.errors import UserError
from dlm.core.paths import PACKAGE

IMPORTS_UNTIL_CTRL_C = """
import signal, sys
from dlm.cli.entry import main

class PressCtrlC:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "typer":
            assert "dlm.cli.verbs" in sys.modules and not hasattr(sys.modules["dlm.cli.verbs"], "main")
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, PressCtrlC)
main()
"""


def test_ctrl_c_during_the_first_imports_ends_the_command_at_once():
    command = [sys.executable, "-c", IMPORTS_UNTIL_CTRL_C]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "dlm: stopped\n")


@pytest.mark.parametrize("module", ["pydantic", "pandas._libs.lib"])
def test_ctrl_c_while_python_imports_leaves_no_traceback(module, tmp_path):
    (tmp_path / "runs.csv").write_text("params,tokens,loss\n")
    command = [sys.executable, "-X", "importtime", "-m", "dlm.cli", "fit", str(tmp_path / "runs.csv")]
    command = [*command[:-2], "plan", "smoke", "--dry-run"] if module == "pydantic" else command
    process = subprocess.Popen(command, cwd=PACKAGE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(line.split("|")[-1].strip() == module for line in process.stderr)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 130 and said == ["dlm: stopping; Ctrl-C again to kill"], said


@pytest.mark.parametrize("turned_into", [None, ImportError("multiarray failed to import"), SystemExit(1)])
def test_ctrl_c_is_exit_code_130_even_if_a_library_makes_another_error_of_it(turned_into, monkeypatch, capfd):
    def pressed(*_, **__):
        try:
            exec("import signal; signal.raise_signal(signal.SIGINT)")
        except KeyboardInterrupt:
            if turned_into is None:
                raise
            raise turned_into from None

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(verbs.targets, "planned", pressed)
    monkeypatch.setattr(sys, "argv", ["dlm", "plan", "smoke"])
    try:
        with pytest.raises(SystemExit) as stop:
            verbs.main()
    finally:
        signals.forget()
    assert stop.value.code == 130 and capfd.readouterr().err == "dlm: stopping; Ctrl-C again to kill\n"
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("error", "code", "line"), [(UserError("a mistake"), 2, "dlm: a mistake\n"), (RuntimeError("a bug"), None, "")]
)
def test_an_error_after_a_stop_in_good_order_is_shown(error, code, line, monkeypatch, capsys):
    def stopped_then_failed(*_, **__):
        signals.note(signal.SIGINT)  # as the local pool does
        raise error

    monkeypatch.setattr(verbs.targets, "planned", stopped_then_failed)
    monkeypatch.setattr(sys, "argv", ["dlm", "plan", "smoke"])
    try:
        with pytest.raises((SystemExit, RuntimeError)) as ended:
            verbs.main()
    finally:
        signals.forget()
    assert ended.value is error if code is None else ended.value.code == code
    assert capsys.readouterr().err == line


def test_an_error_of_a_run_after_a_stop_in_good_order_is_shown(monkeypatch):
    def stopped_then_failed():
        signals.note(signal.SIGINT)
        raise RuntimeError("the checkpoint could not be written")

    monkeypatch.setattr(launch, "_main", stopped_then_failed)
    try:
        with pytest.raises(RuntimeError, match="could not be written"):
            launch.main()
    finally:
        signals.forget()


def test_an_import_that_ctrl_c_broke_is_no_error(tmp_path, monkeypatch):
    """C code that is imported may drop KeyboardInterrupt and raise an exception of its own."""
    (tmp_path / "broken_by_ctrl_c.py").write_text("raise SystemError('initialization failed')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def stopped_during_import():
        signals.note(signal.SIGINT)
        importlib.import_module("broken_by_ctrl_c")

    monkeypatch.setattr(launch, "_main", stopped_during_import)
    try:
        assert launch.main() == 130
    finally:
        signals.forget()


def test_the_second_ctrl_c_kills():
    code = (
        "import os, signal\nfrom dlm.core import signals\n"
        "with signals.interrupted_by_ctrl_c():\n"
        "    try: signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt: signal.raise_signal(signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "dlm: stopping; Ctrl-C again to kill\n")


def test_an_exit_code_stays_one_after_an_interrupted_exec():
    """CPython ends by SIGINT after KeyboardInterrupt inside the `exec` of a string, even if it was caught."""
    code = (
        "import sys\nfrom dlm.core import signals\n"
        "with signals.interrupted_by_ctrl_c():\n"
        "    try: exec('import signal; signal.raise_signal(signal.SIGINT)')\n"
        "    except KeyboardInterrupt: pass\n"
        "sys.exit(130)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True).returncode
        == 130
    )
