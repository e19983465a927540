"""Secrets of whoever starts runs are in no file of the work directory, except in a few that only the owner may read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, slurm_stand_in
from support.wandb_server import KEY, WandbServer

ENVIRONMENT = {
    "HF_TOKEN": "hf_plantedtoken",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret",
    "MY_SECRET": "planted my secret",
}
PASSWORD = "plantedurl"  # in the URL of the W&B server
NETRC, REMOTE, WEBHOOK, SETUP = (f"planted-in-{name}" for name in ("netrc", "remote", "hook", "setup"))
ANYWHERE = (*ENVIRONMENT.values(), KEY, PASSWORD, NETRC, REMOTE)


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def holding(folder: Path, secret: str) -> dict[str, int]:
    """Return the names and modes of the files in a folder, also binary ones, that hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mode & 0o777
        for path in files
        if secret.encode() in path.read_bytes()
    }


@pytest.mark.slow
def test_no_secret_of_the_user_gets_into_the_work_directory(stdlib_data, tmp_path):
    project = tmp_path / "project"  # the work directory is often inside the user's own repository
    home, bin_dir, workdir = tmp_path / "home", tmp_path / "bin", project / "workdir"
    for folder in (project, home, bin_dir):
        folder.mkdir()
    (home / ".netrc").write_text(f"machine 127.0.0.1\nlogin user\npassword {NETRC}\n")
    git(project, "init")
    git(project, "commit", "--allow-empty", "-m", "all")
    git(project, "remote", "add", "origin", f"https://{REMOTE}:x-oauth-basic@example.org/me/project.git")
    slurm_stand_in.install(bin_dir, tmp_path / "db")
    env = {**os.environ, **ENVIRONMENT, "HOME": str(home), "DLM_WORKDIR": str(workdir), "PYTHONPATH": str(ROOT),
           "PATH": f"{bin_dir}:{os.environ['PATH']}"}  # fmt: skip

    def run(module: str, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=project,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done
        said = done.stdout + done.stderr  # of a job, this is in log.txt
        assert not [secret for secret in ANYWHERE if secret in said]

    with WandbServer() as server:
        env |= {**server.env, "WANDB_BASE_URL": server.env["WANDB_BASE_URL"].replace("://", f"://me:{PASSWORD}@")}
        for name in ("WANDB_SILENT", "WANDB_DISABLE_GIT"):  # dlm decides on them
            env.pop(name, None)
        run("dlm.launch", "experiment=debug", "model=4k", "data.block_size=32", "validation.num_sequences=8",
            "training.steps=10", "sweep=alone", "logger.offline=false")  # fmt: skip
    run("dlm.cli", "submit", "smoke", "--launcher", "submitit_slurm", "--yes", "--allow-dirty", "--then", "report",
        "--webhook", f"https://example.org/{WEBHOOK}",
        "--override", f"hydra.launcher.setup=['export TOKEN={SETUP}']")  # fmt: skip

    assert list(workdir.glob("alone/runs/*/wandb/*/*.wandb")) and list(workdir.glob("smoke/ledger/*.sbatch"))
    assert {secret: holding(workdir, secret) for secret in ANYWHERE} == {secret: {} for secret in ANYWHERE}
    assert holding(workdir, WEBHOOK) == {"smoke/ledger/follower.json": 0o600}
    in_scripts = holding(workdir, SETUP)
    assert len(in_scripts) >= 3 and set(in_scripts.values()) == {0o600}, in_scripts
