"""What dlm adds to submitit's executor and jobs, and what the header of a batch script asks for."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import submitit
from submitit.core.utils import UncompletedJobError
from support.stub_cell import result
from support.submissions import ask_mode, make_job, make_plan, make_pool, submit, write_command

from dlm.core.errors import UserError
from dlm.core.paths import PACKAGE
from dlm.record.outcomes import State
from dlm.record.run import write_result
from dlm.submit.cluster import Request
from dlm.submit.executor import CellJob, Executor, log_folder, log_pattern
from dlm.submit.job import SlurmSettings, slurm_settings
from dlm.submit.ledger import Ledger, not_started
from dlm.submit.script import arrays, body_of, halves, parameters_of
from dlm.submit.timeouts import may_go_on


def options(tmp_path: Path, settings: SlurmSettings, **need) -> dict[str, str]:
    """The options in the header of a script for one job."""
    need = {"cpus_per_task": 3, "mem_gib": 8, **need}
    request = Request(
        submission="s", jobs=[make_job(tmp_path, "a", **need)], ledger=Ledger(tmp_path), code=tmp_path, environment={}
    )
    array = arrays(request, max_size=10)[0]
    values = parameters_of(array, settings, name="x", log=log_pattern(tmp_path), at_once=1, after="7")
    Executor(tmp_path, values, num_jobs=1).write(body_of(array, settings), tmp_path / "x.sbatch")
    lines = (tmp_path / "x.sbatch").read_text().splitlines()
    words = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


@pytest.mark.parametrize(
    ("keys", "asked", "not_asked"),
    [
        ({}, {"cpus-per-task": "3", "mem": "8GB", "gpus-per-node": "4", "dependency": "afterany:7"}, {"wckey", "time"}),
        ({"mem_per_cpu": "4G"}, {"mem-per-cpu": "4G"}, {"mem"}),
        ({"mem_per_gpu": 80}, {"mem-per-gpu": "80"}, {"mem"}),
        ({"cpus_per_gpu": 8, "gpus_per_task": 1}, {"cpus-per-gpu": "8", "gpus-per-task": "1"},
         {"cpus-per-task", "gpus-per-node"}),
        ({"gres": "gpu:a100:4"}, {"gres": "gpu:a100:4"}, {"gpus-per-node"}),
        ({"dependency": "singleton", "wckey": "w", "mail_type": "END", "mail_user": "me@x.org", "nodelist": "n[1-2]"},
         {"dependency": "singleton,afterany:7", "wckey": "w", "mail-type": "END", "mail-user": "me@x.org",
          "nodelist": "'n[1-2]'"}, set()),
        ({"exclusive": True, "additional_parameters": {"hold": None, "mail-type": "NONE", "nice": 5}},
         {"exclusive": "", "hold": "", "mail-type": "NONE", "nice": "5"}, set()),
        ({"array_parallelism": None, "setup": None, "exclusive": False, "comment": "two  words"},
         {"comment": "'two words dlm s-0'"}, {"exclusive"}),
        ({"signal_delay_s": 0}, {"signal": "USR2@0"}, set()),
        ({"use_srun": False}, {"signal": "B:USR2@90"}, set()),
    ],
)  # fmt: skip
def test_the_header_asks_for_each_key_with_its_meaning_in_submitit(tmp_path, keys, asked, not_asked):
    devices = {} if "use_srun" in keys else {"gpus_per_node": 4, "tasks_per_node": 4}
    found = options(tmp_path, slurm_settings(keys), **devices)
    assert asked.items() <= found.items() and not not_asked & found.keys(), found


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mem_gb": 8, "mem_per_cpu": "4G"}, "mem_gb=8 and mem_per_cpu=4G, which contradict each other: keep one"),
        ({"cpus_per_task": 8, "cpus_per_gpu": 4}, "cpus_per_task=8 and cpus_per_gpu=4, which contradict"),
        ({"setup": "module load x"}, r"setup is 'module load x': give a list, such as \[module load x\]"),
        ({"srun_args": 3}, "srun_args is 3: give a list"),
        ({"max_num_timeout": -1}, "max_num_timeout is -1: it must be a whole number of at least 0"),
        ({"additional_parameters": {"job_name": "mine"}}, "has job_name, by which dlm finds its jobs again"),
        ({"follower": {"output": "x"}}, "follower has output, by which dlm finds"),
        ({"name": "a,b"}, "name is 'a,b': no comma, bar or space"),
        ({"mem_per_cpus": "4G"}, "unknown key of hydra.launcher 'mem_per_cpus': did you mean mem_per_cpu"),
    ],
)
def test_keys_that_cannot_be_meant_are_one_line(keys, said):
    with pytest.raises(UserError, match=said):
        slurm_settings(keys)


def test_logs_go_to_a_folder_that_is_there_before_the_job_starts(tmp_path):
    assert log_folder(None, tmp_path) == tmp_path
    assert log_folder(f"{tmp_path}/.submitit/%j", tmp_path) == tmp_path / ".submitit"
    assert log_folder(f"{tmp_path}/50%test/logs/%A/%a", tmp_path) == tmp_path / "50%test" / "logs"
    assert log_folder(f"{tmp_path}/%j/out", tmp_path) == tmp_path


def test_a_percent_sign_in_the_workdir_is_no_pattern_of_a_jobs_paths(tmp_path):
    folder = tmp_path / "50%test"
    job = CellJob(folder, "12_3")
    assert job.paths.folder == folder and job.paths.stdout == folder / "12_3_0_log.out"
    assert job.paths.submission_file == folder / "12_submission.sh"


def test_the_state_of_a_job_comes_from_squeue_where_there_is_no_accounting(tmp_path, bin_dir):
    write_command(bin_dir, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    rows = ("3|RUNNING|0", "4|FAILED|256", "7|SUSPENDED|0", "8|CONFIGURING|0")
    told = "; ".join(f'echo "12_{row}|None|x|"' for row in rows)
    write_command(bin_dir, "squeue", f"echo asked >> {tmp_path}/calls; {told}")
    running, failed, *others = (CellJob(tmp_path, f"12_{i}") for i in (3, 4, 7, 8))
    assert isinstance(running, submitit.Job) and running.state == "RUNNING" and not running.done()
    assert failed.done(force_check=True) and failed.state == "FAILED"
    assert not any(job.done(force_check=True) for job in others)  # submitit would take these words for an end
    asked = (tmp_path / "calls").read_text()
    assert [running.state for _ in range(5)] == ["RUNNING"] * 5 and (tmp_path / "calls").read_text() == asked


def test_the_result_of_a_job_is_the_loss_of_its_run(tmp_path, bin_dir):
    write_command(bin_dir, "sacct", 'echo "12_5|COMPLETED|0:0|None|x"; echo "12_6|FAILED|1:0|None|x"')
    write_command(bin_dir, "squeue", "true")
    (tmp_path / "a").mkdir()
    write_result(tmp_path / "a", result("a"))
    assert CellJob(tmp_path, "12_5", run_dir=tmp_path / "a").result() == result("a").loss
    assert CellJob(tmp_path, "12_5", run_dir=tmp_path / "a").exception() is None
    failed = CellJob(tmp_path, "12_6", run_dir=tmp_path / "b")
    with pytest.raises(UncompletedJobError, match="12_6 ended as FAILED without a result"):
        failed.result()
    assert isinstance(failed.exception(), UncompletedJobError)


def test_without_srun_the_script_passes_the_signal_on_and_waits_for_the_cell(tmp_path, bin_dir):
    sweep = tmp_path / "sweep"
    request = Request(
        submission="s", jobs=[make_job(tmp_path, "a")], ledger=Ledger(sweep), code=tmp_path / "none", environment={}
    )
    body = body_of(
        arrays(request, max_size=10)[0], SlurmSettings(use_srun=False, requeue=False, teardown=('echo "bye$unset"',))
    )
    write_command(
        bin_dir, "cell", f"trap 'echo told; exit 75' USR2; echo began > {tmp_path}/began; while :; do sleep .1; done"
    )
    python = body.split(" -P -m dlm.submit.admit")[0].splitlines()[-1]
    body = body.replace(f'{python} -P -m dlm.launch "$@"', "cell").replace(f"{python} -P -m dlm.submit.admit", "true")
    (tmp_path / "ledger").mkdir()
    (sweep / "ledger").mkdir(parents=True)
    (sweep / "ledger/s-0.jobs").write_text(f"{sweep}/runs/a +cell=a\n")
    script = subprocess.Popen(
        ["bash", "-c", body], env={**os.environ, "SLURM_ARRAY_TASK_ID": "0", "PYTHONPATH": str(PACKAGE.parent)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    script.send_signal(subprocess.signal.SIGUSR2)
    assert script.communicate(timeout=30)[0] == "bye\n" and script.returncode == 75
    assert (sweep / "runs/a/log.txt").read_text() == "told\n"


def test_a_cell_of_several_tasks_needs_srun(tmp_path):
    with pytest.raises(UserError, match="use_srun is false, and a needs 2 tasks"):
        options(tmp_path, SlurmSettings(use_srun=False), nodes=2)


def test_each_gpu_needs_a_task(tmp_path):
    with pytest.raises(UserError, match=r"a has 4 GPUs on a node and hydra\.launcher\.tasks_per_node is 1: each GPU"):
        options(tmp_path, SlurmSettings(), gpus_per_node=4)


def test_time_limits_that_nobody_knows_cannot_be_counted(tmp_path):
    with pytest.raises(UserError, match="max_num_timeout counts time limits, and there is none"):
        options(tmp_path, SlurmSettings(max_num_timeout=1))
    options(tmp_path, SlurmSettings(max_num_timeout=1), time_min=60)


def test_time_limits_are_counted_for_each_submission(tmp_path):
    assert may_go_on(tmp_path, submission="s", most=2) and may_go_on(tmp_path, submission="s", most=2)
    assert not may_go_on(tmp_path, submission="s", most=2)
    assert "reached its time limit 3 times" in not_started(tmp_path, "s")
    assert may_go_on(tmp_path, submission="t", most=1) and not_started(tmp_path, "t") is None


def test_a_refusal_counts_until_the_cell_is_started_again(tmp_path):
    may_go_on(tmp_path, submission="s", most=0)
    (tmp_path / "status.json").write_text("{}")
    os.utime(tmp_path / "status.json", (1, 1))
    assert not_started(tmp_path, "s") is not None
    os.utime(tmp_path / "status.json")
    os.utime(tmp_path / "not_started.json", (1, 1))
    assert not_started(tmp_path, "s") is None


def test_halves_keep_every_job_once_under_names_of_their_own(tmp_path):
    jobs = [make_job(tmp_path, f"c{i}") for i in range(5)]
    request = Request(submission="s", jobs=jobs, ledger=Ledger(tmp_path), code=tmp_path, environment={})
    (first, most), (second, more) = halves(request, 3)
    assert [job.name for job in (*first.jobs, *second.jobs)] == [job.name for job in jobs]
    assert (most, more) == (2, 1) and halves(request, 1)[1][1] == 0  # together as many at once as before
    assert len({request.submission, first.submission, second.submission}) == 3


def test_a_job_here_that_takes_too_long_is_told_to_stop_and_goes_on_next_time(sweep_dir):
    ask_mode(sweep_dir, "a", "wait")
    done = submit(make_plan("a"), sweep_dir, make_pool(timeout_min=0.005))
    assert done.endings["a"][0] is State.PREEMPTED
