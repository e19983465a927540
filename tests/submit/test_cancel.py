"""Cancelling cells that run or wait, here and on a stand-in for SLURM."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from support.slurm_stand_in import end
from support.stub_cell import result
from support.submissions import ask_mode, make_plan, run_dir, state_of, submit, wait_until

from dlm.core.errors import UserError
from dlm.core.files import write_json
from dlm.core.lease import live_holder, process_started
from dlm.record.outcomes import State
from dlm.record.run import write_result
from dlm.submit.cells import cancel
from dlm.submit.follower import Following, stop_following, write_following
from dlm.submit.local import LocalPool
from dlm.submit.slurm import Slurm

OFF_THE_LIST = "taken off the list of the sweep here"
NOT_ASKED_FOR = "neither ran nor waited; it is not submitted until you ask for it again"


def test_cancel_stops_a_cell_of_this_machine_through_its_lease(sweep_dir):
    ask_mode(sweep_dir, "a", "wait")
    outcome = []
    # The pool runs in a thread here, so that the cancelling goes on beside it.
    thread = threading.Thread(target=lambda: outcome.append(submit(make_plan("a"), sweep_dir)))
    thread.start()
    wait_until(lambda: live_holder(run_dir(sweep_dir, "a")) is not None)
    time.sleep(0.1)
    assert "SIGTERM" in cancel(["a"], sweep_dir)["a"]
    thread.join(timeout=60)
    assert outcome[0].endings["a"] == (State.PREEMPTED, "stopped by a signal")
    assert state_of(sweep_dir, "a") == (State.CANCELLED, "by dlm cancel")


def test_cancel_ends_a_cell_that_has_only_just_begun(sweep_dir):
    ask_mode(sweep_dir, "a", "boot")
    outcome, events = [], []
    thread = threading.Thread(target=lambda: outcome.append(submit(make_plan("a"), sweep_dir, on_event=events.append)))
    thread.start()
    wait_until(lambda: events)
    assert cancel(["a"], sweep_dir) == {"a": OFF_THE_LIST}
    thread.join(timeout=60)
    assert outcome[0].exit_codes == {"a": 75}
    assert state_of(sweep_dir, "a") == (State.CANCELLED, "by dlm cancel")


def test_cancel_takes_the_cells_that_wait_off_the_pools_list(sweep_dir):
    ask_mode(sweep_dir, "a", "wait")
    outcome = []
    plan = make_plan("a", "b", "c")
    one_core = LocalPool(module="support.stub_cell", cores=1, poll_sec=0.02, grace_sec=5)
    thread = threading.Thread(target=lambda: outcome.append(submit(plan, sweep_dir, one_core)))
    thread.start()
    wait_until(lambda: live_holder(run_dir(sweep_dir, "a")) is not None)
    time.sleep(0.1)
    assert cancel(["c"], sweep_dir) == {"c": OFF_THE_LIST}
    assert cancel(["c"], sweep_dir) == {}
    done = cancel(["a", "b", "c"], sweep_dir)
    assert "SIGTERM" in done["a"] and done["b"] == OFF_THE_LIST and "c" not in done
    thread.join(timeout=60)
    assert list(outcome[0].exit_codes) == ["a"]
    assert {state_of(sweep_dir, name)[0] for name in "abc"} == {State.CANCELLED}


def test_cancel_stops_the_live_jobs_of_slurm_only(slurm, sweep_dir):
    submit(make_plan("a", "b", "c"), sweep_dir, Slurm())
    end(slurm, "1001_1", "FAILED|1:0")
    assert cancel(["a", "b", "c"], sweep_dir) == {"a": "cancelled job 1001_0", "c": "cancelled job 1001_2"}
    assert state_of(sweep_dir, "a")[0] is State.CANCELLED and state_of(sweep_dir, "b")[0] is State.FAILED


@pytest.mark.parametrize("name", [None, "another-job", "swept-follower-123456"])
def test_a_forged_record_of_a_follower_cancels_no_other_job(slurm, sweep_dir, name):
    submit(make_plan("a"), sweep_dir, Slurm())
    write_following(sweep_dir, Following(name=name, job_id="1001_0"))
    assert stop_following(sweep_dir) == "job 1001_0, which looked after the sweep, is not in the queue"
    assert state_of(sweep_dir, "a")[0] is State.SUBMITTED
    assert stop_following(sweep_dir) is None


def test_a_job_that_could_not_be_cancelled_is_not_shown_as_cancelled(slurm, sweep_dir, tmp_path):
    submit(make_plan("a"), sweep_dir, Slurm())
    (slurm / "down").touch()
    with pytest.raises(UserError, match="SLURM does not answer, so its jobs cannot be stopped"):
        cancel(["a"], sweep_dir)
    (slurm / "down").unlink()
    (tmp_path / "bin" / "scancel").write_text("#!/bin/bash\nexit 1\n")
    with pytest.raises(UserError, match="scancel failed"):
        cancel(["a"], sweep_dir)
    assert state_of(sweep_dir, "a")[0] is State.SUBMITTED


HOLD = """
import sys, time
from pathlib import Path
from support.stub_cell import status
from dlm.core.lease import Lease
from dlm.record.outcomes import State
from dlm.record.run import write_status
write_status(Path(sys.argv[1]), status(State.RUNNING))
with Lease(Path(sys.argv[1])):
    time.sleep(30)
