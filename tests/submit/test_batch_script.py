"""Job arrays, and the batch script of each, run by a real bash."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TESTS
from support.stub_cell import status
from support.submissions import make_job, write_command

from dlm.core.errors import UserError
from dlm.core.paths import PACKAGE
from dlm.record.outcomes import State
from dlm.record.run import write_status
from dlm.submit.cluster import Request
from dlm.submit.executor import Executor, log_pattern
from dlm.submit.job import Job, SlurmSettings, slurm_settings
from dlm.submit.ledger import Ledger
from dlm.submit.script import arrays, body_of, job_line, parameters_of
from dlm.submit.stopped import has_stopped


def request(sweep_dir: Path, jobs, *, code: Path = Path("/w/code/ab"), environment=None) -> Request:
    ledger = Ledger(sweep_dir)
    return Request(submission="s", jobs=jobs, ledger=ledger, code=code, environment=environment or {})


def script_lines(tmp_path, jobs, settings=None) -> list[str]:
    array = arrays(request(tmp_path, jobs), max_size=1000)[0]
    return write_script(array, settings or SlurmSettings()).read_text().splitlines()


def write_script(array: Request, settings: SlurmSettings) -> Path:
    """Write the jobs file and the batch script of an array, as `Slurm.submit` does."""
    folder = array.ledger.folder
    script = folder / f"{array.submission}.sbatch"
    folder.mkdir(parents=True, exist_ok=True)
    parameters = parameters_of(array, settings, name=f"isoflop-{array.submission}", log=log_pattern(folder), at_once=4)
    Executor(folder, parameters, num_jobs=len(array.jobs)).write(body_of(array, settings), script)
    script.with_suffix(".jobs").write_text("".join(job_line(job) + "\n" for job in array.jobs))
    return script


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
    lines = script_lines(tmp_path, jobs, settings)
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert options == {
        "job-name=isoflop-s-0",
        "array=0-11%4",
        f"output={tmp_path}/ledger/%A_%a_0_log.out",
        "open-mode=append",
        "comment='my sweep dlm s-0'",
        "nodes=2",
        "ntasks-per-node=8",
        "cpus-per-task=12",
        "gpus-per-node=8",
        "mem=900GB",
        "time=240",
        "partition=gpu,low",
        "account=lab",
        "qos=normal",
        "constraint='a100&ib'",
        "signal=USR2@120",
        "requeue",
        "mail-type=END",
        "exclusive",
    }
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if "srun --unb" in line)
    assert "export OMP_NUM_THREADS=12" in lines


def test_options_that_nobody_set_are_left_to_the_cluster(tmp_path):
    text = "\n".join(script_lines(tmp_path, [make_job(tmp_path, "a")]))
    assert not re.search(r"--(partition|account|qos|mem|time|gres|gpus)", text)
    text = "\n".join(
        script_lines(
            tmp_path,
            [make_job(tmp_path, "a", gpus_per_node=4, tasks_per_node=4)],
            SlurmSettings(gres="gpu:4", requeue=False),
        )
    )
    assert "--gres=gpu:4" in text and "gpus-per-node" not in text and "--no-requeue" in text


def test_the_script_runs_its_line_with_exact_words_and_tells_the_cells_exit_code(tmp_path, bin_dir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    srun = 'for word in "$@"; do printf "%s\\n" "$word"; done > srun.txt; env > env.txt; exit ${SRUN_CODE:-0}'
    write_command(bin_dir, "srun", srun)
    odd = "data.name='it is \\'odd\\' $HOME `id` \"x\" é'"
    sweep = tmp_path / "my sweep"
    jobs = [
        Job(name="a", overrides=("+cell=a",), run_dir=sweep / "runs" / "a"),
        Job(name="b", overrides=("+cell=b", odd), run_dir=sweep / "runs" / "b"),
    ]
    asked = request(sweep, jobs, code=tmp_path / "code", environment={"DLM_GIT_SHA": "abc"})
    script = write_script(arrays(asked, max_size=10)[0], SlurmSettings())
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


def test_the_script_asks_the_record_of_the_cell_whether_it_is_to_be_continued(tmp_path, bin_dir, monkeypatch):
    """srun reports the rank that it killed, not the ranks that left to be continued."""
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{PACKAGE.parent}")
    sweep, calls = tmp_path / "100% mine", tmp_path / "calls.txt"
    asked = request(sweep, [Job(name="a", overrides=("+cell=a",), run_dir=sweep / "runs" / "a")], code=tmp_path)
    lines = ["unset PS1", 'prompt="$PS1 "', "export MINE=1"]  # as in ~/.bashrc, which reads variables that are not set
    script = write_script(arrays(asked, max_size=10)[0], SlurmSettings(setup=lines))
    assert f"#SBATCH --output='{tmp_path}/100%% mine/ledger/%A_%a_0_log.out'" in script.read_text()
    write_command(bin_dir, "squeue", "echo RUNNING")
    write_command(bin_dir, "scontrol", f'echo "$@" >> {calls}')
    environment = {**os.environ, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "0"}

    def ended(state: State, submission: str | None) -> tuple[int, bool]:
        calls.unlink(missing_ok=True)
        said = dataclasses.replace(status(state, exit_code=75), submission=submission, updated=time.time() + 5)
        write_status(tmp_path, said)
        srun = f'echo "$@" > {tmp_path}/srun.txt; cp {tmp_path}/status.json "{sweep}/runs/a/"; exit 143'
        write_command(bin_dir, "srun", srun)
        done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
        assert "unbound variable" not in done.stderr
        return done.returncode, calls.exists()

    assert ended(State.PREEMPTED, "s-0") == (75, True)
    assert f"--output={tmp_path}/100%% mine/runs/a/log.txt" in (tmp_path / "srun.txt").read_text()
    assert ended(State.PREEMPTED, "another") == (143, False)  # the ending of an earlier submission
    assert ended(State.RUNNING, "s-0") == (143, False)


def test_an_ending_from_before_the_job_does_not_count(tmp_path):
    write_status(tmp_path, dataclasses.replace(status(State.PREEMPTED, exit_code=75), submission="s", updated=100.0))
    assert has_stopped(tmp_path, submission="s", began=99) and not has_stopped(tmp_path, submission="s", began=101)
    assert not has_stopped(tmp_path / "nothing", submission="s", began=0)


def test_one_array_for_each_resource_class_within_the_array_limit(tmp_path):
    jobs = [make_job(tmp_path, f"c{i}", nodes=1 + i % 2) for i in range(7)]
    split = arrays(request(tmp_path, jobs), max_size=3)
    assert [[job.name for job in array.jobs] for array in split] == [["c0", "c2", "c4"], ["c6"], ["c1", "c3", "c5"]]
    assert [array.jobs[0].resources.nodes for array in split] == [1, 1, 2]
    assert len({array.submission for array in split}) == 3


@given(st.lists(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=12), max_size=4))
def test_any_override_survives_the_jobs_file(words):
    line = job_line(Job(name="a", overrides=tuple(words), run_dir=Path("/w")))
    assert shlex.split(line) == ["/w", *words]


def test_a_line_break_in_an_override_is_refused():
    with pytest.raises(UserError, match="line break"):
        job_line(Job(name="a", overrides=("x=1\ny=2",), run_dir=Path("/w")))


def test_settings_refuse_unknown_keys_and_suggest_near_ones():
    with pytest.raises(UserError, match=r"unknown key of hydra\.launcher 'partitions': did you mean partition"):
        slurm_settings({"partitions": "x"})
    for key, value in [("array_parallelism", 0), ("nodes", 2.5), ("timeout_min", "1h"), ("gpus_per_node", -1)]:
        with pytest.raises(UserError, match=f"{key} is {value!r}: it must be a whole number of at least"):
            slurm_settings({key: value})


HOSTILE = "x\ntouch M"
TEXT_KEYS = ["partition", "account", "qos", "constraint", "exclude", "nodelist", "gres", "dependency", "wckey",
             "comment", "mail_type", "mail_user", "mem_per_cpu", "name", "exclusive", "submitit_folder"]  # fmt: skip


@pytest.mark.parametrize("key", TEXT_KEYS)
@pytest.mark.parametrize("words", [HOSTILE, "x\0y", "x\ry", "x\x1b[2Jy", "x\u2028y"])
def test_a_control_character_in_a_launcher_key_is_refused_in_one_line(key, words):
    with pytest.raises(UserError, match=f"hydra.launcher.{key} ") as refused:
        slurm_settings({key: words})
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [{"additional_parameters": {"nice": HOSTILE}}, {"additional_parameters": {HOSTILE: 1}}, {"srun_args": [HOSTILE]},
     {"follower": {"partition": HOSTILE}}, {"setup": ["module load a", HOSTILE]}, {"teardown": [HOSTILE]}],
)  # fmt: skip
def test_so_is_one_in_an_option_and_a_shell_line_of_two_lines(values):
    with pytest.raises(UserError, match=f"hydra.launcher.{next(iter(values))} has"):
        slurm_settings(values)
    slurm_settings({"setup": ["if true; then\tmodule load 'a b'; fi"]})


def test_a_folder_with_a_line_break_in_its_name_writes_no_line_of_a_script(tmp_path):
    folder = tmp_path / "x\ntouch M"
    with pytest.raises(UserError, match="line break"):
        script_lines(folder, [make_job(folder, "a")])
    assert not list(folder.rglob("*.sbatch"))
