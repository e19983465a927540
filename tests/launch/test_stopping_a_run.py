"""Ctrl-C stops a run at a step, with a line at once, and leaves no traceback."""

import signal
import subprocess
import sys

import pytest
from support.runs import TINY, only_run, wait_for

from dlm.core.paths import PACKAGE
from dlm.record.outcomes import State
from dlm.record.run import read_status

ENDLESS = (*TINY, "training.steps=1000000")


def stopped_step(workdir) -> int:
    """The step at which the only run stopped, which its status tells in words too."""
    status = read_status(only_run(workdir))
    assert status is not None and (status.state, status.exit_code) == (State.PREEMPTED, 75)
    assert status.reason == f"stopped at step {status.step:,} of 1,000,000"
    return status.step


@pytest.mark.slow
def test_ctrl_c_stops_a_run_after_the_step_and_again_at_once(start, workdir):
    process = start(*ENDLESS)
    wait_for(lambda: list(workdir.glob("adhoc/runs/*/metrics.jsonl")), process=process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err.strip() == "dlm: stopping after this step; Ctrl-C again to kill"
    assert "Traceback" not in out and stopped_step(workdir) > 0
    assert (only_run(workdir) / "LATEST").read_text().strip().endswith(f"{stopped_step(workdir):08d}")


def test_ctrl_c_between_the_record_and_the_first_step_is_a_stop_too(launch, workdir, monkeypatch):
    from dlm.train import run

    def pressed(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run, "make_trainer", pressed)
    ended = launch(*ENDLESS)
    assert ended.code == 75 and ended.err.strip() == "dlm: stopping; Ctrl-C again to kill"
    assert stopped_step(workdir) == 0


@pytest.mark.parametrize("module", ["omegaconf", "torch.types"])
def test_ctrl_c_while_python_imports_leaves_no_traceback(module, stdlib_data, workdir):
    command = [sys.executable, "-X", "importtime", "-m", "dlm.launch", *ENDLESS]
    process = subprocess.Popen(command, cwd=PACKAGE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.split("|")[-1].strip() == module:
            break
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in err, err[-2000:]
