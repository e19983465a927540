"""The local pool with real processes."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support import TESTS
from support.stub_cell import result
from support.submissions import is_gone, make_job, make_pool, run_in, wait_until

from dlm.core.errors import UserError
from dlm.core.lease import Lease
from dlm.core.paths import PACKAGE
from dlm.record.run import write_result
from dlm.submit.local import visible_gpus


@pytest.fixture(autouse=True)
def stub_on_path(monkeypatch):
    """The jobs, and a parent in a process of its own, find the stub cell."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(PACKAGE.parent)]))


def test_pool_runs_all_and_reports_each_exit_code(tmp_path):
    jobs = [make_job(tmp_path, name, f"mode={name}") for name in ("done", "fail", "config", "kill")]
    events = []
    outcome = run_in(make_pool(), jobs, on_event=events.append)
    assert outcome.exit_codes == {"done": 0, "fail": 1, "config": 2, "kill": -signal.SIGKILL}
    assert not outcome.interrupted
    assert sorted(e.kind for e in events) == ["ended"] * 4 + ["started"] * 4
    assert (tmp_path / "sweep/runs/done/result.json").is_file()


def test_pool_never_runs_more_than_the_cores_allow(tmp_path):
    running, most = set(), []

    def watch(event):
        (running.add if event.kind == "started" else running.discard)(event.job.name)
        most.append(len(running))

    jobs = [make_job(tmp_path, f"c{i}", "sec=0.1", cpus_per_task=2) for i in range(4)]
    run_in(make_pool(cores=4), jobs, on_event=watch)
    assert max(most) == 2  # 4 cores // 2 each
    most.clear()
    run_in(make_pool(cores=1), [make_job(tmp_path, "wide", cpus_per_task=8)], on_event=watch)
    assert most == [1, 0]  # wider than the machine: alone, not never


def test_children_get_their_threads_the_snapshot_first_and_one_log(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "dlm").symlink_to(PACKAGE)
    job = make_job(tmp_path, "a", cpus_per_task=3)
    for _ in range(2):
        run_in(make_pool(), [job], code=code)
    log = (job.run_dir / "log.txt").read_text().splitlines()
    path = os.pathsep.join(map(str, (code, TESTS, PACKAGE.parent)))
    assert log == [f"done threads=3 pythonpath={path}"] * 2  # appended, not replaced


def test_a_job_that_another_process_runs_is_waited_for_then_skipped_or_run(tmp_path):
    finished, abandoned = make_job(tmp_path, "finished"), make_job(tmp_path, "abandoned")
    events, leases = [], [Lease(job.run_dir) for job in (finished, abandoned)]
    for lease in leases:
        lease.__enter__()
    started = time.monotonic()

    def release():
        if leases and time.monotonic() - started > 0.3:
            write_result(finished.run_dir, result("finished"))
            while leases:
                leases.pop().__exit__()

    outcome = run_in(make_pool(), [finished, abandoned], on_event=events.append, on_tick=release)
    assert outcome.exit_codes == {"abandoned": 0}  # the one without a result was run here, after the wait
    kinds = [(e.kind, e.job.name) for e in events]
    assert kinds.count(("deferred", "finished")) == kinds.count(("deferred", "abandoned")) == 1
    assert ("skipped", "finished") in kinds and ("started", "abandoned") in kinds


def test_sigterm_to_the_parent_stops_the_children_who_say_75(tmp_path):
    jobs = [make_job(tmp_path, f"c{i}", "mode=wait") for i in range(3)]

    def stop_when_both_run():
        if sum((job.run_dir / "status.json").is_file() for job in jobs) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    outcome = run_in(make_pool(), jobs, on_tick=stop_when_both_run)
    assert outcome.interrupted
    assert outcome.exit_codes == {"c0": 75, "c1": 75}  # c2 never started
    assert signal.getsignal(signal.SIGTERM) is handler


