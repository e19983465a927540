"""`dlm doctor` on a real SLURM: a cluster that works, and what it says of one that does not."""

import json
import os
import re
import shutil

import pytest
from support.slurm_sweep import wait_for
from support.submissions import write_command
from test_slurm_submitit import BASHRC, LABS

from dlm.core.paths import PACKAGE

pytestmark = pytest.mark.slurm


@pytest.fixture
def doctor(cluster, command, workdir):
    """Return a function that runs `dlm doctor` and returns (how it ended, its output with each space only once)."""

    def run(*words: str, **keys: object):
        """The keywords are keys of hydra.launcher."""
        given = [word for key, value in keys.items() for word in ("--override", f"hydra.launcher.{key}={value}")]
        ended = command("dlm.cli", "doctor", *given, *words)
        return ended, " ".join(ended.out.split())

    yield run
    cluster("scancel", "--user=root", check=False)


def state_of(ended, name: str) -> str:
    """Return what the command says of one check: ok, warning or FAILED."""
    (found,) = re.findall(rf"^(ok|warning|FAILED) +{re.escape(name)}  ", ended.out, re.MULTILINE)
    return found


def test_a_cluster_that_works(doctor, workdir, cluster):
    ended, said = doctor("--gpus", "0")
    assert ended.code == 0, (ended.out, ended.err)
    for name in ("SLURM", "partitions", "partition", "arrays", "account", "sacct", "job", "node", "node workdir",
                 "node clock", "node setup", "node torch", "node lightning", "node wandb", "node GPU",
                 "node sbatch"):  # fmt: skip
        assert state_of(ended, name) == "ok", ended.out
    assert "low (default): 3 nodes, 6 GPUs, no time limit" in said and "short: 3 nodes, 6 GPUs, at most 2.0 min" in said
    assert "lab: QOS normal, no limit of jobs" in said and "MaxArraySize is 1001" in said
    (script,) = (workdir / "doctor").glob("*.sbatch")
    header = script.read_text()
    assert "#SBATCH --time=10" in header and "#SBATCH --no-requeue" in header and "--array" not in header
    (found,) = (workdir / "doctor").glob("*.json")
    assert json.loads(found.read_text())["host"] in said


@pytest.mark.long
def test_a_gpu_that_torch_does_not_see(doctor):
    """The GPUs of this cluster exist in its books only; a job gets one without being asked."""
    ended, said = doctor()
    assert ended.code == 2 and state_of(ended, "node GPU") == "FAILED" and state_of(ended, "job") == "ok"
    assert "1 requested, and torch sees 0" in said and "to do: install a torch for the driver" in said


def test_set_up_lines_that_fail(doctor):
    ended, said = doctor("--gpus", "0", setup='["source /nowhere/activate"]')
    assert ended.code == 0 and state_of(ended, "node setup") == "warning", (ended.out, ended.err)
    assert "source /nowhere/activate (exit code 1)" in said and "hydra.launcher.setup" in said
    ended, said = doctor("--gpus", "0", setup='["echo no such module", "exit 7"]')
    assert ended.code == 2 and state_of(ended, "job") == "FAILED", (ended.out, ended.err)
    assert "SLURM says FAILED 7:0; its last line: no such module" in said


def test_a_partition_that_does_not_exist_and_a_time_that_it_does_not_allow(doctor, workdir):
    ended, said = doctor(partition="lo")
    assert ended.code == 2 and "there is no partition lo to do: set hydra.launcher.partition; did you mean low" in said
    assert "no job was submitted" in said and not list((workdir / "doctor").glob("*.sbatch"))
    ended, said = doctor(partition="short", timeout_min=60)
    assert ended.code == 2 and "set hydra.launcher.timeout_min to 2 at most" in said


@pytest.mark.long
def test_sbatch_refuses(doctor):
    ended, said = doctor("--gpus", "0", constraint="h100")
    assert ended.code == 2 and state_of(ended, "job") == "FAILED" and "hydra.launcher.constraint" in said, ended.out


@pytest.mark.long
def test_a_node_that_does_not_see_the_work_directory(doctor, cluster, workdir):
    """One node has an empty folder in its place."""
    node = cluster.nodes[0]
    cluster.stop(node)
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec slurmd -D -N "$1"', str(workdir)]
    cluster.start(node, *hidden, node)
    try:
        wait_for(lambda: "idle" in cluster("sinfo", "-h", "-n", node, "-o", "%T"))
        ended, said = doctor("--gpus", "0", nodelist=node)
        assert ended.code == 2 and state_of(ended, "node workdir") == "FAILED", (ended.out, ended.err)
        assert "choose a folder that all nodes share: DLM_WORKDIR" in said
        logs = workdir.with_name("logs")  # where the node can write a log, the script says it itself
        ended, said = doctor("--gpus", "0", nodelist=node, submitit_folder=logs)
        assert ended.code == 2 and state_of(ended, "node workdir") == "FAILED", (ended.out, ended.err)
        assert "does not see" in next(logs.glob("*.txt")).read_text()
    finally:
        cluster.stop(node)
        cluster.start(node)
        cluster("scontrol", "update", f"node={node}", "state=resume", check=False)
        wait_for(lambda: "idle" in cluster("sinfo", "-h", "-n", node, "-o", "%T"))


@pytest.mark.long
def test_a_job_that_never_starts_is_cancelled(doctor, cluster):
    ended, said = doctor("--gpus", "0", "--timeout", "0.3", additional_parameters="{begin: now+1hour}")
    assert ended.code == 2 and state_of(ended, "job") == "FAILED", (ended.out, ended.err)
    assert "SLURM says PENDING (BeginTime); job" in said and "is cancelled" in said
    wait_for(lambda: not cluster("squeue", "-h").strip())


@pytest.mark.long
def test_jobs_that_cannot_call_sbatch(doctor, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("srun", "bash"):
        write_command(tmp_path / "bin", name, f'PATH={os.environ["PATH"]} exec {name} "$@"')
    ended, said = doctor("--gpus", "0", setup=f'["export PATH={tmp_path}/bin"]')
    assert ended.code == 0 and state_of(ended, "node sbatch") == "warning", (ended.out, ended.err)
    assert "sbatch is not on PATH in jobs" in said


@pytest.mark.long
@pytest.mark.parametrize("lab", ["module_and_conda", "container"])
def test_the_file_of_a_lab_unchanged(doctor, lab, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.bashrc").write_text(BASHRC)
    shutil.copytree(PACKAGE.parent / "configs", tmp_path / "configs")
    shutil.copy(LABS / f"{lab}.yaml", tmp_path / "configs/hydra/launcher")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DLM_CONFIGS", str(tmp_path / "configs"))
    ended, _ = doctor("--launcher", lab, "--gpus", "0")
    assert ended.code == 0 and state_of(ended, "node torch") == "ok", (ended.out, ended.err)
    said = (tmp_path / "home/said").read_text()
    assert ("conda activate dlm" if lab == "module_and_conda" else "srun --container-image=/images/dlm.sqsh") in said
