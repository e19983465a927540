"""`-m` through both launchers, in a small Hydra application of its own: what runs, what comes back, what is said."""

import json
import os
import stat
import subprocess
import sys
import textwrap
import time

import pytest
import submitit
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
from omegaconf import OmegaConf
from support import TESTS
from support.stub_cell import result, status

from dlm.core.configs import load_mapping
from dlm.core.paths import configs_dir
from dlm.record.outcomes import State
from dlm.record.run import write_result, write_status
from dlm.submit.hydra import LocalConf, SlurmConf, job_resources
from dlm.submit.job import Resources, SlurmSettings, slurm_settings
from dlm.submit.ledger import Ledger

# Stands where dlm.launch stands; its jobs are stub_cell processes instead of trainings.
APPLICATION = """
    import json, sys
    import hydra
    from hydra.core.plugins import Plugins
    from dlm.submit import hydra as launchers
    from hydra._internal.core_plugins import basic_sweeper


    class StubPool(launchers.LocalPool):
        def __init__(self, **keys):
            super().__init__(**keys, module="support.stub_cell", poll_sec=0.02)

    launchers.LocalPool = StubPool
    launchers.register(anew="--rerun" in sys.argv)
    sys.argv = [word for word in sys.argv if word != "--rerun"]
    returns = launchers.CoreLauncher.launch

    def launch(self, job_overrides, initial_job_idx):
        answers = returns(self, job_overrides, initial_job_idx)
        rows = [[a.overrides, a.status.name, a._return_value.code if a.status.name == "FAILED" else a.return_value,
                 a.working_dir, sorted(a.cfg)] for a in answers]
        with open("returns.json", "w") as stream:
            json.dump(rows, stream)
        return answers

    launchers.CoreLauncher.launch = launch

    @hydra.main(version_base=None, config_path="conf", config_name="config")
    def main(config):
        raise AssertionError("a job ran in the submitting process")

    main()
"""
CONFIG = """
    defaults:
      - trainer: none
      - _self_
      - override hydra/job_logging: none
      - override hydra/hydra_logging: none
    sweep: adhoc
    cell: a
    mode: done
    sec: 0
    cell_id: ${cell}
    paths: {workdir: null, run_dir: "${paths.workdir}/${sweep}/runs/${cell_id}"}
    hydra:
      sweep: {dir: "${paths.workdir}/${sweep}/runs", subdir: "${cell_id}"}
"""


@pytest.fixture
def multirun(tmp_path, monkeypatch):
    """Runs `-m` with overrides in the small application; (exit code, stderr, what Hydra got back)."""
    conf = tmp_path / "conf"
    (conf / "trainer").mkdir(parents=True)
    (conf / "hydra").mkdir()
    (conf / "hydra/launcher").symlink_to(configs_dir() / "hydra/launcher")
    (conf / "trainer/none.yaml").write_text("{}")
    (conf / "trainer/gpus.yaml").write_text("accelerator: gpu\ndevices: 4\nnum_nodes: 2\n")
    (conf / "config.yaml").write_text(textwrap.dedent(CONFIG))
    (tmp_path / "app.py").write_text(textwrap.dedent(APPLICATION))
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")

    def run(*overrides):
        dirty = ["hydra.launcher.allow_dirty=true"] if "hydra/launcher=submitit_slurm" in overrides else []
        command = [sys.executable, "app.py", "-m", f"paths.workdir={tmp_path}", *overrides, *dirty]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        returned = tmp_path / "returns.json"
        rows = json.loads(returned.read_text()) if returned.is_file() else None
        returned.unlink(missing_ok=True)
        return done.returncode, done.stderr, rows

    return run