DRIVER = """
    import sys
    from pathlib import Path
    from dlm.core import signals
    from support.submissions import make_job, make_pool, run_in
    tmp_path = Path({tmp!r})
    outcome = run_in(make_pool({options}), [make_job(tmp_path, n, {mode!r}) for n in ("a", "b")])
    print(outcome.interrupted, signals.is_interrupted(), dict(sorted(outcome.exit_codes.items())), flush=True)
"""


def start_driver(tmp_path: Path, mode: str, options: str = "") -> tuple[subprocess.Popen, list[int]]:
    """A parent with two children that run, in a process group of its own; the children's pids."""
    script = textwrap.dedent(DRIVER.format(tmp=str(tmp_path), mode=mode, options=options))
    parent = subprocess.Popen(
        [sys.executable, "-c", script], start_new_session=True, text=True, cwd=TESTS.parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    leases = [tmp_path / f"sweep/runs/{name}/status.json" for name in "ab"]
    wait_until(lambda: all(path.is_file() for path in leases))
    pids = [int(re.search(r'"pid": (\d+)', path.with_name("lease.json").read_text())[1]) for path in leases]
    assert all(os.getpgid(pid) == parent.pid for pid in pids)  # the same process group
    return parent, pids


def test_ctrl_c_reaches_the_parent_only_and_leaves_no_orphan(tmp_path):
    parent, pids = start_driver(tmp_path, "mode=wait")
    os.killpg(parent.pid, signal.SIGINT)  # what a terminal does
    out, err = parent.communicate(timeout=60)
    assert err == "dlm: stopping after this step; Ctrl-C again to kill\n"
    assert out.strip() == "True True {'a': 75, 'b': 75}"  # not -2: the children never saw the SIGINT
    assert all(is_gone(pid) for pid in pids)


def test_kill_minus_9_of_the_group_ends_everything(tmp_path):
    parent, pids = start_driver(tmp_path, "mode=wait")
    os.killpg(parent.pid, signal.SIGKILL)
    parent.communicate(timeout=60)
    wait_until(lambda: all(is_gone(pid) for pid in pids))


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    parent, pids = start_driver(tmp_path, "sec=60", options="grace_sec=0.3")
    os.kill(parent.pid, signal.SIGTERM)
    out, _ = parent.communicate(timeout=60)
    assert out.strip() == "True False {'a': -9, 'b': -9}" and all(is_gone(pid) for pid in pids)


def test_an_error_in_a_callback_ends_the_children_too(tmp_path):
    job = make_job(tmp_path, "a", "mode=wait")

    def burst():
        if (job.run_dir / "lease.json").is_file():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_in(make_pool(), [job], on_tick=burst)
    assert not (job.run_dir / "lease.json").exists()


def test_each_job_has_gpus_of_its_own_and_too_many_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert visible_gpus() == ["4", "6"]
    with pytest.raises(UserError, match="needs 3 GPUs and this machine offers 2"):
        run_in(make_pool(), [make_job(tmp_path, "big", gpus_per_node=3)])
    with pytest.raises(UserError, match="needs 2 nodes"):
        run_in(make_pool(), [make_job(tmp_path, "wide", nodes=2)])
    jobs = [make_job(tmp_path, f"g{i}", "mode=wait", gpus_per_node=1) for i in range(3)]
    pids, seen = {}, {}

    def note(event):
        pids[event.job.name] = event.pid or pids[event.job.name]

    def look():
        seen.update({name: Path(f"/proc/{pid}/environ").read_bytes() for name, pid in pids.items()})
        if all((job.run_dir / "lease.json").is_file() for job in jobs[:2]):
            os.kill(os.getpid(), signal.SIGTERM)

    run_in(make_pool(cores=8), jobs, on_event=note, on_tick=look)
    devices = {name: re.search(rb"CUDA_VISIBLE_DEVICES=(\d+)", text)[1] for name, text in seen.items()}
    assert devices == {"g0": b"4", "g1": b"6"}  # the third waited, though cores were free
