"""Submitting a plan to this machine with real processes: what runs, what is skipped, what is written down."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from support.stub_cell import STEPS, result, status
from support.submissions import ask_mode, make_plan, run_dir, submit

from dlm.core.lease import Lease
from dlm.core.paths import PACKAGE
from dlm.record import run
from dlm.record.outcomes import State
from dlm.record.run import write_result, write_status
from dlm.submit.cell_now import CellNow
from dlm.submit.job_endings import last_line
from dlm.submit.ledger import Ledger
from dlm.submit.state import cells_now


def test_a_second_submission_runs_nothing(sweep_dir):
    done = submit(make_plan("a", "b"), sweep_dir)
    assert done.endings == {"a": (State.DONE, None), "b": (State.DONE, None)} and not done.failed
    again = submit(make_plan("a", "b"), sweep_dir)
    assert again.submitted == () and again.skipped == {"a": "done", "b": "done"}
    assert len([line for line in Ledger(sweep_dir).path.read_text().splitlines() if '"intent"' in line]) == 1


def test_a_state_that_the_caller_has_read_is_not_read_again(sweep_dir, monkeypatch):
    plan, reads = make_plan("a", "b"), []
    write_result(run_dir(sweep_dir, "a"), result("a"))
    read = run.read_result
    monkeypatch.setattr(run, "read_result", lambda folder: reads.append(folder.name) or read(folder))
    now, _ = cells_now([(cell.cell_id, cell.steps) for cell in plan.cells], sweep_dir)
    assert reads == ["a", "b"]
    (run_dir(sweep_dir, "a") / "result.json").unlink()  # nobody looks
    done = submit(plan, sweep_dir, now=now)
    assert done.skipped == {"a": "done"} and done.submitted == ("b",)
    assert reads == ["a", "b", "b", "b"]  # the unfinished cell again before it started and when it had ended


def test_a_cell_that_ran_when_the_caller_looked_is_started_if_it_has_stopped_since(sweep_dir):
    old = {"a": CellNow(state=State.RUNNING, reason="process 77 on node3")}
    assert submit(make_plan("a"), sweep_dir, now=old).submitted == ("a",)


def test_only_a_whole_result_of_this_cell_at_its_last_step_counts_as_done(sweep_dir):
    write_result(run_dir(sweep_dir, "early"), result("early", step=STEPS - 1))
    write_result(run_dir(sweep_dir, "other"), result("another"))
    (run_dir(sweep_dir, "torn") / "result.json").write_text('{"cell_id": "torn", "st')
    write_result(run_dir(sweep_dir, "good"), result("good"))
    done = submit(make_plan("early", "other", "torn", "good"), sweep_dir)
    assert set(done.submitted) == {"early", "other", "torn"} and done.skipped == {"good": "done"}
    assert all(state is State.DONE for state, _ in done.endings.values())


@pytest.mark.parametrize("loss", ["result", "directory"])
def test_a_lost_result_is_computed_again_whatever_the_ledger_says(sweep_dir, loss):
    submit(make_plan("a"), sweep_dir)
    if loss == "result":
        (run_dir(sweep_dir, "a") / "result.json").unlink()
    else:
        shutil.rmtree(run_dir(sweep_dir, "a"))
    now, _ = cells_now([("a", STEPS)], sweep_dir)
    assert now["a"].state is State.LOST and "result.json is missing" in str(now["a"].reason)
    assert submit(make_plan("a"), sweep_dir).endings["a"] == (State.DONE, None)


def test_endings_are_reconciled_and_each_cause_has_its_own_retry(sweep_dir):
    for name in ("fail", "kill", "config", "quiet"):
        ask_mode(sweep_dir, name, name)
    done = submit(make_plan("fail", "kill", "config", "quiet"), sweep_dir)
    assert done.endings == {
        "fail": (State.FAILED, "RuntimeError: as asked"),
        "kill": (State.LOST, "killed by SIGKILL"),
        "config": (State.BAD_CONFIG, "dlm: optimizer.lr is -1: it must be above zero"),
        "quiet": (State.FAILED, "it exited 0 without a result.json of the planned last step"),
    }
    assert done.exit_codes["kill"] == -signal.SIGKILL
    again = submit(make_plan("fail", "kill", "config", "quiet"), sweep_dir)
    assert set(again.submitted) == {"fail", "kill", "quiet"} and "optimizer.lr is -1" in again.skipped["config"]
    forced = submit(make_plan("config"), sweep_dir, retry_failed=True)
    assert forced.submitted == ("config",)


@pytest.mark.parametrize("state", [State.DIVERGED, State.BAD_CONFIG])
def test_a_cell_whose_cause_of_failure_stays_is_not_tried_again(sweep_dir, state):
    write_status(run_dir(sweep_dir, "a"), status(state, exit_code=3, reason="as it says"))
    assert "as it says" in submit(make_plan("a"), sweep_dir).skipped["a"]


def test_a_cell_that_fails_for_an_unknown_cause_is_tried_three_times(sweep_dir):
    ask_mode(sweep_dir, "a", "fail")
    tries = [bool(submit(make_plan("a"), sweep_dir).submitted) for _ in range(5)]
    assert tries == [True, True, True, False, False]
    assert "failed 3 times (RuntimeError: as asked)" in submit(make_plan("a"), sweep_dir).skipped["a"]


def test_preemption_and_kills_never_use_up_the_tries(sweep_dir):
    ask_mode(sweep_dir, "a", "kill")
    assert all(submit(make_plan("a"), sweep_dir).submitted for _ in range(4))


def test_a_cell_that_another_process_runs_is_waited_for(sweep_dir):
    lease = Lease(run_dir(sweep_dir, "a"))
    lease.__enter__()
    seen, events = threading.Event(), []

    def release():
        assert seen.wait(30)
        write_result(run_dir(sweep_dir, "a"), result("a"))
        lease.__exit__()

    def on_event(event):
        events.append(event.kind)
        seen.set()

    thread = threading.Thread(target=release)
    thread.start()
    done = submit(make_plan("a"), sweep_dir, on_event=on_event)
    thread.join()
    assert events == ["deferred", "skipped"] and done.endings == {}


def test_the_jobs_run_the_snapshot_and_not_the_live_code(sweep_dir):
    submit(make_plan("a"), sweep_dir)
    path = (sweep_dir / "runs/a/log.txt").read_text().split("pythonpath=")[1].split(os.pathsep)[0]
    assert Path(path).parent == sweep_dir / "code" and (Path(path) / "configs/config.yaml").is_file()
    assert (Path(path) / "dlm/submit/cells.py").read_text() == (PACKAGE / "submit/cells.py").read_text()


def test_a_half_written_ledger_line_costs_that_line_only(sweep_dir):
    ask_mode(sweep_dir, "a", "fail")
    submit(make_plan("a"), sweep_dir)
    with open(Ledger(sweep_dir).path, "a") as stream:
        stream.write('{"event": "no such", "time": 1.0}\n{"event": "ended", "cell": "a", "sta')
    assert submit(make_plan("a"), sweep_dir).submitted == ("a",)
    assert Ledger(sweep_dir).read()["a"].submissions == 2


def test_a_ledger_of_an_earlier_dlm_is_read(sweep_dir):
    ledger = Ledger(sweep_dir)
    ledger._append("intent", submission="s", cluster="local", code="ab", cells=["a", "b"], was={"a": "failed"})
    ledger._append("cancelled", cells=["b"])
    assert ledger.read()["a"].failures == 1 and ledger.cancelled_now() == {"b"}


def test_a_cell_killed_with_its_parent_is_lost_and_goes_on(sweep_dir):
    write_status(run_dir(sweep_dir, "a"), status(State.RUNNING))
    now, _ = cells_now([("a", STEPS)], sweep_dir)
    assert now["a"].state is State.LOST
    assert submit(make_plan("a"), sweep_dir).endings["a"][0] is State.DONE


def test_last_line_of_a_log(tmp_path):
    assert last_line(tmp_path / "none") is None
    (tmp_path / "log").write_bytes(b"a\n" * 50000 + b"Error: \xff it broke\n\n  \n")
    assert last_line(tmp_path / "log") == "Error: � it broke"
