"""Plan -> jobs with real local processes and a stand-in SLURM: what runs, what is skipped, what is written down."""

import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from support import TESTS
from support.stub_cell import STEPS, result, status

from dlm.core.errors import UserError
from dlm.core.git import code_origin
from dlm.core.lease import Lease, live_holder
from dlm.core.paths import PACKAGE, configs_dir
from dlm.record import run as run_module
from dlm.record.outcomes import State
from dlm.record.run import write_result, write_status
from dlm.submit import slurm as ledger_module
from dlm.submit import submission as dispatch_module
from dlm.submit.cells import cancel, cell_overrides, submit_plan
from dlm.submit.job import Job, SlurmSettings
from dlm.submit.ledger import Ledger
from dlm.submit.local import LocalPool
from dlm.submit.resources import cell_resources, time_limit_min, trainer_overrides
from dlm.submit.slurm import Slurm
from dlm.submit.snapshot import snapshot_code
from dlm.submit.state import cells_now, last_line
from dlm.submit.submission import Pace, quote, submit_jobs

OFF_THE_LIST = "taken off the list of the sweep here"


def make_cell(name: str, **changes) -> SimpleNamespace:
    values = {
        "cell_id": name, "global_batch_size": 8, "num_params": 4144, "num_params_total": 8000, "memory_gib": None,
        "steps": STEPS, "nodes": 1, "gpus_per_node": 0, "hours": None, "groups": {"trainer": "cpu"}, "overrides": {},
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def make_plan(*names: str, **changes) -> SimpleNamespace:
    return SimpleNamespace(cells=tuple(make_cell(name, **changes) for name in names))


@pytest.fixture
def sweep_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    return tmp_path / "work" / "demo"


def run_dir(sweep_dir: Path, name: str) -> Path:
    folder = sweep_dir / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def submit(plan, sweep_dir, cluster=None, **options):
    cluster = cluster or LocalPool(module="support.stub_cell", cores=2, poll_sec=0.02, grace_sec=5)
    return submit_plan(plan, sweep_dir, cluster=cluster, data_dir=sweep_dir / "data", **options)


def ask_mode(sweep_dir: Path, name: str, mode: str) -> None:
    (run_dir(sweep_dir, name) / "mode").write_text(mode)


# --- here ---------------------------------------------------------------------------------------------------------


def test_a_second_submission_runs_nothing(sweep_dir):
    done = submit(make_plan("a", "b"), sweep_dir)
    assert done.endings == {"a": (State.DONE, None), "b": (State.DONE, None)} and not done.failed
    again = submit(make_plan("a", "b"), sweep_dir)
    assert again.submitted == () and again.skipped == {"a": "done", "b": "done"}
    assert len([line for line in Ledger(sweep_dir).path.read_text().splitlines() if '"intent"' in line]) == 1


def test_a_state_that_the_caller_has_read_is_not_read_again(sweep_dir, monkeypatch):
    plan, reads = make_plan("a", "b"), []
    write_result(run_dir(sweep_dir, "a"), result("a"))
    read = run_module.read_result
    monkeypatch.setattr(run_module, "read_result", lambda folder: reads.append(folder.name) or read(folder))
    now, _ = cells_now([(cell.cell_id, cell.steps) for cell in plan.cells], sweep_dir)
    assert reads == ["a", "b"]
    (run_dir(sweep_dir, "a") / "result.json").unlink()  # nobody looks
    done = submit(plan, sweep_dir, now=now)
    assert done.skipped == {"a": "done"} and done.submitted == ("b",)
    assert reads == ["a", "b", "b"]  # once more when it had ended


def test_only_a_whole_result_of_this_cell_at_its_last_step_counts_as_done(sweep_dir):
    write_result(run_dir(sweep_dir, "early"), result("early", step=STEPS - 1))
    write_result(run_dir(sweep_dir, "other"), result("another"))
    (run_dir(sweep_dir, "torn") / "result.json").write_text('{"cell_id": "torn", "st')
    write_result(run_dir(sweep_dir, "good"), result("good"))
    done = submit(make_plan("early", "other", "torn", "good"), sweep_dir)
    assert set(done.submitted) == {"early", "other", "torn"} and done.skipped == {"good": "done"}
    assert all(state is State.DONE for state, _ in done.endings.values())


@pytest.mark.parametrize("loss", ["result", "directory"])
def test_a_result_that_is_lost_is_made_again_whatever_the_ledger_says(sweep_dir, loss):
    submit(make_plan("a"), sweep_dir)
    if loss == "result":
        (run_dir(sweep_dir, "a") / "result.json").unlink()
    else:
        shutil.rmtree(run_dir(sweep_dir, "a"))
    now, _ = cells_now([("a", STEPS)], sweep_dir)
    assert now["a"].state is State.LOST and "result.json is gone" in str(now["a"].reason)
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
def test_a_cause_that_stays_is_not_tried_again(sweep_dir, state):
    write_status(run_dir(sweep_dir, "a"), status(state, exit_code=3, reason="as it says"))
    assert "as it says" in submit(make_plan("a"), sweep_dir).skipped["a"]


def test_an_unknown_cause_is_tried_three_times(sweep_dir):
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


def test_the_snapshot_is_made_once_per_content_and_an_edit_of_it_is_seen(tmp_path):
    package = tmp_path / "src/dlm"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    first = snapshot_code(tmp_path, package=package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__/x.pyc").write_bytes(b"1")
    assert snapshot_code(tmp_path, package=package) == first
    (package / "flops.py").write_text("# changed\n")
    second = snapshot_code(tmp_path, package=package)
    assert second != first and (first / "dlm/core/flops.py").read_text() != "# changed\n"
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == sorted([first.name, second.name])
    (second / "dlm/core/flops.py").write_text("# edited in place\n")
    with pytest.raises(UserError, match="was changed after it was written"):
        snapshot_code(tmp_path, package=package)


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_changes_that_no_commit_holds_need_a_word_and_their_diff_is_kept(tmp_path, monkeypatch):
    root = tmp_path / "repository"
    shutil.copytree(PACKAGE, root / "dlm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(configs_dir(), root / "configs")
    monkeypatch.setenv("DLM_CONFIGS", str(root / "configs"))
    (root / "pyproject.toml").touch()
    assert code_origin(root / "dlm") is None  # no repository
    git(root, "init")
    git(root, "add", "-A")
    git(root, "commit", "-m", "all")
    clean = code_origin(root / "dlm")
    assert clean is not None and (clean.changed, clean.diff) == ((), "")
    (root / "notes.txt").write_text("is no code")
    assert code_origin(root / "dlm") == clean
    (root / "dlm/core/flops.py").write_text("# changed\n")
    (root / "configs/data/mine.yaml").write_text("name: mine\n")
    (root / "configs/data/mein größter.yaml").write_text("name: ours\n")
    (root / "pyproject.toml").write_text("[x]\n")
    origin = code_origin(root / "dlm")
    assert origin is not None and origin.sha == clean.sha
    assert set(origin.changed) == {
        "dlm/core/flops.py",
        "configs/data/mine.yaml",
        "configs/data/mein größter.yaml",
        "pyproject.toml",
    }
    assert all(line in origin.diff for line in ("+# changed", "+name: mine", "+name: ours", "+[x]"))
    monkeypatch.setattr(dispatch_module, "code_origin", lambda: origin)
    job = Job(name="a", overrides=("+cell=a",), run_dir=tmp_path / "work/demo/runs/a")
    with pytest.raises(UserError, match=r"differ from the last commit: commit them, or submit with --allow-dirty"):
        submit_jobs([job], cluster=Slurm(), sweep_dir=tmp_path / "work/demo")
    assert not (tmp_path / "work").exists()
    code = snapshot_code(tmp_path / "work/demo", package=root / "dlm", configs=root / "configs", origin=origin)
    git(root, "stash", "--include-untracked")
    git(root, "apply", str(code.with_name(f"{code.name}.diff")))  # the commit and the diff give what ran
    assert (root / "dlm/core/flops.py").read_bytes() == (code / "dlm/core/flops.py").read_bytes() == b"# changed\n"
    assert (root / "configs/data/mine.yaml").read_bytes() == (code / "configs/data/mine.yaml").read_bytes()


def test_a_half_written_ledger_line_costs_that_line_only(sweep_dir):
    ask_mode(sweep_dir, "a", "fail")
    submit(make_plan("a"), sweep_dir)
    with open(Ledger(sweep_dir).path, "a") as stream:
        stream.write('{}\n{"cell": 5}\n{"event": "no such", "time": 1.0}\n{"event": "ended", "cell": "a", "sta')
    assert submit(make_plan("a"), sweep_dir).submitted == ("a",)
    assert Ledger(sweep_dir).read()["a"].submissions == 2


def test_a_cell_killed_with_its_parent_is_lost_and_goes_on(sweep_dir):
    write_status(run_dir(sweep_dir, "a"), status(State.RUNNING))
    now, _ = cells_now([("a", STEPS)], sweep_dir)
    assert now["a"].state is State.LOST
    assert submit(make_plan("a"), sweep_dir).endings["a"][0] is State.DONE


def test_cancel_stops_a_cell_of_this_machine_through_its_lease(sweep_dir):
    ask_mode(sweep_dir, "a", "wait")
    outcome = []
    # The pool runs in a thread here, so that the cancelling goes on beside it.
    thread = threading.Thread(target=lambda: outcome.append(submit(make_plan("a"), sweep_dir)))
    thread.start()
    while live_holder(run_dir(sweep_dir, "a")) is None:
        time.sleep(0.02)
    time.sleep(0.1)
    assert "SIGTERM" in cancel(["a"], sweep_dir)["a"]
    thread.join(timeout=10)
    assert outcome[0].endings["a"] == (State.PREEMPTED, "stopped by a signal")
    assert state_of(sweep_dir, "a") == (State.CANCELLED, "by dlm cancel")


def test_cancel_ends_a_cell_that_has_only_just_begun(sweep_dir):
    ask_mode(sweep_dir, "a", "boot")
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(submit(make_plan("a"), sweep_dir)))
    thread.start()
    while not (run_dir(sweep_dir, "a") / "log.txt").is_file():
        time.sleep(0.02)
    assert cancel(["a"], sweep_dir) == {"a": OFF_THE_LIST}
    thread.join(timeout=10)
    assert outcome[0].exit_codes == {"a": -signal.SIGTERM}
    assert state_of(sweep_dir, "a") == (State.CANCELLED, "by dlm cancel")


def test_cancel_takes_the_cells_that_wait_off_the_pools_list(sweep_dir):
    ask_mode(sweep_dir, "a", "wait")
    outcome = []
    plan = make_plan("a", "b", "c")
    one_core = LocalPool(module="support.stub_cell", cores=1, poll_sec=0.02, grace_sec=5)
    thread = threading.Thread(target=lambda: outcome.append(submit(plan, sweep_dir, one_core)))
    thread.start()
    while live_holder(run_dir(sweep_dir, "a")) is None:
        time.sleep(0.02)
    time.sleep(0.1)
    assert cancel(["c"], sweep_dir) == {"c": OFF_THE_LIST}
    assert cancel(["c"], sweep_dir) == {}
    done = cancel(["a", "b", "c"], sweep_dir)
    assert "SIGTERM" in done["a"] and done["b"] == OFF_THE_LIST and "c" not in done
    thread.join(timeout=10)
    assert list(outcome[0].exit_codes) == ["a"]
    assert {state_of(sweep_dir, name)[0] for name in "abc"} == {State.CANCELLED}


# --- what a cell is given -------------------------------------------------------------------------------------------


def test_overrides_of_a_planned_cell(tmp_path):
    overrides = cell_overrides(
        "mdm-33k-1e12-ab", sweep_dir=tmp_path / "my sweep", data_dir=tmp_path, extra=["logger=none"]
    )
    parsed = {item.key_or_group: item.value() for item in OverridesParser.create().parse_overrides(list(overrides))}
    assert parsed == {
        "cell": "mdm-33k-1e12-ab",
        "hydra.searchpath": [f"file://{tmp_path}/my sweep"],
        "sweep": "my sweep",
        "paths.workdir": str(tmp_path),
        "paths.data_dir": str(tmp_path),
        "logger": "none",
    }


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20))
@example("a\\'b")
@example("ends in \\\\")
@example("null")
def test_any_path_survives_hydras_grammar(text):
    if "${" in text:
        with pytest.raises(UserError):
            quote(text)
        return
    (item,) = OverridesParser.create().parse_overrides([f"paths.workdir={quote(text)}"])
    (inside,) = OverridesParser.create().parse_overrides([f"hydra.searchpath=[{quote(text)}]"])
    assert item.value() == text and inside.value() == [text]


