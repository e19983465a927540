"""The local pool with real processes; SLURM's script run by a real bash, its commands by recording stand-ins."""

import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TESTS
from support.stub_cell import result

from dlm.core.errors import UserError
from dlm.core.lease import Lease
from dlm.core.paths import PACKAGE
from dlm.record.outcomes import State
from dlm.record.run import write_result
from dlm.submit.job import Job, Resources, SlurmSettings, slurm_settings
from dlm.submit.local import LocalPool, visible_gpus
from dlm.submit.script import arrays, job_line, sbatch_script, write_script
from dlm.submit.slurm import (
    Slurm,
    TaskRow,
    TaskState,
    expand_task,
    key_behind,
    live_state,
    minutes,
    parse_tasks,
    slurm_answers,
)


def make_job(tmp_path: Path, name: str, *extra: str, **resources) -> Job:
    run_dir = tmp_path / "sweep" / "runs" / name
    overrides = (f"+cell={name}", f"paths.workdir={tmp_path}", "sweep=sweep", *extra)
    return Job(name=name, overrides=overrides, run_dir=run_dir, resources=Resources(**resources))


def make_pool(**options) -> LocalPool:
    return LocalPool(**{"module": "support.stub_cell", "cores": 2, "grace_sec": 5.0, "poll_sec": 0.02, **options})


@pytest.fixture(autouse=True)
def stub_on_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


# --- the local pool ---------------------------------------------------------------------------------------------


def test_pool_runs_all_and_reports_each_exit_code(tmp_path):
    jobs = [make_job(tmp_path, name, f"mode={name}") for name in ("done", "fail", "config", "kill")]
    events = []
    outcome = make_pool().run(jobs, on_event=events.append)
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
    make_pool(cores=4).run(jobs, on_event=watch)
    assert max(most) == 2  # 4 cores // 2 each
    most.clear()
    make_pool(cores=1).run([make_job(tmp_path, "wide", cpus_per_task=8)], on_event=watch)
    assert most == [1, 0]  # wider than the machine: alone, not never


def test_children_get_their_threads_the_snapshot_first_and_one_log(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "dlm").symlink_to(PACKAGE)
    job = make_job(tmp_path, "a", cpus_per_task=3)
    for _ in range(2):
        make_pool().run([job], code=code)
    log = (job.run_dir / "log.txt").read_text().splitlines()
    assert log == [f"done threads=3 pythonpath={code}{os.pathsep}{TESTS}"] * 2  # appended, not replaced


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

    outcome = make_pool().run([finished, abandoned], on_event=events.append, on_tick=release)
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
    outcome = make_pool().run(jobs, on_tick=stop_when_both_run)
    assert outcome.interrupted
    assert outcome.exit_codes == {"c0": 75, "c1": 75}  # c2 never started
    assert signal.getsignal(signal.SIGTERM) is handler


DRIVER = """
    import sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}, {tests!r} + "/submit"]
    from test_slurm_and_local import make_job, make_pool
    tmp_path = Path({tmp!r})
    outcome = make_pool({options}).run([make_job(tmp_path, n, {mode!r}) for n in ("a", "b")])
    print(outcome.interrupted, dict(sorted(outcome.exit_codes.items())), flush=True)
"""


def start_driver(tmp_path: Path, mode: str, options: str = "") -> tuple[subprocess.Popen, list[int]]:
    """A parent with two children that run, in a process group of its own; the children's pids."""
    script = textwrap.dedent(DRIVER.format(tests=str(TESTS), tmp=str(tmp_path), mode=mode, options=options))
    parent = subprocess.Popen(
        [sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent
    )
    leases = [tmp_path / f"sweep/runs/{name}/status.json" for name in "ab"]
    deadline = time.monotonic() + 10
    while not all(path.is_file() for path in leases) and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(re.search(r'"pid": (\d+)', path.with_name("lease.json").read_text())[1]) for path in leases]
    assert all(os.getpgid(pid) == parent.pid for pid in pids)  # the same process group
    return parent, pids


def gone(pid: int) -> bool:
    stat_file = Path(f"/proc/{pid}/stat")
    return not stat_file.exists() or stat_file.read_text().rpartition(")")[2].split()[0] == "Z"


