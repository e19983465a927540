"""A signal that comes before there is a run to stop."""

import ast
import os
import signal
import subprocess
import sys

from dlm.core import signals
from dlm.core.paths import PACKAGE


def test_a_signal_before_the_run_is_remembered_for_it():
    from dlm.train.callbacks.preemption import SIGNALS, Preemption

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signals.remember()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        owner = Preemption()
        owner.take_signals()
        assert signals.asked_to_stop() and owner._flag
    finally:
        signals.forget()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_submitted_run_remembers_signals_before_it_imports_anything_slow():
    tree = ast.parse((PACKAGE / "launch.py").read_text())
    first = next(place for place, node in enumerate(tree.body) if isinstance(node, ast.If))
    assert "signals.remember()" in ast.unparse(tree.body[first])
    imported = [ast.unparse(node) for node in tree.body[:first] if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imported == ["from __future__ import annotations", "import os", "from dlm.core import signals"]


def test_every_process_of_a_run_says_why_it_cannot_begin(tmp_path):
    """The data may lack on one node only, whose process is not the first."""
    environment = os.environ | {"SLURM_PROCID": "1", "DLM_DATA": str(tmp_path), "DLM_WORKDIR": str(tmp_path)}
    command = [sys.executable, "-m", "dlm.launch", "data=slim_pajama", "model=6M"]
    done = subprocess.run(command, env=environment, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "no prepared data" in done.stderr
