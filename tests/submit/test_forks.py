"""Processes that are started by fork: what they inherit, and what happens when their server ends or is told to end."""

import os
import signal
import time
from pathlib import Path

import pytest
from support import TESTS
from support.submissions import is_gone, make_job, make_pool, run_in, wait_until

from dlm.core.paths import PACKAGE
from dlm.submit.forks import ForkServer

PATH = os.pathsep.join([str(TESTS), str(PACKAGE.parent)])


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{PATH}")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")


@pytest.fixture
def serve(tmp_path):
    """Return a function that starts a server of a module, and waits until it is ready."""
    servers = []

    def start(module: str = "support.stub_cell") -> ForkServer:
        servers.append(ForkServer(module, os.environ, tmp_path / "server.txt"))
        wait_until(servers[-1].is_ready)
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def start(server: ForkServer, folder: Path, mode: str):
    """Start a stub cell that is named after its mode."""
    overrides = make_job(folder, mode, f"mode={mode}").overrides
    return server.start(mode, overrides, folder / f"{mode}.txt")


def test_processes_end_with_their_own_exit_codes_and_logs(serve, tmp_path):
    server = serve()
    modes = {"done": 0, "fail": 1, "config": 2, "kill": -signal.SIGKILL}
    started = {mode: start(server, tmp_path, mode) for mode in modes}
    assert {mode: process.wait() for mode, process in started.items()} == modes
    assert {mode: process.poll() for mode, process in started.items()} == modes
    assert (tmp_path / "done.txt").read_text() == f"done threads=7 pythonpath={os.environ['PYTHONPATH']}\n"
    assert (tmp_path / "server.txt").read_text() == ""


LEAVING = """
import atexit, threading, time

def main():
    atexit.register(lambda: print("at exit", end=""))
    threading.Thread(target=lambda: (time.sleep(0.3), print("of a thread"))).start()
    print("not flushed")
    return 3
"""


def test_a_process_ends_as_any_other_does(serve, tmp_path):
    (tmp_path / "leaving_cell.py").write_text(LEAVING)
    assert serve("leaving_cell").start("a", [], tmp_path / "a.txt").wait() == 3
    assert (tmp_path / "a.txt").read_text() == "not flushed\nof a thread\nat exit"


def test_a_process_is_shown_by_its_name_and_reads_nothing(serve, tmp_path):
    process = start(serve(), tmp_path, "wait")
    wait_until((tmp_path / "sweep/runs/wait/status.json").is_file)
    assert Path(f"/proc/{process.pid}/comm").read_text() == "wait\n"
    opened = [str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in (0, 1, 2)]
    assert opened == [os.devnull, *[str(tmp_path / "wait.txt")] * 2]
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_the_server_is_not_ended_by_a_signal_to_stop(serve, tmp_path, number):
    server = serve()
    os.kill(server._server.pid, number)
    assert start(server, tmp_path, "done").wait() == 0


def test_no_signal_to_a_process_that_has_just_begun_is_lost(serve, tmp_path):
    """The process remembers it from the very first moment."""
    server = serve()
    for _ in range(20):
        process = start(server, tmp_path, "boot")
        process.terminate()
        assert process.wait() == 75


def test_when_the_server_is_killed_its_processes_are_told_to_end_and_waited_for(serve, tmp_path):
    server = serve()
    process = start(server, tmp_path, "wait")
    wait_until((tmp_path / "sweep/runs/wait/status.json").is_file)
    os.kill(server._server.pid, signal.SIGKILL)
    server._server.wait()
    assert process.wait() == -signal.SIGTERM and is_gone(process.pid)
    assert '"preempted"' in (tmp_path / "sweep/runs/wait/status.json").read_text()
    with pytest.raises(OSError):
        start(server, tmp_path, "done")


def test_a_server_ends_with_the_process_that_started_it(serve):
    server = serve()
    server._requests.write(b'{"name": "a", "argum')  # the process was killed while it wrote this
    server._requests.close()
    assert server._server.wait(60) == 0


def test_a_server_that_still_imports_is_ended(tmp_path):
    (tmp_path / "slow_cell.py").write_text("import time; time.sleep(600)\n")
    server = ForkServer("slow_cell", os.environ, tmp_path / "server.txt")
    assert not server.is_ready()
    server.close()
    assert is_gone(server._server.pid)


def test_a_pool_goes_on_with_its_other_work_while_the_server_imports(tmp_path):
    (tmp_path / "slow_cell.py").write_text(
        "import time, pathlib\n"
        f"while not pathlib.Path({str(tmp_path / 'ticked')!r}).exists(): time.sleep(0.01)\n"
        "from support.stub_cell import main\n"
    )
    ticks = []

    def tick():
        ticks.append(time.monotonic())
        if len(ticks) == 5:
            (tmp_path / "ticked").touch()

    assert run_in(make_pool(module="slow_cell"), [make_job(tmp_path, "a")], on_tick=tick).exit_codes == {"a": 0}


def test_a_module_that_cannot_be_imported_says_so_in_the_log_of_the_cell(tmp_path):
    job = make_job(tmp_path, "a")
    outcome = run_in(make_pool(module="support.no_such_module"), [job])
    assert outcome.exit_codes == {"a": 1}
    assert "No module named" in (job.run_dir / "log.txt").read_text()


THREADED = """
import threading
from support.stub_cell import main

def preload():
    threading.Thread(target=threading.Event().wait, daemon=True).start()

if __name__ == "__main__":
    raise SystemExit(main())
"""


def test_a_server_with_threads_forks_nothing_and_the_jobs_run_all_the_same(tmp_path):
    (tmp_path / "threaded_cell.py").write_text(THREADED)
    jobs = [make_job(tmp_path, name) for name in "ab"]
    assert run_in(make_pool(module="threaded_cell"), jobs).exit_codes == {"a": 0, "b": 0}
    for job in jobs:
        log = (job.run_dir / "log.txt").read_text()
        assert "not forked but started anew: the server of forks has 2 threads" in log and "done threads=1" in log


def test_jobs_that_need_another_environment_than_the_server_get_their_own_process(tmp_path, monkeypatch):
    """CUDA may not work after a fork, and threads are started during the imports."""
    jobs = [
        make_job(tmp_path, "one"),
        make_job(tmp_path, "three", cpus_per_task=3),
        make_job(tmp_path, "gpu", gpus_per_node=1),
    ]
    shown = {}

    def look(event):
        if event.kind == "started":
            shown[event.job.name] = Path(f"/proc/{event.pid}/cmdline").read_bytes()

    pool = make_pool(cores=1, gpus=["0"])
    assert set(run_in(pool, jobs, on_event=look).exit_codes.values()) == {0}
    assert {name: b"dlm.submit.forks" in command for name, command in shown.items()} == {
        "one": True,
        "three": False,
        "gpu": False,
    }
    logs = {job.name: (job.run_dir / "log.txt").read_text() for job in jobs}
    assert "threads=1" in logs["one"] and "threads=3" in logs["three"]


def test_a_pool_with_nothing_to_fork_starts_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr("dlm.submit.local.ForkServer", None)  # cannot be called
    job = make_job(tmp_path, "gpu", gpus_per_node=1)
    assert run_in(make_pool(gpus=["0"]), [job]).exit_codes == {"gpu": 0}