def test_ctrl_c_reaches_the_parent_only_and_leaves_no_orphan(tmp_path):
    parent, pids = start_driver(tmp_path, "mode=wait")
    os.killpg(parent.pid, signal.SIGINT)  # what a terminal does
    out, _ = parent.communicate(timeout=10)
    assert out.strip() == "True {'a': 75, 'b': 75}"  # not -2: the children never saw the SIGINT
    assert all(gone(pid) for pid in pids)


def test_kill_minus_9_of_the_group_ends_everything(tmp_path):
    parent, pids = start_driver(tmp_path, "mode=wait")
    os.killpg(parent.pid, signal.SIGKILL)
    parent.communicate(timeout=10)
    deadline = time.monotonic() + 5
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(gone(pid) for pid in pids)


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    parent, pids = start_driver(tmp_path, "sec=60", options="grace_sec=0.3")
    os.kill(parent.pid, signal.SIGTERM)
    out, _ = parent.communicate(timeout=10)
    assert out.strip() == "True {'a': -9, 'b': -9}" and all(gone(pid) for pid in pids)


def test_an_error_in_a_callback_ends_the_children_too(tmp_path):
    job = make_job(tmp_path, "a", "mode=wait")

    def burst():
        if (job.run_dir / "lease.json").is_file():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_pool().run([job], on_tick=burst)
    assert not (job.run_dir / "lease.json").exists()


def test_each_job_has_gpus_of_its_own_and_too_many_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert visible_gpus() == ["4", "6"]
    with pytest.raises(UserError, match="needs 3 GPUs and this machine offers 2"):
        make_pool().run([make_job(tmp_path, "big", gpus_per_node=3)])
    with pytest.raises(UserError, match="needs 2 nodes"):
        make_pool().run([make_job(tmp_path, "wide", nodes=2)])
    pool = make_pool()
    jobs = [make_job(tmp_path, f"g{i}", "mode=wait", gpus_per_node=1) for i in range(3)]
    seen = {}

    def look():
        running = list(pool._running)
        seen.update({r.job.name: Path(f"/proc/{r.process.pid}/environ").read_bytes() for r in running})
        if all((job.run_dir / "lease.json").is_file() for job in jobs[:2]):
            os.kill(os.getpid(), signal.SIGTERM)

    pool.cores = 8
    pool.run(jobs, on_tick=look)
    devices = {name: re.search(rb"CUDA_VISIBLE_DEVICES=(\d+)", text)[1] for name, text in seen.items()}
    assert devices == {"g0": b"4", "g1": b"6"}  # the third waited, though cores were free


# --- SLURM: the script ------------------------------------------------------------------------------------------