def test_resources_come_from_the_plan_unless_the_launcher_says(tmp_path):
    cell = make_cell("a", nodes=2, gpus_per_node=8, hours=1.0)
    need = cell_resources(cell)
    assert (need.nodes, need.gpus_per_node, need.tasks_per_node, need.time_min) == (2, 8, 8, 120)
    need = cell_resources(cell, SlurmSettings(nodes=1, gpus_per_node=4, timeout_min=30, mem_gb=64, cpus_per_task=6))
    assert (need.nodes, need.gpus_per_node, need.tasks_per_node, need.time_min) == (1, 4, 4, 30)
    assert (need.mem_gib, need.cpus_per_task) == (64, 6)
    need = cell_resources(make_cell("a", nodes=None, gpus_per_node=None))  # nothing was estimated
    assert (need.nodes, need.gpus_per_node, need.tasks_per_node, need.time_min) == (1, 0, 1, None)


@given(st.floats(1e-4, 1e4))
def test_time_limits_leave_room_and_are_few(hours):
    limit = time_limit_min(hours)
    assert 1.5 * hours * 60 + 10 <= limit <= max(30, 2 * (1.5 * hours * 60 + 10)) + 1e-6
    assert limit % 30 == 0 and (limit // 30).bit_count() == 1


def test_the_trainer_follows_the_devices_unless_the_definition_chose_one():
    words = [trainer_overrides(cell_resources(make_cell("a", nodes=n, gpus_per_node=g)), t)
             for n, g, t in [(1, 0, "cpu"), (1, 1, "cpu"), (1, 4, "cpu"), (2, 8, "cpu"), (2, 8, "fsdp")]]  # fmt: skip
    assert words == [
        (),
        ("trainer=single_gpu", "trainer.devices=1", "trainer.num_nodes=1"),
        ("trainer=multi_gpu", "trainer.devices=4", "trainer.num_nodes=1"),
        ("trainer=multi_node", "trainer.devices=8", "trainer.num_nodes=2"),
        ("trainer.devices=8", "trainer.num_nodes=2"),
    ]


def test_last_line_of_a_log(tmp_path):
    assert last_line(tmp_path / "none") is None
    (tmp_path / "log").write_bytes(b"a\n" * 50000 + b"Error: \xff it broke\n\n  \n")
    assert last_line(tmp_path / "log") == "Error: � it broke"


# --- SLURM, by a stand-in that queues, starts and accounts as the real one -------------------------------------------

SBATCH = """
    [ "$1" = --parsable ] || exit 9
    if [ -f {db}/refuse ]; then echo "sbatch: error: Batch job submission failed: Invalid partition" >&2; exit 1; fi
    n=$(ls {db}/*.script 2>/dev/null | wc -l); id=$((1001 + n)); cp "$2" {db}/$id.script
    last=$(grep -oP '#SBATCH --array=0-\\K[0-9]+' "$2")
    for i in $(seq 0 $last); do echo "PENDING" > {db}/${{id}}_$i.live; done
    echo $id
"""
TELL = """
    cd {db}; [ -f down ] && exit 1
    name() {{ grep -oP '(?<=--job-name=).*' ${{1%%_*}}.script; }}
"""
WHY = "$(cat ${{f%.live}}.why 2>&-)"
SQUEUE = TELL + 'for f in *.live; do [ -f $f ] && echo "${{f%.live}}|$(cat $f)|0|' + WHY + '|$(name $f)|"; done; true'
SACCT = TELL + 'for f in *.ended; do [ -f $f ] && echo "${{f%.ended}}|$(cat $f)|None|$(name $f)"; done; true'
SCANCEL = 'cd {db}; for id in "$@"; do rm $id.live; echo "CANCELLED by 0|0:15" > $id.ended; done'


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The state of the stand-in: a file per task, TASK.live (its state) or TASK.ended (state|code:signal)."""
    db, bin_dir = tmp_path / "db", tmp_path / "bin"
    for folder in (db, bin_dir):
        folder.mkdir()
    for name, body in {"sbatch": SBATCH, "squeue": SQUEUE, "sacct": SACCT, "scancel": SCANCEL}.items():
        path = bin_dir / name
        path.write_text("#!/bin/bash\n" + textwrap.dedent(body).format(db=db))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    monkeypatch.setattr(dispatch_module, "code_origin", lambda: None)  # this checkout may hold changes
    return db


def end(db: Path, task: str, said: str) -> None:
    (db / f"{task}.live").unlink()
    (db / f"{task}.ended").write_text(said)


def submission_of(sweep_dir: Path, name: str) -> str | None:
    return Ledger(sweep_dir).read()[name].submission


def state_of(sweep_dir: Path, name: str) -> tuple[State, str | None]:
    now, _ = cells_now([(name, STEPS)], sweep_dir)
    return now[name].state, now[name].reason


def test_slurm_gets_one_array_per_class_and_the_ledger_has_intent_then_ids(slurm, sweep_dir):
    plan = SimpleNamespace(cells=(make_cell("a"), make_cell("big", gpus_per_node=8, hours=2.0), make_cell("b")))
    done = submit(plan, sweep_dir, Slurm())
    assert done.job_ids == {"a": "1001_0", "b": "1001_1", "big": "1002_0"}
    lines = [json.loads(line) for line in Ledger(sweep_dir).path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["intent", "submitted"] * 2
    assert lines[0]["cells"] == ["a", "b"] and lines[1]["ids"] == {"a": "1001_0", "b": "1001_1"}
    scripts = sorted((sweep_dir / "ledger").glob("*.sbatch"))
    assert [path.read_text() for path in scripts] == [(slurm / f"{i}.script").read_text() for i in (1001, 1002)]
    jobs = scripts[1].with_suffix(".jobs").read_text()
    assert "trainer=multi_gpu" in jobs and jobs.startswith(f"{sweep_dir}/runs/big +cell=big ")
    assert (slurm / "1002.script").read_text().count("--gpus-per-node=8") == 1


def test_what_is_queued_or_runs_is_not_submitted_again(slurm, sweep_dir):
    submit(make_plan("a", "b"), sweep_dir, Slurm())
    (slurm / "1001_1.live").write_text("RUNNING")
    again = submit(make_plan("a", "b"), sweep_dir, Slurm())
    assert again.submitted == () and "PENDING" in again.skipped["a"] and "RUNNING" in again.skipped["b"]
    here = submit(make_plan("a", "b"), sweep_dir)  # nor is it started here
    assert here.submitted == ()
    (slurm / "down").touch()
    silent = submit(make_plan("a", "b"), sweep_dir, Slurm())
    assert silent.submitted == () and "does not answer" in silent.skipped["a"]  # never twice, even blind


@pytest.mark.parametrize(
    ("said", "state", "again"),
    [
        ("FAILED|1:0", State.FAILED, True),
        ("FAILED|2:0", State.BAD_CONFIG, False),
        ("FAILED|4:0", State.OUT_OF_MEMORY, True),
        ("OUT_OF_MEMORY|0:125", State.OUT_OF_MEMORY, True),
        ("FAILED|0:53", State.LOST, True),
        ("NODE_FAIL|0:0", State.LOST, True),
        ("TIMEOUT|0:0", State.PREEMPTED, True),
        ("CANCELLED by 1000|0:15", State.CANCELLED, True),
        ("COMPLETED|0:0", State.LOST, True),  # without a result
    ],
)
def test_how_slurm_ended_a_silent_cell_decides_about_the_next_try(slurm, sweep_dir, said, state, again):
    submit(make_plan("a"), sweep_dir, Slurm())
    end(slurm, "1001_0", said)
    assert state_of(sweep_dir, "a")[0] is state
    assert bool(submit(make_plan("a"), sweep_dir, Slurm()).submitted) is again


def test_out_of_memory_is_tried_again_with_half_the_micro_batch_and_the_whole_batch(slurm, sweep_dir):
    asked = []
    for number in range(1001, 1006):
        done = submit(make_plan("a"), sweep_dir, Slurm())
        if done.submitted:
            script = sorted((sweep_dir / "ledger").glob("*.jobs"), key=lambda path: path.stat().st_mtime_ns)[-1]
            asked.append(script.read_text().rpartition("data.micro_batch_size=")[2].strip())
            end(slurm, f"{number}_0", "FAILED|4:0")
    assert asked[1:] == ["4", "2", "1"] and "+cell=a" in asked[0]  # 8 sequences, at first as many as fit
    assert "one sequence at a time" in done.skipped["a"]
    assert submit(make_plan("a"), sweep_dir, Slurm(), retry_failed=True).submitted
    script = sorted((sweep_dir / "ledger").glob("*.jobs"), key=lambda path: path.stat().st_mtime_ns)[-1]
    assert script.read_text().rpartition("data.micro_batch_size=")[2].strip() == "1"  # not with the largest


def test_more_devices_after_out_of_memory_get_a_micro_batch_that_divides_their_share(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    end(slurm, "1001_0", "FAILED|4:0")
    submit(make_plan("a"), sweep_dir, Slurm())  # 4 sequences
    end(slurm, "1002_0", "NODE_FAIL|0:0")
    assert submit(make_plan("a"), sweep_dir, Slurm(SlurmSettings(tasks_per_node=4))).submitted
    script = sorted((sweep_dir / "ledger").glob("*.jobs"), key=lambda path: path.stat().st_mtime_ns)[-1]
    assert "data.micro_batch_size=2" in script.read_text()


def test_memory_of_the_host_beside_gpus_needs_mem_gb(slurm, sweep_dir):
    plan = make_plan("a", gpus_per_node=1)
    submit(plan, sweep_dir, Slurm())
    end(slurm, "1001_0", "OUT_OF_MEMORY|0:125")
    assert "raise hydra.launcher.mem_gb" in submit(plan, sweep_dir, Slurm()).skipped["a"]
    assert submit(plan, sweep_dir, Slurm(SlurmSettings(mem_gb=64))).submitted


def test_a_ledger_of_an_earlier_dlm_is_read(sweep_dir):
    ledger = Ledger(sweep_dir)
    ledger._append("intent", submission="s", cluster="local", code="ab", cells=["a", "b"], was={"a": "failed"})
    ledger._append("cancelled", cells=["b"])
    assert ledger.read()["a"].failures == 1 and ledger.cancelled_now() == {"b"}


def test_a_submission_that_timed_out_while_slurm_was_deaf_is_looked_up_later(slurm, sweep_dir, monkeypatch):
    took = Slurm.sbatch

    def time_out(self, script):
        took(self, script)
        (slurm / "down").touch()
        raise UserError("sbatch did not answer within 60 s")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="did not answer"):
        patch.setattr(Slurm, "sbatch", time_out)
        submit(make_plan("a"), sweep_dir, Slurm())
    (slurm / "down").unlink()
    assert "PENDING" in submit(make_plan("a"), sweep_dir, Slurm()).skipped["a"]


def test_a_run_by_hand_after_the_job_has_the_last_word(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    (sweep_dir / "ledger/slurm-1001_0.txt").touch()
    os.utime(sweep_dir / "ledger/slurm-1001_0.txt", (1, 1))
    end(slurm, "1001_0", "FAILED|2:0")
    assert state_of(sweep_dir, "a")[0] is State.BAD_CONFIG
    write_status(run_dir(sweep_dir, "a"), status(State.PREEMPTED, exit_code=75, reason="by Ctrl-C"))
    assert state_of(sweep_dir, "a") == (State.PREEMPTED, "by Ctrl-C")


def test_a_run_by_hand_is_stopped_by_its_process_whatever_job_it_had(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    end(slurm, "1001_0", "FAILED|1:0")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir(sweep_dir, "a"))])
    while live_holder(run_dir(sweep_dir, "a")) is None:
        time.sleep(0.02)
    assert cancel(["a"], sweep_dir) == {"a": f"SIGTERM to process {holder.pid}"}
    assert holder.wait(10) == -signal.SIGTERM


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


def test_the_cells_own_last_word_wins_where_slurm_saw_it_end_that_way(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    said = status(State.DIVERGED, exit_code=3, reason="loss is nan", submission=submission_of(sweep_dir, "a"))
    write_status(run_dir(sweep_dir, "a"), said)
    end(slurm, "1001_0", "FAILED|3:0")
    assert state_of(sweep_dir, "a") == (State.DIVERGED, "loss is nan")
    (slurm / "1001_0.ended").write_text("CANCELLED by 0|0:15")
    assert state_of(sweep_dir, "a")[0] is State.CANCELLED
    submit(make_plan("a"), sweep_dir, Slurm(), retry_failed=True)
    end(slurm, "1002_0", "NODE_FAIL|0:0")  # before the cell could say anything
    assert state_of(sweep_dir, "a") == (State.LOST, "SLURM says NODE_FAIL of job 1002_0")


@pytest.mark.parametrize("hours", [-24, 24])
def test_clocks_that_differ_between_nodes_change_nothing(slurm, sweep_dir, hours):
    submit(make_plan("a", "b"), sweep_dir, Slurm())
    for name in "ab":
        then = time.time() + 3600 * hours
        said = status(State.DIVERGED, exit_code=3, reason="loss is nan", submission=submission_of(sweep_dir, name))
        write_status(run_dir(sweep_dir, name), dataclasses.replace(said, started=then, updated=then))
        end(slurm, f"1001_{'ab'.index(name)}", "FAILED|3:0")
    assert state_of(sweep_dir, "a") == (State.DIVERGED, "loss is nan")
    submit(make_plan("b"), sweep_dir, Slurm(), retry_failed=True)
    end(slurm, "1002_0", "FAILED|4:0")
    assert state_of(sweep_dir, "b")[0] is State.OUT_OF_MEMORY  # the status is of the submission before


class Killed(BaseException):
    """In place of SIGKILL."""


@pytest.mark.parametrize("moment", ["before the intent", "before sbatch", "after sbatch", "in the ledger's line"])
def test_a_submission_cut_off_anywhere_is_repaired_by_the_next(slurm, sweep_dir, monkeypatch, moment):
    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "before the intent":
            patch.setattr(Ledger, "intent", die)
        elif moment == "before sbatch":
            patch.setattr(Slurm, "sbatch", die)
        else:
            patch.setattr(Ledger, "submitted", die)
        submit(make_plan("a", "b"), sweep_dir, Slurm())
    if moment == "in the ledger's line":
        with open(Ledger(sweep_dir).path, "a") as stream:
            stream.write('{"event": "submitted", "time": 1.0, "subm')
    taken = moment in ("after sbatch", "in the ledger's line")
    assert state_of(sweep_dir, "b")[0] is (State.SUBMITTED if taken else State.PLANNED)
    if taken and moment == "after sbatch":  # one of them is over before anybody looks
        end(slurm, "1001_0", "FAILED|3:0")
    done = submit(make_plan("a", "b"), sweep_dir, Slurm())
    assert set(done.submitted) == (set() if taken else {"a", "b"})
    assert Ledger(sweep_dir).read()["b"].job_id == "1001_1" and len(list(slurm.glob("*.script"))) == 1
    assert submit(make_plan("b"), sweep_dir, Slurm()).submitted == ()


def test_a_cut_off_submission_waits_until_slurm_answers(slurm, sweep_dir, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Ledger, "submitted", lambda *_: (_ for _ in ()).throw(Killed))
        submit(make_plan("a"), sweep_dir, Slurm())
    (slurm / "down").touch()
    assert "cut off" in submit(make_plan("a"), sweep_dir, Slurm()).skipped["a"]
    (slurm / "down").unlink()
    assert "PENDING" in submit(make_plan("a"), sweep_dir, Slurm()).skipped["a"]


def test_an_sbatch_that_fails_after_slurm_took_the_job_is_no_refusal(slurm, sweep_dir, monkeypatch):
    took = Slurm.sbatch

    def time_out(self, script):
        took(self, script)
        raise UserError("sbatch did not answer within 60 s")

    monkeypatch.setattr(Slurm, "sbatch", time_out)
    assert submit(make_plan("a"), sweep_dir, Slurm()).job_ids == {"a": "1001_0"}


def test_a_second_submission_at_the_same_time_waits_and_finds_all_submitted(slurm, sweep_dir, monkeypatch):
    slow = Slurm.sbatch

    def sbatch(self, script):
        time.sleep(0.5)
        return slow(self, script)

    monkeypatch.setattr(Slurm, "sbatch", sbatch)
    done = []
    threads = [
        threading.Thread(target=lambda: done.append(submit(make_plan("a", "b"), sweep_dir, Slurm()))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(len(one.submitted) for one in done) == [0, 0, 2] and len(list(slurm.glob("*.script"))) == 1


def test_what_was_taken_before_a_refusal_stays_and_is_said(slurm, sweep_dir, monkeypatch):
    plan = SimpleNamespace(cells=(make_cell("a"), make_cell("big", nodes=2)))
    limited = Slurm.sbatch

    def sbatch(self, script):
        if script.stem.endswith("-1"):
            raise UserError("sbatch refused: Job violates accounting/QOS policy (job submit limit)")
        return limited(self, script)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="1 cells were taken before"):
        patch.setattr(Slurm, "sbatch", sbatch)
        submit(plan, sweep_dir, Slurm())
    assert submit(plan, sweep_dir, Slurm()).submitted == ("big",)


def test_the_pace_of_submissions_is_kept(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    pace, times = Pace(3), []
    for _ in range(8):
        pace.wait()
        times.append(now[0])
        now[0] += 1
    assert all(later - earlier >= 60 for earlier, later in zip(times, times[3:], strict=False)) and times[2] == 102


def test_a_failure_counts_only_where_the_cell_got_no_further(slurm, sweep_dir):
    for number, step in enumerate([3, 5, 7, 7, 7]):
        assert submit(make_plan("a"), sweep_dir, Slurm()).submitted
        said = status(State.FAILED, step=step, exit_code=1, reason="killed", submission=submission_of(sweep_dir, "a"))
        write_status(run_dir(sweep_dir, "a"), said)
        end(slurm, f"{1001 + number}_0", "FAILED|1:0")
    assert "failed 3 times (killed)" in submit(make_plan("a"), sweep_dir, Slurm()).skipped["a"]


def test_time_limits_stay_within_the_partitions(monkeypatch):
    cell = make_cell("a", hours=10.0)
    assert cell_resources(cell, max_time_min=240).time_min == 240  # and goes on in the next job
    assert cell_resources(make_cell("a"), max_time_min=240).time_min == 240  # not known: all that there is
    assert cell_resources(make_cell("a")).time_min is None
    with pytest.raises(UserError, match=r"timeout_min is 600, the partition \(default\) allows 240"):
        cell_resources(cell, SlurmSettings(timeout_min=600), max_time_min=240)


def test_host_memory_comes_from_the_plan():
    assert cell_resources(make_cell("a", memory_gib=0.1)).mem_gib == 3  # two for the process, rounded up
    on_gpu = make_cell("a", gpus_per_node=8, memory_gib=40.0, num_params_total=10**9)
    assert cell_resources(on_gpu).mem_gib == 96  # 8 x 8, and the state twice
    assert cell_resources(on_gpu, SlurmSettings(mem_gb=500)).mem_gib == 500


def test_a_cell_that_is_tried_again_says_why_its_last_try_failed(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    end(slurm, "1001_0", "FAILED|1:0")
    submit(make_plan("a"), sweep_dir, Slurm())
    now, _ = cells_now([("a", STEPS)], sweep_dir)
    assert (now["a"].state, now["a"].before) == (State.SUBMITTED, "failed: job 1001_0 ended with exit code 1")


def test_what_could_not_be_cancelled_is_not_called_so(slurm, sweep_dir, tmp_path):
    submit(make_plan("a"), sweep_dir, Slurm())
    (slurm / "down").touch()
    with pytest.raises(UserError, match="SLURM does not answer, so its jobs cannot be stopped"):
        cancel(["a"], sweep_dir)
    (slurm / "down").unlink()
    (tmp_path / "bin" / "scancel").write_text("#!/bin/bash\nexit 1\n")
    with pytest.raises(UserError, match="scancel failed"):
        cancel(["a"], sweep_dir)
    assert state_of(sweep_dir, "a")[0] is State.SUBMITTED


def test_an_sbatch_that_finds_no_controller_leaves_the_cells_planned(slurm, sweep_dir, tmp_path):
    (slurm / "down").touch()
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1\n"
    )
    with pytest.raises(UserError, match="sbatch finds no SLURM controller"):
        submit(make_plan("a"), sweep_dir, Slurm())
    assert state_of(sweep_dir, "a")[0] is State.PLANNED


def test_what_a_node_failed_to_launch_is_released(slurm, sweep_dir, tmp_path):
    submit(make_plan("a", "b"), sweep_dir, Slurm())
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol.txt\n')
    scontrol.chmod(0o755)
    (slurm / "1001_1.why").write_text("launch failed requeued held")
    assert submit(make_plan("a", "b"), sweep_dir, Slurm()).submitted == ()
    assert "release 1001_1" in (tmp_path / "scontrol.txt").read_text().splitlines()


def test_a_job_that_slurm_has_forgotten_is_lost(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    (slurm / "1001_0.live").unlink()
    assert state_of(sweep_dir, "a")[0] is State.LOST


def test_a_refusal_is_the_users_line_and_the_next_try_submits(slurm, sweep_dir):
    (slurm / "refuse").touch()
    with pytest.raises(UserError, match="Invalid partition"):
        submit(make_plan("a"), sweep_dir, Slurm())
    lines = [json.loads(line)["event"] for line in Ledger(sweep_dir).path.read_text().splitlines()]
    assert lines == ["intent", "refused"]
    (slurm / "refuse").unlink()
    assert submit(make_plan("a"), sweep_dir, Slurm()).job_ids == {"a": "1001_0"}


def test_cancel_takes_what_is_live_from_slurm(slurm, sweep_dir):
    submit(make_plan("a", "b", "c"), sweep_dir, Slurm())
    end(slurm, "1001_1", "FAILED|1:0")
    assert cancel(["a", "b", "c"], sweep_dir) == {"a": "scancel 1001_0", "c": "scancel 1001_2"}
    assert state_of(sweep_dir, "a")[0] is State.CANCELLED and state_of(sweep_dir, "b")[0] is State.FAILED


def test_ten_thousand_cells_are_submitted_and_looked_at_in_seconds(slurm, sweep_dir, monkeypatch):
    plan = make_plan(*(f"c{i:05d}" for i in range(10_000)))
    monkeypatch.setattr(ledger_module.Slurm, "sbatch", lambda self, script: script.stem.split("-")[-1])
    started = time.process_time()
    done = submit(plan, sweep_dir, Slurm())
    assert len(done.job_ids) == 10_000 and len(list((sweep_dir / "ledger").glob("*.sbatch"))) == 10
    now, _ = cells_now([(cell.cell_id, STEPS) for cell in plan.cells], sweep_dir)
    assert len(now) == 10_000 and time.process_time() - started < 10
