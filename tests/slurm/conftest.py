"""One real SLURM for the whole session of tests: its commands, its sweeps."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from sandbox import Sandbox, sandbox

SMOKE = Path(__file__).parents[2] / "sweeps" / "smoke.yaml"


@pytest.fixture(scope="session")
def cluster():
    """A cluster of three nodes; SLURM_CONF names it for every process that is started."""
    with sandbox() as standing, pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, standing.env[name])
        yield standing


class Sweep:
    """A sweep of one size that is submitted to the cluster, and what has become of it."""

    def __init__(self, cluster: Sandbox, command, folder: Path) -> None:
        self.cluster, self.command, self.folder = cluster, command, folder

    def submit(self, *arguments: str):
        """`dlm submit` of the smallest cells; ends with its exit code."""
        small = ("--set", "models=[4k]", "--set", "tokens_per_param=[1,1e5]", "--launcher", "submitit_slurm", "--yes")
        return self.command("dlm.cli", "submit", SMOKE, *small, *arguments)

    @property
    def run_dirs(self) -> list[Path]:
        return sorted((self.folder / "runs").iterdir())

    def wait_for(self, condition, *, seconds: float = 90):
        """What ``condition`` gives as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, self.cluster("squeue")
            time.sleep(0.2)
        return found

    def status(self) -> list[dict]:
        """The cells of `dlm status --json`."""
        return json.loads(self.command("dlm.cli", "status", self.folder, "--json").out)

    def accounts(self) -> list[tuple[str, str]]:
        """(state, exit code) of every job in sacct, once nothing of it runs or waits there either."""
        self.wait_for(lambda: not self.cluster("squeue", "-h").strip(), seconds=240)
        return self.wait_for(self._ended_accounts, seconds=30)  # accounting lags behind

    def _ended_accounts(self) -> list[tuple[str, str]]:
        rows = self.cluster("sacct", "-X", "-n", "-P", "-o", "state,exitcode,jobname", "-S", "now-1hour").splitlines()
        mine = [tuple(row.split("|")[:2]) for row in rows if row.split("|")[2].startswith(f"{self.folder.name}-20")]
        return [] if any(state in ("PENDING", "RUNNING", "REQUEUED") for state, _ in mine) else mine


@pytest.fixture
def sweep(cluster, command, stdlib_data, workdir, monkeypatch, request):
    """A sweep whose name, and so its jobs' name, is the test's own."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-")
    made = Sweep(cluster, command, workdir / name)
    plain = made.submit
    made.submit = lambda *arguments: plain("--set", f"name={name}", *arguments)
    yield made
    cluster("scancel", "--user=root", check=False)
    assert os.environ["SLURM_CONF"] == cluster.env["SLURM_CONF"]
