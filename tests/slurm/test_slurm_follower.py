"""A sweep that ends by itself: a small job resubmits what is worth it, writes the report and tells who asked."""

import json
import os
import shutil
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.slurm_sweep import LONG, SHORT, wait_for
from support.submissions import write_command

from dlm.core.files import read_json, read_jsonl
from dlm.record.run import read_status
from dlm.submit.ledger import Ledger

pytestmark = pytest.mark.slurm

SOON = "hydra.launcher.follow_min=1"


def record(sweep) -> dict:
    return read_json(sweep.folder / "ledger" / "follower.json")


def followed(sweep, *settings: str, launcher: str = "", more=()):
    return sweep.submit(*settings, launcher=launcher, more=["--then", "report", "--override", SOON, *more])


def ends(sweep) -> str:
    """Wait until the sweep is not looked after any more, and return how that ended."""
    return wait_for(lambda: record(sweep)["ended"], seconds=400, sleep=0.5)


@pytest.fixture
def webhook():
    """A server on loopback: (its URL, the messages that it got)."""
    messages = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", messages
    server.shutdown()
    server.server_close()


def test_a_killed_cell_comes_back_and_the_report_is_written_without_a_hand(sweep, webhook):
    url, messages = webhook
    started = followed(sweep, LONG, "seeds=[0,1]", more=["--webhook", url])
    assert started.code == 0 and "looks after the sweep" in started.out, started.err
    again = followed(sweep, LONG, "seeds=[0,1]", more=["--webhook", url])
    assert f"job {record(sweep)['job_id']} looks after the sweep" in again.out
    assert f"job {record(sweep)['job_id']} looks after" in sweep.command("dlm.cli", "status", sweep.folder).out
    wait_for(lambda: [run for run in sweep.run_dirs if (run / "LATEST").is_file() and (run / "lease.json").is_file()])
    victim = next(run for run in sweep.run_dirs if (run / "LATEST").is_file() and (run / "lease.json").is_file())
    os.kill(read_json(victim / "lease.json")["pid"], signal.SIGKILL)
    said = ends(sweep)
    assert said == f"report: {sweep.folder / 'report/report.html'}"
    assert {cell["state"] for cell in sweep.status()} == {"done"} and read_status(victim).attempts == 2
    assert (sweep.folder / "report/report.html").is_file()
    submitted = [line for line in read_jsonl(Ledger(sweep.folder).path) if line["event"] == "submitted"]
    assert len(submitted) == 2  # by hand, and by the follower
    assert len(messages) == 1 and messages[0]["cells"] == {"done": 2} and "report.html" in messages[0]["text"]
    assert f"looked after until its end: {said}" in sweep.command("dlm.cli", "status", sweep.folder).out


@pytest.mark.long
def test_what_is_cancelled_stays_cancelled(sweep, cluster):
    assert followed(sweep, "budgets=[2e12]").code == 0
    job = record(sweep)["job_id"]
    done = sweep.command("dlm.cli", "cancel", sweep.folder, "--yes")
    assert f"job {job}, which looks after the sweep: cancelled" in done.out
    wait_for(lambda: not cluster("squeue", "-h", f"--jobs={job}", check=False).strip())
    wait_for(lambda: sweep.cell["state"] == "cancelled")
    assert record(sweep)["ended"] == "cancelled"
    assert followed(sweep, "budgets=[2e12]").code == 0  # anew
    wait_for(lambda: sweep.queued() == ["RUNNING"])
    cluster("scancel", sweep.job_ids()[-1])  # by hand: the follower does not bring it back
    assert ends(sweep).startswith("no report: no run of")
    assert sweep.cell["state"] == "cancelled" and len(sweep.job_ids()) == 2


@pytest.mark.long
def test_a_webhook_that_does_not_answer_and_a_cluster_that_forbids_sbatch_in_jobs(sweep, tmp_path, monkeypatch):
    """The first sweep ends all the same; then the refusal stands in `dlm status`, with the command to type."""
    silent = followed(sweep, SHORT, more=["--webhook", "http://127.0.0.1:9/nobody"])
    assert silent.code == 0
    assert "report.html; the webhook did not take the message" in ends(sweep)
    commands = tmp_path / "bin"
    commands.mkdir()
    refuse = 'if [ -n "$DLM_FOLLOWER" ]; then echo "sbatch: error: not from a job" >&2; exit 1; fi'
    write_command(commands, "sbatch", f'{refuse}; {shutil.which("sbatch")} "$@"')
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    assert followed(sweep, SHORT, "budgets=[2e10,2e12]").code == 0
    trouble = wait_for(lambda: record(sweep)["trouble"], seconds=300, sleep=0.5)
    assert "not from a job" in trouble
    shown = sweep.command("dlm.cli", "status", sweep.folder).out
    assert (
        "nothing looks after the sweep any more" in shown
        and f"dlm submit {sweep.folder}" in shown
        and "--then report" in shown
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--then", "repot"], "--then repot: only report is known"),
        (["--webhook", "http://example.org"], "--webhook http://example.org: nothing would send it; add --then report"),
        (
            ["--then", "report", "--webhook", "example.org"],
            "--webhook example.org: give a URL that begins with http:// or https://, without a user name",
        ),
        (
            ["--then", "report", "--webhook", "http://me:word@example.org/x"],
            "--webhook http://***@example.org/x: give a URL that begins with http:// or https://, without a user name",
        ),
        (["--then", "report", "--mail", "me"], "--mail me: give an address"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(sweep, words, line):
    assert line in sweep.submit(SHORT, more=words).complaint
    assert sweep.job_ids() == []
