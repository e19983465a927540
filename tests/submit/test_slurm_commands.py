"""SLURM's commands, by stand-ins that record how they are called."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.submissions import write_command

from dlm.core.errors import UserError
from dlm.record.outcomes import State
from dlm.submit.cell_now import JobState
from dlm.submit.executor import Executor, key_behind
from dlm.submit.job import SlurmSettings
from dlm.submit.slurm import Slurm, keep_pace, slurm_answers
from dlm.submit.slurm_commands import NoAnswerError
from dlm.submit.slurm_tasks import Task, expand_task, minutes, parse_tasks


def test_sbatch_gives_the_id_or_its_own_words(tmp_path, bin_dir, monkeypatch):
    write_command(bin_dir, "sbatch", 'echo "$@" > args.txt; echo "1001;cluster"')
    monkeypatch.chdir(tmp_path)
    Path("x.sbatch").write_text("#!/bin/bash\n#SBATCH --partition=low\n#SBATCH --mem=4G\n#SBATCH --no-requeue\n")
    assert Executor(tmp_path, {}).send(Path("x.sbatch")) == "1001"
    assert (tmp_path / "args.txt").read_text() == "--parsable x.sbatch\n"
    write_command(bin_dir, "sbatch", 'echo "sbatch: error: invalid partition specified: gpuu" >&2; exit 1')
    with pytest.raises(UserError, match="invalid partition specified: gpuu"):
        Executor(tmp_path, {}).send(Path("x.sbatch"))


def test_a_banner_around_the_job_id_is_passed_over(tmp_path, bin_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.sbatch").write_text("#!/bin/bash\n")
    write_command(bin_dir, "sbatch", 'echo "Welcome, 2 jobs of yours wait"; echo 77; echo "29;here"; echo "Bye"')
    assert Executor(tmp_path, {}).send(Path("x.sbatch")) == "29"
    write_command(bin_dir, "sbatch", 'echo "Welcome"')
    with pytest.raises(NoAnswerError, match="sbatch printed no job id: 'Welcome'"):
        Executor(tmp_path, {}).send(Path("x.sbatch"))


def test_sbatch_gets_a_clean_environment(tmp_path, bin_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = "#!/bin/bash\n#SBATCH --partition=low\n#SBATCH --mem=4G\n#SBATCH --no-requeue\n#SBATCH --array=0-3%2\n"
    Path("x.sbatch").write_text(script)
    leaked = {
        "SLURM_MEM_PER_CPU": "500",
        "SLURM_CPU_BIND": "quiet",
        "SRUN_DEBUG": "3",
        "SQUEUE_FORMAT": "%i",
        "SBATCH_PARTITION": "other",
        "SBATCH_MEM_PER_CPU": "1G",
        "SBATCH_REQUEUE": "1",
        "SBATCH_ARRAY_INX": "7",
        "SBATCH_WAIT": "1",
        "SBATCH_GRES": "gpu:1",
    }
    kept = {
        "SLURM_CONF": "/etc/here.conf",
        "SLURM_CLUSTERS": "here",
        "SBATCH_ACCOUNT": "lab",
        "SBATCH_TIMELIMIT": "10",
        "HOME": str(tmp_path),
    }
    for name, value in {**leaked, **kept}.items():
        monkeypatch.setenv(name, value)
    write_command(bin_dir, "sbatch", "env > env.txt; echo 1")
    Executor(tmp_path, {}).send(Path("x.sbatch"))
    seen = dict(line.split("=", 1) for line in Path("env.txt").read_text().splitlines() if "=" in line)
    assert not seen.keys() & leaked.keys() and {name: seen[name] for name in kept} == kept
    said = "dlm: sbatch also obeys SBATCH_ACCOUNT=lab, SBATCH_TIMELIMIT=10, from your environment\n"
    assert capsys.readouterr().err == said
    write_command(bin_dir, "sacct", "true")  # the real one would wait for its daemon
    write_command(bin_dir, "squeue", "env > env.txt")
    Slurm().states({}, names=["x"])
    assert "SQUEUE_FORMAT" not in Path("env.txt").read_text() and "SBATCH_ACCOUNT" not in Path("env.txt").read_text()


def test_a_missing_sbatch_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        Slurm().check([])
    assert not slurm_answers()


def test_states_join_squeue_and_sacct_in_one_call_each(tmp_path, bin_dir):
    log = tmp_path / "calls.txt"
    write_command(
        bin_dir,
        "squeue",
        f"""
        echo "squeue $@" >> {log}
        printf "1001_2|RUNNING|0|None|x|\\n1001_3|PENDING|0|Priority|x|\\n77|RUNNING|0||y|\\n"
        """,
    )
    write_command(
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
    assert answer.states == {  # of 1001_2 squeue knows more than sacct
        "1001_0": JobState(state=State.LOST, words="SLURM says COMPLETED", exit_code=0),
        "1001_1": JobState(state=State.CANCELLED, words="SLURM says CANCELLED 0:15"),
        "1001_2": JobState(state=State.RUNNING, words="SLURM says RUNNING", exit_code=0),
        "1001_3": JobState(state=State.SUBMITTED, words="SLURM says PENDING (Priority)", exit_code=0),
    }
    assert not answer.warnings and not answer.silent
    calls = log.read_text().splitlines()
    assert calls[0].startswith("squeue")  # first, so that a job that leaves the queue now is found by sacct
    assert len(calls) == 2 and "--jobs=1001,1002" in calls[1]
    assert Slurm().states({}).states == {} and len(log.read_text().splitlines()) == 2  # nothing to ask


def test_sacct_down_costs_a_warning_squeue_down_makes_absence_mean_nothing(bin_dir):
    write_command(bin_dir, "squeue", 'echo "1_0|RUNNING|0|None|j|"')
    write_command(bin_dir, "sacct", 'echo "sacct: error: Slurm accounting storage is disabled" >&2; exit 1')
    answer = Slurm().states({"1_0": "j", "1_1": "j"})
    assert answer.states["1_0"].state is State.RUNNING
    assert "accounting storage is disabled" in answer.warnings[0] and not answer.silent
    write_command(bin_dir, "squeue", "exit 1")
    assert Slurm().states({"1_0": "j"}).silent


def test_scontrol_ping_decides_whether_slurm_answers(bin_dir):
    write_command(bin_dir, "sbatch", "")
    write_command(bin_dir, "scontrol", 'echo "Slurmctld(primary) at login1 is UP"')
    assert slurm_answers()
    write_command(bin_dir, "scontrol", 'echo "Slurmctld(primary) at login1 is DOWN"; exit 1')
    assert not slurm_answers()
    write_command(bin_dir, "scontrol", "exec sleep 30")
    started = time.monotonic()
    assert not slurm_answers(timeout_sec=0.2) and time.monotonic() - started < 5


def test_cancel_passes_the_ids_on_and_shows_slurms_own_words(bin_dir, tmp_path):
    write_command(bin_dir, "scancel", f'echo "$@" > {tmp_path}/args.txt')
    Slurm().cancel(["1001_0", "1001_2"])
    assert (tmp_path / "args.txt").read_text() == "1001_0 1001_2\n"
    write_command(bin_dir, "scancel", 'echo "scancel: error: access denied" >&2; exit 1')
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
    # SLURM keeps a record of what it refused.
    write_command(bin_dir, "squeue", "\n".join(f'echo "{row}"' for row in rows))
    write_command(bin_dir, "sacct", f'echo "$@" >> {tmp_path}/args.txt; echo "13_0|FAILED|1:0|None|demo-s-1"')
    answer = Slurm().states({}, names=["demo-s-0", "demo-s-1", "demo-s-2"])
    assert answer.arrays == {"demo-s-0": "12", "demo-s-1": "13"} and set(answer.states) == {"12_0", "13_0", "15_0"}
    assert "--name=demo-s-0,demo-s-1,demo-s-2" in (tmp_path / "args.txt").read_text()


def test_another_jobs_task_with_the_same_id_is_ignored_and_accounting_alone_keeps_no_task_alive(bin_dir):
    """Numbers begin anew with a new controller; and slurmdbd can miss an end."""
    write_command(bin_dir, "squeue", 'echo "7_0|RUNNING|0|None|other-s-0|"')
    write_command(bin_dir, "sacct", 'echo "7_0|RUNNING|0:0|None|mine-s-0"; echo "7_1|FAILED|1:0|None|mine-s-0"')
    answer = Slurm().states({"7_0": "mine-s-0", "7_1": "mine-s-0"})
    assert {task: job.words for task, job in answer.states.items()} == {"7_1": "SLURM says FAILED 1:0"}


def test_exit_codes_of_squeue_and_sacct_mean_the_same():
    rows = list(parse_tasks("1_0|FAILED|768|NonZeroExitCode|j|\n1_1|FAILED|4021|JobLaunchFailure|j|\n"))
    rows += list(parse_tasks("1_0|FAILED|3:0|None|j\n1_1|FAILED|0:53|None|j\n"))
    assert [(row.exit_code, row.signal) for row in rows] == [(3, 0), (0, 53)] * 2


def test_lines_without_a_state_are_ignored():
    assert list(parse_tasks("\nJUNK\n5_1|RUNNING\n")) == [Task(task_id="5_1", word="RUNNING")]


@pytest.mark.parametrize(("word", "state"), [("COMPLETING", State.RUNNING), ("PENDING", State.SUBMITTED)])
def test_a_task_that_could_not_start_is_live_while_slurm_holds_it(word, state):
    (task,) = parse_tasks(f"1_0|{word}|0:53|launch failed requeued held|j\n")
    assert task.job_state.state is state and task.job_state.is_live


# The words of SLURM 22.05 (tests/slurm asks a real one for some of them).
@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("sbatch: error: invalid partition specified: nopart", "partition"),
        ("sbatch: error: Invalid --time specification", "timeout_min"),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "timeout_min"),
        (
            "sbatch: error: Memory specification can not be satisfied",
            "mem_gb or hydra.launcher.mem_per_cpu or hydra.launcher.mem_per_gpu",
        ),
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


def test_the_time_limit_of_the_partition_and_the_array_size_of_the_cluster_are_respected(bin_dir):
    write_command(bin_dir, "sinfo", 'echo "low*|1-02:30:00"; echo "high|30:00"; echo "long|infinite"')
    assert Slurm().max_time_min(SlurmSettings()) == 26 * 60 + 30  # of the default partition
    write_command(bin_dir, "sinfo", 'echo "low*|1:00:00"; echo "high|30:00"')
    assert Slurm().max_time_min(SlurmSettings(partition="low,high")) == 30
    assert [minutes(limit) for limit in ("infinite", "n/a", "45:00", "2-00:00:00")] == [None, None, 45, 2880]
    write_command(bin_dir, "scontrol", 'echo "MaxArraySize            = 11"')
    assert Slurm().max_array_size() == 11 and Slurm(SlurmSettings(max_array_size=4)).max_array_size() == 4
    write_command(bin_dir, "scontrol", "exit 1")
    assert Slurm().max_array_size() == 1000


def test_submissions_keep_the_pace_that_a_site_allows(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    times: list[float] = []
    for _ in range(8):
        keep_pace(times, 3)
        now[0] += 1
    assert all(later - earlier >= 60 for earlier, later in zip(times, times[3:], strict=False)) and times[2] == 102


def test_a_suspended_job_is_told_from_a_running_one():
    states = {word: next(parse_tasks(f"1001_0|{word}|0|None|x")).job_state for word in ("RUNNING", "SUSPENDED")}
    assert {word: (job.state, job.is_suspended) for word, job in states.items()} == {
        "RUNNING": (State.RUNNING, False),
        "SUSPENDED": (State.RUNNING, True),
    }
