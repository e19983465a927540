"""Whether a batch job's cell is started: not beside a live process, not again, not past the sweep's GPU-hours."""

import dataclasses
import subprocess
import sys
import threading

import pytest
from support.stub_cell import result, status
from support.submissions import write_submitted

from dlm.core.errors import NOTHING_TO_DO, ExitCode
from dlm.core.lease import Lease
from dlm.core.paths import PACKAGE
from dlm.record.outcomes import State
from dlm.record.run import checkpoint_folder, gpu_hours_used, write_result, write_status
from dlm.submit.admit import admit
from dlm.submit.cell_now import JobState
from dlm.submit.cluster import Answer
from dlm.submit.ledger import Ledger, write_max_gpu_hours
from dlm.submit.state import cell_now


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path))
    folder = tmp_path / "demo" / "runs" / "mdm-4k-2e10-aaaa1111"
    folder.mkdir(parents=True)
    return folder


def test_a_cell_that_nobody_runs_is_started(run_dir):
    assert admit(run_dir, submission=None) == 0


def test_a_live_cell_is_waited_for_then_left_for_later(run_dir):
    with Lease(run_dir):
        assert admit(run_dir, submission=None, patience_sec=0) == ExitCode.PREEMPTED
    lease = Lease(run_dir)
    lease.__enter__()
    threading.Timer(0.5, lease.__exit__).start()
    assert admit(run_dir, submission=None, patience_sec=20) == 0


def test_a_cell_that_is_done_is_not_run_again(run_dir, capsys):
    write_result(run_dir, result(run_dir.name))
    assert admit(run_dir, submission=None) == NOTHING_TO_DO and "is done" in capsys.readouterr().out


def test_requeues_that_gain_no_step_end_after_three(run_dir, capsys):
    def checkpoint(step):
        folder = checkpoint_folder(run_dir, step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    write_submitted(run_dir.parents[1], run_dir.name, "s", "12_0")
    assert [admit(run_dir, submission="s") for _ in range(3)] == [0, 0, 0]  # the start, and two requeues for nothing
    checkpoint(50)
    assert [admit(run_dir, submission="s") for _ in range(3)] == [0, 0, 0]
    assert admit(run_dir, submission="s") == NOTHING_TO_DO
    reason = "3 times in a row it was requeued and gained no step since step 50: see its log"
    assert reason in capsys.readouterr().out
    job = JobState(state=State.LOST, words="SLURM says COMPLETED", exit_code=0)
    answer = Answer(states={"12_0": job})
    now = cell_now(run_dir, record=Ledger(run_dir.parents[1]).read()[run_dir.name], steps=None, answer=answer)
    assert (now.state, now.reason) == (State.CANCELLED, reason)
    write_submitted(run_dir.parents[1], run_dir.name, "t", "13_0")
    assert admit(run_dir, submission="t") == 0  # submitted anew, it starts anew


def test_a_sweep_that_has_used_its_gpu_hours_starts_no_more(run_dir, monkeypatch):
    other, sweep_dir = run_dir.with_name("mdm-4k-4e10-bbbb2222"), run_dir.parents[1]
    write_status(other, dataclasses.replace(status(State.PREEMPTED, exit_code=75), gpu_hours=1.5))
    write_status(run_dir, dataclasses.replace(status(State.FAILED, exit_code=1), gpu_hours=0.5))
    write_submitted(sweep_dir, run_dir.name, "s", "12_0")
    assert gpu_hours_used(sweep_dir) == 2
    write_max_gpu_hours(sweep_dir, 2.01)
    assert admit(run_dir, submission="s") == 0
    write_max_gpu_hours(sweep_dir, 2.0)
    assert admit(run_dir, submission="s") == NOTHING_TO_DO
    job = JobState(state=State.LOST, words="SLURM says COMPLETED", exit_code=0)
    now = cell_now(run_dir, Ledger(sweep_dir).read()[run_dir.name], Answer(states={"12_0": job}))
    assert now.state is State.CANCELLED and "used 2 of its 2 GPU-hours" in str(now.reason)
    write_max_gpu_hours(sweep_dir, None)  # raised: what waits goes ahead
    assert admit(run_dir, submission="s") == 0


def test_a_job_that_is_no_longer_wanted_starts_nothing(run_dir, capsys):
    sweep_dir = run_dir.parents[1]
    write_submitted(sweep_dir, run_dir.name, "first", "12_0")
    write_submitted(sweep_dir, run_dir.name, "second", "13_0")
    assert admit(run_dir, submission="first") == NOTHING_TO_DO and "anew as second" in capsys.readouterr().out
    assert admit(run_dir, submission="second") == 0
    Ledger(sweep_dir).cancelled([run_dir.name])
    assert admit(run_dir, submission="second") == NOTHING_TO_DO and "was cancelled" in capsys.readouterr().out


def test_the_command_imports_no_torch(run_dir):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "dlm.submit.admit", run_dir], cwd=PACKAGE.parent,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0
    assert not any(slow in done.stderr for slow in ("torch", "lightning", "pandas", "hydra", "numpy"))


@pytest.mark.parametrize(
    ("module", "name", "more"), [("admit", "restarts.json", ()), ("timeouts", "timeouts.json", ("2",))]
)
def test_a_damaged_count_is_one_line_in_the_log_of_the_job_and_an_exit_code(run_dir, module, name, more):
    (run_dir / name).write_text('{"submission": 7}')
    command = [sys.executable, "-m", f"dlm.submit.{module}", run_dir, *more]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == ExitCode.USER_ERROR and done.stderr == ""
    assert (
        done.stdout
        == f"dlm: {run_dir / name} is damaged (submission is 7, and must be text): restore or delete that file\n"
    )