def test_local_multirun_runs_each_job_and_gives_back_its_loss(multirun, tmp_path):
    code, said, rows = multirun("cell=a,b", "hydra/launcher=submitit_local")
    assert code == 0, said
    assert [row[1:4] for row in rows] == [["COMPLETED", 2.5, f"{tmp_path}/adhoc/runs/{name}"] for name in "ab"]
    assert rows[0][0] == [f"paths.workdir={tmp_path}", "cell=a"]
    assert "hydra" not in rows[0][4] and "sweep" in rows[0][4]
    assert "Warning" not in said  # ours is not checked against the schema of an installed hydra-submitit-launcher
    again, said, rows = multirun("cell=a,b", "hydra/launcher=submitit_local")
    assert again == 0 and said.count("not started again; --rerun trains it anew") == 2 and "a started" not in said
    assert [row[2] for row in rows] == [2.5, 2.5]
    (tmp_path / "adhoc/runs/b/result.json").unlink()
    again, said, rows = multirun("cell=a,b", "hydra/launcher=submitit_local", "--rerun")
    kept = [path.name for path in (tmp_path / "adhoc/set_aside").iterdir()]
    assert again == 0 and said.count("is trained anew") == 1 and "a started" in said and "b started" in said
    assert kept == ["a-1"] and [row[2] for row in rows] == [2.5, 2.5]


def test_a_failed_job_is_one_line_and_the_exit_code_and_the_others_run(multirun, tmp_path):
    code, said, rows = multirun("cell=a,b,c", "mode=config", "hydra/launcher=submitit_local")
    assert code == 2
    assert [line for line in said.splitlines() if "failed with exit code 2" in line] == [
        f"dlm: {name} failed with exit code 2: see {tmp_path}/adhoc/runs/{name}/log.txt" for name in "abc"
    ]
    assert [row[1:3] for row in rows] == [["FAILED", 2]] * 3 and "Traceback" not in said
    code, said, rows = multirun("cell=k", "mode=kill", "hydra/launcher=submitit_local")
    assert code == 128 + 9 and "k failed with exit code -9" in said


def test_jobs_get_their_overrides_but_not_the_submitters(multirun, tmp_path):
    (tmp_path / "odd dir").mkdir()
    kept = [f"hydra.searchpath=['file://{tmp_path}/odd dir']", "hydra.job.chdir=false"]
    dropped = ["hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=1", "hydra.sweeper.max_batch_size=2"]
    code, said, _ = multirun("cell=a", *dropped, *kept, "+note='x, y'")
    assert code == 0, said
    ran_with = json.loads((tmp_path / "adhoc/runs/a/argv.json").read_text())
    assert ran_with == [*kept, f"paths.workdir={tmp_path}", "cell=a", "+note='x, y'"]
    line = json.loads((tmp_path / "adhoc/ledger/ledger.jsonl").read_text().splitlines()[0])
    assert line["event"] == "intent" and line["cells"] == ["a"] and line["cluster"] == "local"


def test_two_jobs_of_one_cell_run_once(multirun, tmp_path):
    code, said, rows = multirun("cell=a", "sec=0,0.01", "hydra/launcher=submitit_local")
    assert code == 0 and said.count("a started") == 1 and [row[2] for row in rows] == [2.5, 2.5]


def test_unknown_launcher_keys_are_refused(multirun):
    code, said, rows = multirun("hydra/launcher=submitit_local", "+hydra.launcher.partition=x")
    assert code != 0 and rows is None and "unknown key of hydra.launcher 'partition'" in said
    code, said, rows = multirun("hydra/launcher=submitit_slurm", "hydra.launcher.partitionn=x")
    assert code != 0 and rows is None and "partitionn" in said


SBATCH = """
    cp "$2" {db}/script; cp "${{2%.sbatch}}.jobs" {db}/jobs
    n=$(wc -l < {db}/jobs); for i in $(seq 0 $((n - 1))); do echo RUNNING > {db}/1001_$i; done; echo 1001
"""
NAME = "cd {db}; name=$(grep -oP '(?<=--job-name=).*' script); "
SQUEUE = NAME + 'for f in 1001_*; do [ -f $f ] && echo "$f|$(cat $f)|0|None|$name|"; done; true'
SACCT = NAME + 'sed "s/$/|None|$name/" accounted 2>/dev/null; true'


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    db, bin_dir = tmp_path / "db", tmp_path / "bin"
    for folder in (db, bin_dir):
        folder.mkdir()
    for name, body in {"sbatch": SBATCH, "squeue": SQUEUE, "sacct": SACCT}.items():
        path = bin_dir / name
        path.write_text("#!/bin/bash\n" + textwrap.dedent(body).format(db=db))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    return db