def command(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{textwrap.dedent(body)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def bin_dir(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def script_lines(jobs, settings=None) -> list[str]:
    array = arrays(jobs, submission="s", max_size=1000)[0]
    folder = Path("/w/isoflop/ledger")
    text = sbatch_script(array, settings=settings or SlurmSettings(), code=Path("/w/code/ab"), folder=folder, facts={})
    return text.splitlines()


def test_script_asks_for_what_the_settings_and_resources_say(tmp_path):
    need = {"nodes": 2, "tasks_per_node": 8, "gpus_per_node": 8, "cpus_per_task": 12, "mem_gib": 900, "time_min": 240}
    jobs = [make_job(tmp_path, f"c{i}", **need) for i in range(12)]
    settings = slurm_settings(
        {
            "partition": "gpu,low",
            "account": "lab",
            "qos": "normal",
            "constraint": "a100&ib",
            "comment": "my sweep",
            "signal_delay_s": 120,
            "array_parallelism": 4,
            "additional_parameters": {"mail-type": "END", "exclusive": True},
            "setup": ["module load cuda"],
        }
    )
    lines = script_lines(jobs, settings)
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert options == {
        "job-name=isoflop-s-0",
        "array=0-11%4",
        "output=/w/isoflop/ledger/slurm-%A_%a.txt",
        "open-mode=append",
        'comment="my sweep dlm s-0"',
        "nodes=2",
        "ntasks-per-node=8",
        "cpus-per-task=12",
        "gpus-per-node=8",
        "mem=900G",
        "time=240",
        "partition=gpu,low",
        "account=lab",
        "qos=normal",
        "constraint=a100&ib",
        "signal=USR1@120",
        "requeue",
        "mail-type=END",
        "exclusive",
    }
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if "srun --kill" in line)
    assert "export OMP_NUM_THREADS=12" in lines


def test_what_nobody_set_is_left_to_the_cluster(tmp_path):
    text = "\n".join(script_lines([make_job(tmp_path, "a")]))
    assert not re.search(r"--(partition|account|qos|mem|time|gres|gpus)", text)
    text = "\n".join(
        script_lines([make_job(tmp_path, "a", gpus_per_node=4)], SlurmSettings(gres="gpu:4", requeue=False))
    )
    assert "--gres=gpu:4" in text and "gpus-per-node" not in text and "--no-requeue" in text


def test_the_script_runs_its_line_with_exact_words_and_tells_the_cells_exit_code(tmp_path, bin_dir):
    srun = 'for word in "$@"; do printf "%s\\n" "$word"; done > srun.txt; env > env.txt; exit ${SRUN_CODE:-0}'
    command(bin_dir, "srun", srun)
    odd = "data.name='it is \\'odd\\' $HOME `id` \"x\" é'"
    sweep = tmp_path / "my sweep"
    jobs = [
        Job(name="a", overrides=("+cell=a",), run_dir=sweep / "runs" / "a"),
        Job(name="b", overrides=("+cell=b", odd), run_dir=sweep / "runs" / "b"),
    ]
    array = arrays(jobs, submission="s", max_size=10)[0]
    script = write_script(
        array, settings=SlurmSettings(), code=tmp_path / "code", folder=sweep / "ledger", facts={"DLM_GIT_SHA": "abc"}
    )
    environment = {
        **os.environ,
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "1",
        "SRUN_CODE": "3",
        "DLM_CONFIGS": "/live",
    }
    done = subprocess.run(["bash", str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    words = (tmp_path / "srun.txt").read_text().splitlines()
    assert words[-6:] == [sys.executable, "-P", "-m", "dlm.launch", "+cell=b", odd]
    assert f"--output={sweep}/runs/b/log.txt" in words and (sweep / "runs/b").is_dir()
    ran_in = (tmp_path / "env.txt").read_text()
    assert f"PYTHONPATH={tmp_path}/code:{TESTS}\n" in ran_in and "DLM_CONFIGS" not in ran_in
    assert "DLM_GIT_SHA=abc\n" in ran_in
    beyond = {**environment, "SLURM_ARRAY_TASK_ID": "7"}  # a line that is not there is no success
    assert subprocess.run(["bash", str(script)], env=beyond, cwd=tmp_path, capture_output=True).returncode != 0


def test_one_array_for_each_resource_class_within_the_array_limit(tmp_path):
    jobs = [make_job(tmp_path, f"c{i}", nodes=1 + i % 2) for i in range(7)]
    split = arrays(jobs, submission="s", max_size=3)
    assert [[job.name for job in array.jobs] for array in split] == [["c0", "c2", "c4"], ["c6"], ["c1", "c3", "c5"]]
    assert [array.resources.nodes for array in split] == [1, 1, 2]
    assert len({array.submission for array in split}) == 3


@given(st.lists(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=12), max_size=4))
def test_any_override_survives_the_jobs_file(words):
    import shlex

    line = job_line(Job(name="a", overrides=tuple(words), run_dir=Path("/w")))
    assert shlex.split(line) == ["/w", *words]


def test_a_line_break_in_an_override_is_refused():
    with pytest.raises(UserError, match="line break"):
        job_line(Job(name="a", overrides=("x=1\ny=2",), run_dir=Path("/w")))


def test_settings_refuse_unknown_keys_with_the_near_ones():
    with pytest.raises(UserError, match=r"unknown key of hydra\.launcher 'partitions': did you mean partition"):
        slurm_settings({"partitions": "x"})
    for key, value in [("array_parallelism", 0), ("nodes", 2.5), ("timeout_min", "1h"), ("gpus_per_node", -1)]:
        with pytest.raises(UserError, match=f"{key} is {value}: it must be a whole number"):
            slurm_settings({key: value})


# --- SLURM: its commands ----------------------------------------------------------------------------------------


def test_sbatch_gives_the_id_or_its_own_words(tmp_path, bin_dir, monkeypatch):
    command(bin_dir, "sbatch", 'echo "$@" > args.txt; echo "1001;cluster"')
    monkeypatch.chdir(tmp_path)
    assert Slurm().sbatch(Path("x.sbatch")) == "1001"
    assert (tmp_path / "args.txt").read_text() == "--parsable x.sbatch\n"
    command(bin_dir, "sbatch", 'echo "sbatch: error: invalid partition specified: gpuu" >&2; exit 1')
    with pytest.raises(UserError, match="invalid partition specified: gpuu"):
        Slurm().sbatch(Path("x.sbatch"))


def test_sbatch_missing_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        Slurm().check_there()
    assert not slurm_answers()


def test_states_join_squeue_and_sacct_in_one_call_each(tmp_path, bin_dir):
    log = tmp_path / "calls.txt"
    command(
        bin_dir,
        "squeue",
        f"""
        echo "squeue $@" >> {log}
        printf "1001_2|RUNNING|0|None|x|\\n1001_3|PENDING|0|Priority|x|\\n77|RUNNING|0||y|\\n"
        """,
    )
    command(
        bin_dir,
        "sacct",
        f"""
        echo "sacct $@" >> {log}
        echo "1001_0|COMPLETED|0:0||x"
        echo "1001_1|CANCELLED by 1000|0:15||x"
        echo "1001_2|PENDING|0:0||x"
        echo "1001_[3-4%2]|PENDING|0:0||x"
        """,
    )
    answer = Slurm().states(dict.fromkeys(["1001_0", "1001_1", "1001_2", "1001_3", "1002_0"], "x"))
    assert answer.states == {
        "1001_0": TaskState(word="COMPLETED", exit_code=0, signal=0),
        "1001_1": TaskState(word="CANCELLED", exit_code=0, signal=15),
        "1001_2": TaskState(word="RUNNING", exit_code=0, signal=0, reason="None"),  # squeue is fresher than sacct
        "1001_3": TaskState(word="PENDING", exit_code=0, signal=0, reason="Priority"),
    }
    assert str(answer.states["1001_3"]) == "PENDING (Priority)" and str(answer.states["1001_2"]) == "RUNNING"
    assert not answer.warnings and not answer.silent
    calls = log.read_text().splitlines()
    assert len(calls) == 2 and "--jobs=1001,1002" in calls[0]
    assert Slurm().states({}).states == {} and len(log.read_text().splitlines()) == 2  # nothing to ask


def test_sacct_down_costs_a_warning_squeue_down_makes_absence_mean_nothing(bin_dir):
    command(bin_dir, "squeue", 'echo "1_0|RUNNING|0|None|j|"')
    command(bin_dir, "sacct", 'echo "sacct: error: Slurm accounting storage is disabled" >&2; exit 1')
    answer = Slurm().states({"1_0": "j", "1_1": "j"})
    assert live_state(answer.states["1_0"]) is State.RUNNING
    assert "accounting storage is disabled" in answer.warnings[0] and not answer.silent
    command(bin_dir, "squeue", "exit 1")
    assert Slurm().states({"1_0": "j"}).silent


def test_scontrol_ping_decides_whether_slurm_answers(bin_dir):
    command(bin_dir, "sbatch", "")
    command(bin_dir, "scontrol", 'echo "Slurmctld(primary) at login1 is UP"')
    assert slurm_answers()
    command(bin_dir, "scontrol", 'echo "Slurmctld(primary) at login1 is DOWN"; exit 1')
    assert not slurm_answers()
    command(bin_dir, "scontrol", "exec sleep 30")
    started = time.monotonic()
    assert not slurm_answers(timeout_sec=0.2) and time.monotonic() - started < 5


def test_scancel_words(bin_dir, tmp_path):
    command(bin_dir, "scancel", f'echo "$@" > {tmp_path}/args.txt')
    Slurm().cancel(["1001_0", "1001_2"])
    assert (tmp_path / "args.txt").read_text() == "1001_0 1001_2\n"
    command(bin_dir, "scancel", 'echo "scancel: error: access denied" >&2; exit 1')
    with pytest.raises(UserError, match="access denied"):
        Slurm().cancel(["1"])


@given(st.sets(st.integers(0, 40), min_size=1))
def test_expanding_a_pending_range_gives_back_its_tasks(tasks):
    ordered, parts = sorted(tasks), []
    for task in ordered:  # SLURM's own way to write a set
        if parts and parts[-1][1] == task - 1:
            parts[-1][1] = task
        else:
            parts.append([task, task])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
    assert list(expand_task(f"9_[{text}%4]")) == [f"9_{task}" for task in ordered]


def test_arrays_are_found_by_their_jobs_names(bin_dir, tmp_path):
    rows = ("12_0|RUNNING|0|None|demo-s-0|", "14_0|RUNNING|0|None|demo-s-00|", "15_0|FAILED|1|BadConstraints|demo-s-2|")
    command(bin_dir, "squeue", "\n".join(f'echo "{row}"' for row in rows))  # SLURM keeps a record of what it refused
    command(bin_dir, "sacct", f'echo "$@" >> {tmp_path}/args.txt; echo "13_0|FAILED|1:0|None|demo-s-1"')
    answer = Slurm().states({}, names=["demo-s-0", "demo-s-1", "demo-s-2"])
    assert answer.arrays == {"demo-s-0": "12", "demo-s-1": "13"} and set(answer.states) == {"12_0", "13_0", "15_0"}
    assert "--name=demo-s-0,demo-s-1,demo-s-2" in (tmp_path / "args.txt").read_text()


def test_another_jobs_task_of_the_same_number_is_not_ours_and_accounting_alone_keeps_nothing_alive(bin_dir):
    """Numbers begin anew with a new controller; and slurmdbd can miss an end."""
    command(bin_dir, "squeue", 'echo "7_0|RUNNING|0|None|other-s-0|"')
    command(bin_dir, "sacct", 'echo "7_0|RUNNING|0:0|None|mine-s-0"; echo "7_1|FAILED|1:0|None|mine-s-0"')
    answer = Slurm().states({"7_0": "mine-s-0", "7_1": "mine-s-0"})
    assert {task: state.word for task, state in answer.states.items()} == {"7_1": "FAILED"}


def test_exit_codes_of_squeue_and_sacct_are_one():
    rows = list(parse_tasks("1_0|FAILED|768|NonZeroExitCode|j|\n1_1|FAILED|4021|JobLaunchFailure|j|\n"))
    rows += list(parse_tasks("1_0|FAILED|3:0|None|j\n1_1|FAILED|0:53|None|j\n"))
    assert [(row.state.exit_code, row.state.signal) for row in rows] == [(3, 0), (0, 53)] * 2


def test_lines_that_are_no_states_are_passed_over():
    assert list(parse_tasks("\nJUNK\n5_1|RUNNING\n")) == [TaskRow(task="5_1", state=TaskState(word="RUNNING"))]


# The words of SLURM 22.05 (tests/slurm asks a real one for some of them).
@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("sbatch: error: invalid partition specified: nopart", "partition"),
        ("sbatch: error: Invalid --time specification", "timeout_min"),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "timeout_min"),
        ("sbatch: error: Memory specification can not be satisfied", "mem_gb"),
        ("sbatch: error: Batch job submission failed: Invalid feature specification", "constraint"),
        ("sbatch: error: Batch job submission failed: Invalid job array specification", "max_array_size"),
        ("sbatch: error: Invalid generic resource (gres) specification", "gres or hydra.launcher.gpus_per_node"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "qos"),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "account or hydra.launcher.partition",
        ),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "qos or hydra.launcher.account or hydra.launcher.max_array_size or hydra.launcher.timeout_min",
        ),
        ("something new", "*"),
    ],
)
def test_a_refusal_names_the_key_that_asked_for_it(words, key):
    assert key_behind(words) == f"hydra.launcher.{key}"


def test_the_partitions_limit_is_read_and_the_clusters_array_size_kept_to(bin_dir):
    command(bin_dir, "sinfo", 'echo "low*|1-02:30:00"; echo "high|30:00"; echo "long|infinite"')
    assert Slurm().max_time_min() == 26 * 60 + 30  # of the default partition
    command(bin_dir, "sinfo", 'echo "low*|1:00:00"; echo "high|30:00"')
    assert Slurm(SlurmSettings(partition="low,high")).max_time_min() == 30
    assert [minutes(limit) for limit in ("infinite", "n/a", "45:00", "2-00:00:00")] == [None, None, 45, 2880]
    command(bin_dir, "scontrol", 'echo "MaxArraySize            = 11"')
    assert Slurm().max_array_size() == 11 and Slurm(SlurmSettings(max_array_size=4)).max_array_size() == 4
    command(bin_dir, "scontrol", "exit 1")
    assert Slurm().max_array_size() == 1000