"""


def test_a_run_by_hand_is_stopped_by_its_process_whatever_job_it_had(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    end(slurm, "1001_0", "FAILED|1:0")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir(sweep_dir, "a"))])
    wait_until(lambda: live_holder(run_dir(sweep_dir, "a")) is not None)
    assert cancel(["a"], sweep_dir) == {"a": f"SIGTERM to process {holder.pid}"}
    assert holder.wait(10) == -signal.SIGTERM


STAND_BY = "import time; time.sleep(60)"


def forge_lease(folder, pid: int, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    holder = {"host": socket.gethostname(), "pid": pid, "started": process_started(pid)}
    write_json(folder / "lease.json", {**holder, **changes})


def test_cancel_signals_no_process_that_a_forged_lease_names(sweep_dir):
    bystander = subprocess.Popen([sys.executable, "-c", STAND_BY, "dlm.launch", str(run_dir(sweep_dir, "a"))])
    try:
        forge_lease(run_dir(sweep_dir, "a"), bystander.pid)
        words = cancel(["a"], sweep_dir)["a"]
        assert "not stopped" in words and f"process {bystander.pid}" in words
        with pytest.raises(subprocess.TimeoutExpired):
            bystander.wait(0.3)
    finally:
        bystander.kill()
        bystander.wait()


def test_a_run_of_another_sweep_is_not_stopped_through_a_forged_lease(sweep_dir):
    other = sweep_dir.with_name("other")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir(other, "a"))])
    try:
        wait_until(lambda: live_holder(run_dir(other, "a")) is not None)
        forge_lease(run_dir(sweep_dir, "a"), holder.pid)
        assert "not stopped" in cancel(["a"], sweep_dir)["a"]
        assert cancel(["a"], other) == {"a": f"SIGTERM to process {holder.pid}"}
        assert holder.wait(10) == -signal.SIGTERM
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("pid", ["own", 1, 0, -1])
def test_cancel_signals_neither_itself_nor_init_nor_a_group(sweep_dir, pid, monkeypatch):
    pid = os.getpid() if pid == "own" else pid  # two workers of pytest must collect the same names
    sent = []
    monkeypatch.setattr(os, "kill", lambda *words: sent.append(words))
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *words: sent.append(words))
    started = process_started(pid) or "1"
    forge_lease(run_dir(sweep_dir, "a"), pid, started=started)
    assert "SIGTERM" not in cancel(["a"], sweep_dir).get("a", "")
    assert sent == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process as another user")
def test_cancel_signals_no_process_of_another_user(sweep_dir):
    folder = run_dir(sweep_dir, "a")
    folder.mkdir(parents=True, exist_ok=True)
    holding = "import os, sys, time; os.open(sys.argv[1], os.O_RDONLY); os.setuid(65534); print(1, flush=True)"
    other = subprocess.Popen([sys.executable, "-c", f"{holding}; time.sleep(60)", str(folder)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()
        forge_lease(folder, other.pid)
        assert "not stopped" in cancel(["a"], sweep_dir)["a"] and other.poll() is None
    finally:
        other.kill()
        other.communicate()


def test_a_postponed_cell_that_is_cancelled_by_name_is_not_submitted_unless_somebody_asks_for_it(slurm, sweep_dir):
    plan = make_plan("a", "b", "c")
    assert set(submit(plan, sweep_dir, Slurm(), pilot=True).postponed) == {"b", "c"}
    assert cancel(["b", "c"], sweep_dir) == {}  # nothing was asked about them by name
    assert cancel(["b"], sweep_dir, by_name=True) == {"b": NOT_ASKED_FOR}
    assert cancel(["b"], sweep_dir, by_name=True) == {}
    write_result(run_dir(sweep_dir, "a"), result("a"))
    end(slurm, "1001_0", "COMPLETED|0:0")
    done = submit(plan, sweep_dir, Slurm(), pilot=True, unattended=True)  # as the job that looks after a sweep does
    assert done.submitted == ("c",) and done.skipped["b"] == "cancelled: by dlm cancel"
    assert submit(plan, sweep_dir, Slurm(), pilot=True).submitted == ("b",)


def test_a_cell_that_would_not_be_started_anyway_keeps_its_state_when_it_is_cancelled(sweep_dir):
    ask_mode(sweep_dir, "b", "config")
    submit(make_plan("a", "b"), sweep_dir)
    assert cancel(["a", "b"], sweep_dir, by_name=True) == {}
    assert [state_of(sweep_dir, name)[0] for name in "ab"] == [State.DONE, State.BAD_CONFIG]


def test_an_id_that_scancel_would_take_for_an_option_is_refused(slurm):
    with pytest.raises(UserError, match=r"'--user=me' is no id of a job"):
        Slurm().cancel(["--user=me"])