def test_slurm_multirun_without_waiting_returns_when_sbatch_has_taken_it(multirun, slurm, tmp_path):
    keys = (
        "hydra.launcher.partition=gpu",
        "hydra.launcher.wait=false",
        "trainer=gpus",
        "hydra.launcher.setup=[module load x]",
    )
    code, said, rows = multirun(
        "cell=a,b", "hydra/launcher=submitit_slurm", *keys, "hydra.searchpath=['file:///odd dir']"
    )
    assert code == 0 and "submitted 2 jobs as 1001" in said, said
    assert [row[1:3] for row in rows] == [["COMPLETED", None]] * 2
    assert (tmp_path / "adhoc/runs/multirun.yaml").stat().st_mode & 0o777 == 0o600  # it holds what setup exports
    script = (slurm / "script").read_text()
    wanted = ("--partition=gpu", "--array=0-1%2", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4")
    assert all(f"#SBATCH {option}\n" in script for option in wanted) and "\nmodule load x\n" in script
    _first, second = (slurm / "jobs").read_text().splitlines()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {second}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert words == [
        f"{tmp_path}/adhoc/runs/b",
        "hydra.searchpath=['file:///odd dir']",
        f"paths.workdir={tmp_path}",
        "cell=b",
        "trainer=gpus",
    ]


def test_slurm_multirun_waits_and_tells_the_truth_about_each_job(multirun, slurm, tmp_path):
    waiting = subprocess.Popen(
        [sys.executable, "app.py", "-m", f"paths.workdir={tmp_path}", "cell=a,b,c", "hydra/launcher=submitit_slurm",
         "hydra.launcher.poll_sec=0.2", "hydra.launcher.allow_dirty=true"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (slurm / "1001_2").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert waiting.poll() is None
    submission = Ledger(tmp_path / "adhoc").read()["a"].submission
    write_result(tmp_path / "adhoc/runs/a", result("a"))
    write_status(tmp_path / "adhoc/runs/a", status(State.DONE, exit_code=0, submission=submission))
    (slurm / "accounted").write_text("1001_0|COMPLETED|0:0\n1001_1|FAILED|4:0\n1001_2|NODE_FAIL|0:0\n")
    for task in slurm.glob("1001_*"):
        task.unlink()
    said = waiting.communicate(timeout=120)[1]
    assert "b failed with exit code 4" in said and "c failed with exit code 1" in said and "a failed" not in said
    assert waiting.returncode == 4  # the first that failed


def test_the_shipped_launcher_files_hold_exactly_the_known_keys():
    slurm, local = (load_mapping(configs_dir() / f"hydra/launcher/submitit_{name}.yaml") for name in ("slurm", "local"))
    assert slurm.pop("defaults") == ["dlm_slurm", "_self_"] and local.pop("defaults") == ["dlm_local", "_self_"]
    assert slurm_settings(slurm) == SlurmSettings()  # a key left out or a default that differs would show
    assert set(slurm) == set(OmegaConf.structured(SlurmConf)) and set(local) == set(OmegaConf.structured(LocalConf))
    assert issubclass(SlurmConf, SlurmQueueConf) and issubclass(LocalConf, LocalQueueConf)
    own = submitit.SlurmExecutor._valid_parameters() - {"num_gpus"}  # submitit calls num_gpus a legacy
    names = {"job_name": "name", "time": "timeout_min", "mem": "mem_gb", "ntasks_per_node": "tasks_per_node"}
    assert {names.get(key, key) for key in own} <= set(slurm)


def test_resources_follow_the_trainer_where_the_launcher_is_silent():
    gpus = OmegaConf.create(
        {"trainer": {"accelerator": "gpu", "devices": 8, "num_nodes": 2}, "data": {"num_workers": 3}}
    )
    assert job_resources(SlurmSettings(), gpus) == Resources(
        nodes=2, tasks_per_node=8, gpus_per_node=8, cpus_per_task=4
    )
    cpus = OmegaConf.create({"trainer": {"accelerator": "cpu", "devices": 2, "num_nodes": 1}})
    assert job_resources(SlurmSettings(), cpus) == Resources(tasks_per_node=2)
    settings = SlurmSettings(nodes=1, gpus_per_node=1, tasks_per_node=1, cpus_per_task=4, timeout_min=5, mem_gb=2)
    expected = Resources(gpus_per_node=1, cpus_per_task=4, mem_gib=2, time_min=5)
    assert job_resources(settings, gpus) == expected
