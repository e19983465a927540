"""The launchers of hydra-submitit-launcher and what labs have for them, on a real SLURM."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import submitit
from omegaconf import OmegaConf
from support.slurm_sweep import LONG, SHORT, Sweep, wait_for

from dlm.core.paths import PACKAGE
from dlm.record.run import read_result, run_directory
from dlm.submit.job import Job, SlurmSettings
from dlm.submit.slurm import Slurm
from dlm.submit.submission import submit_jobs, submitting

pytestmark = pytest.mark.slurm

LABS = Path(__file__).parent / "labs"
PLUGIN = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
# Functions of a shell, as modules and conda define them; srun as on a cluster whose srun knows containers.
BASHRC = """
    module() { echo "module $*" >> "$HOME/said"; }
    conda() { echo "conda $*" >> "$HOME/said"; export CONDA_DEFAULT_ENV=$2; }
    [ -n "$PS1" ] && echo interactive
    srun() {
        local kept=()
        for word in "$@"; do
            case $word in --container-*) echo "srun $word" >> "$HOME/said";; *) kept+=("$word");; esac
        done
        command srun "${kept[@]}"
    }
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home whose shell knows modules, conda and containers, and configs with the files of the labs."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.bashrc").write_text(BASHRC)
    shutil.copytree(PACKAGE.parent / "configs", tmp_path / "configs")
    for lab in LABS.glob("*.yaml"):
        shutil.copy(lab, tmp_path / "configs/hydra/launcher" / lab.name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DLM_CONFIGS", str(tmp_path / "configs"))
    return tmp_path / "home"


def submit_with(sweep: Sweep, launcher: str) -> None:
    """Submit the sweep with a lab's file."""
    words = [launcher if word == "submitit_slurm" else word for word in sweep.arguments(SHORT)]
    ended = sweep.command("dlm.cli", *words)
    assert ended.code == 0, ended.err


def job_of(sweep: Sweep) -> dict[str, str]:
    """What SLURM knows of the only job."""
    shown = sweep.cluster("scontrol", "show", "job", sweep.job_ids()[0])
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def test_a_file_with_modules_and_conda_works_unchanged(sweep, home):
    submit_with(sweep, "module_and_conda")
    job = job_of(sweep)
    assert job["JobName"].startswith("launch-") and job["TimeLimit"] == "00:30:00" and job["Partition"] == "low"
    assert sweep.accounts() == [("COMPLETED", "0:0")], sweep.told()
    assert sweep.cell["state"] == "done"
    assert (home / "said").read_text().splitlines() == ["module purge", "module load cuda/12.1", "conda activate dlm"]
    (job_id,) = sweep.job_ids()
    assert (sweep.folder / "runs/.submitit" / f"{job_id}_0_log.out").is_file()  # ${hydra.sweep.dir}/.submitit
    assert sweep.command("dlm.cli", "logs", sweep.cell["cell_id"]).code == 0


def test_a_file_with_account_qos_and_constraint_works_unchanged(sweep, home, cluster):
    cluster("sacctmgr", "-i", "add", "qos", "high", check=False)
    cluster("sacctmgr", "-i", "modify", "user", "root", "set", "qos+=high")
    for node in cluster.nodes[:2]:
        cluster("scontrol", "update", f"node={node}", "AvailableFeatures=a100,ib", "ActiveFeatures=a100,ib")
    submit_with(sweep, "account_and_qos")
    job = job_of(sweep)
    wanted = {
        "Account": "lab",
        "QOS": "high",
        "Features": "a100&ib",
        "MinMemoryCPU": "1G",
        "MailUser": "me@example.org",
    }
    assert wanted.items() <= job.items(), job
    comment = cluster("scontrol", "show", "job", sweep.job_ids()[0])
    assert "Comment=Grant 42: what a law depends on dlm " in comment
    assert sweep.accounts() == [("COMPLETED", "0:0")] and sweep.cell["state"] == "done", sweep.told()


def test_a_file_with_a_container_works_unchanged(sweep, home):
    """There is no pyxis here: a function of the shell takes srun's options for containers."""
    shutil.copy(LABS / "container.yaml", os.environ["DLM_CONFIGS"] + "/hydra/launcher/submitit_slurm.yaml")
    submit_with(sweep, "submitit_slurm")
    assert sweep.accounts() == [("COMPLETED", "0:0")] and sweep.cell["state"] == "done", sweep.told()
    mounts = "--container-mounts=/shared:/shared,/scratch:/scratch"
    assert (home / "said").read_text().splitlines() == ["srun --container-image=/images/dlm.sqsh", f"srun {mounts}"]
    (job_id,) = sweep.job_ids()
    log = (sweep.folder / "runs/.submitit" / f"{job_id}_0_log.out").read_text()
    assert log.splitlines()[-1] == "the container is gone"


def test_a_multirun_takes_a_labs_file_and_the_command_line_can_ask_for_the_plugins_own_launcher(
    home, cluster, command, stdlib_data, workdir
):
    words = ("-m", "experiment=debug", "logger=none", "training.steps=10")
    ours = command("dlm.launch", *words, "hydra/launcher=module_and_conda", "+hydra.launcher.allow_dirty=true",
                   "+hydra.launcher.poll_sec=1")  # fmt: skip
    assert ours.code == 0 and "submitted 1 job" in ours.err, ours.err
    (run_dir,) = (workdir / "adhoc/runs").glob("mdm-*")
    assert read_result(run_dir).step == 10
    original = command("dlm.launch", *words, "seed=3", "hydra/launcher=submitit_slurm",
                       f"hydra.launcher._target_={PLUGIN}", "hydra.launcher.timeout_min=10")  # fmt: skip
    assert original.code == 0, original.err
    assert "submitted" not in original.err  # dlm's launcher would say so
    pickles = list((workdir / "adhoc/runs/.submitit").glob("*/*_result.pkl"))
    assert len(pickles) == 1 and sum(read_result(run) is not None for run in run_dir.parent.glob("mdm-*")) == 2


def test_the_command_of_the_readme_trains_by_fsdp_on_two_nodes(cluster, command, stdlib_data, workdir):
    readme = (PACKAGE.parent / "README.md").read_text()
    line = next(line for line in readme.splitlines() if "-m experiment=scaling_170M" in line)
    words = re.sub(r"\s+#.*", "", line).split("dlm.launch ")[1].split()
    toy = ("model=4k", "data=stdlib", "data.batch_size=8", "data.block_size=32", "training.budget=null",
           "training.steps=20", "validation.num_sequences=16", "validation.draws=2", "logger=none")  # fmt: skip
    on_cpu = ("trainer=multi_node", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.threads=1",
              "trainer.compile=false")  # fmt: skip
    ended = command("dlm.launch", *words, *toy, *on_cpu, "hydra.launcher.allow_dirty=true", "hydra.launcher.poll_sec=1")
    assert ended.code == 0, ended.err
    (run_dir,) = (workdir / "adhoc/runs").glob("mdm-*")
    result = read_result(run_dir)
    assert (result.step, result.num_devices) == (20, 2)
    (attempt,) = json.loads((run_dir / "env.json").read_text())["attempts"]
    nodes = attempt["slurm"]["JOB_NODELIST"]
    assert "[1-2]" in nodes or "," in nodes, attempt
    assert OmegaConf.load(run_dir / "config.yaml").trainer.strategy == "fsdp"


def test_jobs_are_those_of_submitit(cluster, stdlib_data, workdir):
    sweep_dir = workdir / "jobs"

    def job(name: str, *words: str) -> Job:
        run_dir = run_directory(sweep_dir, name)
        every = ("experiment=debug", "logger=none", f"paths.data_dir={stdlib_data}", f"paths.run_dir={run_dir}")
        return Job(name=name, overrides=(*every, *words), run_dir=run_dir)

    slurm = Slurm(SlurmSettings(allow_dirty=True, teardown=("echo after",), use_srun=False, mem_per_cpu="1G"))
    with submitting(slurm, sweep_dir):
        pair = [job("short", "training.steps=10"), job("endless", "training.steps=1000000")]
        jobs = submit_jobs(pair, cluster=slurm, sweep_dir=sweep_dir).jobs
    assert all(isinstance(one, submitit.Job) for one in jobs.values())
    wait_for(lambda: (jobs["endless"].run_dir / "lease.json").is_file())
    assert jobs["endless"].state == "RUNNING" and not jobs["endless"].done(force_check=True)
    jobs["endless"].cancel()
    assert jobs["short"].result() == read_result(jobs["short"].run_dir).loss
    assert jobs["short"].paths.stdout.read_text().splitlines()[-1] == "after"
    assert "#SBATCH --mem-per-cpu=1G" in jobs["short"].paths.submission_file.read_text()
    wait_for(lambda: jobs["endless"].watcher.get_state(jobs["endless"].job_id, mode="force").startswith("CANCELLED"))
    with pytest.raises(submitit.core.utils.UncompletedJobError, match="without a result"):
        jobs["endless"].result()


@pytest.mark.long
def test_without_srun_a_cell_is_told_in_time_and_goes_on(sweep, cluster):
    """The batch script passes the signal on to the cell, which is no job step then."""
    assert sweep.submit(LONG, launcher="use_srun=false partition=grace").code == 0
    wait_for(sweep.trains)
    cluster("scancel", "--batch", "--signal=USR2", sweep.job_ids()[0])
    assert sweep.accounts() == [("COMPLETED", "0:0")], sweep.told()
    cell = sweep.cell
    assert (cell["state"], cell["attempts"], cell["steps_redone"]) == ("done", 2, 0), sweep.log


@pytest.mark.long  # SLURM counts time limits in minutes
def test_a_cell_reaches_its_time_limit_as_often_as_max_num_timeout_allows(sweep, cluster):
    assert sweep.submit("budgets=[3e12]", launcher="partition=short timeout_min=1 max_num_timeout=1").code == 0
    wait_for(lambda: sweep.cell["state"] == "cancelled", seconds=400, sleep=2)
    assert "reached its time limit 2 times, and hydra.launcher.max_num_timeout is 1" in sweep.cell["reason"]
    assert sweep.cell["attempts"] == 2 and not sweep.queued()


@pytest.mark.long
def test_the_cells_of_a_sweep_stay_within_its_limits_in_all_arrays(sweep, cluster):
    settings = ("budgets=[2e10]", "seeds=[0,1,2]", "models=[4k,8k]")
    rules = ("--set", "launcher=[{below: 5000, set: {comment: small, partition: low}}]")
    limits = "max_running=2"
    assert sweep.submit(*settings, launcher=limits, more=rules).code == 0, sweep.told()
    assert len({job.split("_")[0] for job in sweep.job_ids()}) == 2
    seen = []

    def is_over() -> bool:
        states = sweep.queued()
        seen.append(states.count("RUNNING"))
        return not set(states) & {"RUNNING", "PENDING", "COMPLETING"}

    wait_for(is_over)
    assert max(seen) == 2 and {cell["state"] for cell in sweep.status()} == {"done"}, seen


@pytest.mark.long
def test_slurm_takes_what_its_limit_allows_and_the_follower_submits_the_rest(sweep, cluster):
    cluster("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=3")
    try:
        more = ["--then", "report", "--override", "hydra.launcher.follow_min=1"]
        started = sweep.submit("budgets=[2e10]", "seeds=[0,1,2]", more=more)
        assert started.code == 0 and "submitted later" in started.out, started.err
        assert len(sweep.job_ids()) == 2  # and the follower is the third
        wait_for(lambda: [cell["state"] for cell in sweep.status()] == ["done"] * 3, seconds=400, sleep=2)
    finally:
        cluster("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=-1")


@pytest.mark.long
def test_a_pilot_goes_first_and_the_follower_submits_the_rest(sweep, cluster):
    more = ["--pilot", "--then", "report", "--override", "hydra.launcher.follow_min=1"]
    started = sweep.submit("budgets=[2e10,4e10]", more=more)
    assert started.code == 0 and "the pilot" in started.out and len(sweep.job_ids()) == 1, started.err
    wait_for(lambda: [cell["state"] for cell in sweep.status()] == ["done"] * 2, seconds=400, sleep=2)


@pytest.mark.long
def test_one_cell_is_submitted_by_a_part_of_its_id(sweep):
    assert sweep.submit("budgets=[2e10,4e10]", more=["--cell", "nothing-like-it"]).code == 2
    planned = json.loads(sweep.command("dlm.cli", "plan", *sweep.arguments("budgets=[2e10,4e10]")[1:2], "--json",
                                       "--dry-run", *_settings(sweep)).out)["cells"]  # fmt: skip
    cell = planned[1]["cell_id"]
    assert sweep.submit("budgets=[2e10,4e10]", more=["--cell", cell[-8:]]).code == 0
    assert len(sweep.job_ids()) == 1 and sweep.accounts() == [("COMPLETED", "0:0")]
    assert {one["cell_id"] for one in sweep.status() if one["state"] == "done"} == {cell}


def _settings(sweep: Sweep) -> list[str]:
    """The words --set ... of `dlm submit` for this sweep."""
    words = sweep.arguments("budgets=[2e10,4e10]")
    return [word for i, word in enumerate(words) if word == "--set" or words[i - 1] == "--set"]
