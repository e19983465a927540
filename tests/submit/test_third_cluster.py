"""A further back end is one class: a queue of threads takes a whole submission, without a change anywhere else."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence

import pytest
from support import TESTS
from support.submissions import ask_mode, make_plan, run_dir, state_of, submit, wait_until

from dlm.core.errors import UserError
from dlm.core.lease import live_holder
from dlm.record.outcomes import State
from dlm.submit.cell_now import JobState
from dlm.submit.cells import cancel
from dlm.submit.cluster import Answer, Cluster, Request, Submission
from dlm.submit.job import Job, SlurmSettings
from dlm.submit.ledger import Ledger
from dlm.submit.logs import logs_of
from dlm.submit.state import CLUSTERS


class ThreadQueue:
    """A thread runs the jobs one after the other, each in a process. The queue outlives the objects of the class."""

    name = "threads"
    queues = True
    settings = SlurmSettings(allow_dirty=True)
    states_by_id: dict[str, JobState] = {}  # noqa: RUF012 (shared on purpose)
    processes: dict[str, subprocess.Popen] = {}  # noqa: RUF012

    def check(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.resources.gpus_per_node:
                raise UserError(f"{job.name} needs GPUs: a queue of threads has none")

    def max_time_min(self, settings: SlurmSettings) -> int | None:
        return None

    def submit(self, request: Request) -> Submission:
        ledger, name = request.ledger, request.submission
        ledger.intent(name, request.jobs, cluster=self.name, code=request.code)
        ids = {job.name: f"{name}_{place}" for place, job in enumerate(request.jobs)}
        self.states_by_id |= dict.fromkeys(ids.values(), JobState(state=State.SUBMITTED, words="it waits"))
        ledger.submitted(name, ids)
        threading.Thread(target=self._run, args=(request, ids), daemon=True).start()
        return Submission(submitted=tuple(ids), job_ids=ids)

    def _run(self, request: Request, ids: Mapping[str, str]) -> None:
        for job in request.jobs:
            job_id = ids[job.name]
            if not self.states_by_id[job_id].is_live:
                continue
            job.run_dir.mkdir(parents=True, exist_ok=True)
            environment = {**os.environ, **request.environment, "PYTHONPATH": f"{request.code}:{TESTS}"}
            with open(job.run_dir / "log.txt", "ab") as log:
                command = [sys.executable, "-m", "support.stub_cell", *job.overrides]
                process = subprocess.Popen(command, env={**environment, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
            self.processes[job_id] = process
            self.states_by_id[job_id] = JobState(state=State.RUNNING, words="it runs")
            code = process.wait()
            if self.states_by_id[job_id].is_live:
                self.states_by_id[job_id] = JobState(
                    state=State.LOST, words=f"it ended with {code}", exit_code=max(code, 0), has_failed=code != 0
                )

    def states(
        self, jobs: Mapping[str, str], *, names: Iterable[str] = (), users: Iterable[int] = (), release: bool = False
    ) -> Answer:
        return Answer(states={job_id: self.states_by_id[job_id] for job_id in jobs if job_id in self.states_by_id})

    def cancel(self, ids: Sequence[str]) -> None:
        for job_id in ids:
            self.states_by_id[job_id] = JobState(state=State.CANCELLED, words="it was cancelled")
            if job_id in self.processes:
                self.processes[job_id].send_signal(signal.SIGTERM)


@pytest.fixture
def threads(monkeypatch) -> Cluster:
    """The queue, under its name in the table of clusters."""
    monkeypatch.setitem(CLUSTERS, ThreadQueue.name, ThreadQueue)
    yield ThreadQueue()
    for process in ThreadQueue.processes.values():
        process.kill()


def test_a_third_back_end_takes_a_submission_and_tells_how_its_jobs_ended(threads, sweep_dir):
    for name in ("fail", "config"):
        ask_mode(sweep_dir, name, name)
    plan = make_plan("fail", "config", "good")
    done = submit(plan, sweep_dir, threads)
    assert set(done.job_ids) == {"fail", "config", "good"} and state_of(sweep_dir, "good")[0] is State.SUBMITTED
    again = submit(plan, sweep_dir, threads)
    assert again.submitted == () and again.skipped["good"].startswith("submitted: it waits")
    wait_until(lambda: state_of(sweep_dir, "good")[0] is State.DONE)
    assert state_of(sweep_dir, "fail")[0] is State.FAILED
    assert state_of(sweep_dir, "config") == (
        State.BAD_CONFIG,
        f"job {done.job_ids['config']} ended with exit code 2: dlm: optimizer.lr is -1: it must be above zero",
    )
    assert submit(plan, sweep_dir, threads).submitted == ("fail",)
    wait_until(lambda: state_of(sweep_dir, "fail")[0] is State.FAILED)
    assert [record.cluster for record in Ledger(sweep_dir).read().values()] == ["threads"] * 3
    assert logs_of(run_dir(sweep_dir, "good")) == [run_dir(sweep_dir, "good") / "log.txt"]


def test_a_third_back_end_cancels_what_runs_and_what_waits_and_refuses_what_does_not_fit(threads, sweep_dir):
    ask_mode(sweep_dir, "a", "wait")
    ids = submit(make_plan("a", "b"), sweep_dir, threads).job_ids
    wait_until(lambda: live_holder(run_dir(sweep_dir, "a")) is not None)
    assert cancel(["a", "b"], sweep_dir) == {name: f"cancelled job {ids[name]}" for name in "ab"}
    wait_until(lambda: live_holder(run_dir(sweep_dir, "a")) is None)
    assert [state_of(sweep_dir, name)[0] for name in "ab"] == [State.CANCELLED] * 2
    with pytest.raises(UserError, match="a queue of threads has none"):
        submit(make_plan("c", gpus_per_node=1), sweep_dir, threads)
    assert "c" not in Ledger(sweep_dir).read()  # refused before anything was written down
