"""One real SLURM for the whole session of tests, and the sweeps that are submitted to it."""

import os
import re
import subprocess
import sys

import pytest
from filelock import FileLock
from sandbox import missing, sandbox
from support.slurm_sweep import LONG, SMOKE, Sweep

from dlm.core.paths import PACKAGE


@pytest.fixture(scope="session")
def cluster():
    """A cluster of three nodes; SLURM_CONF names it for every process that is started."""
    reason = missing()
    if reason is not None:  # `make test-slurm` has installed SLURM before, or ended with this reason
        pytest.skip(reason)
    with sandbox() as standing, pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, standing.env[name])
        patch.delenv("SLURM_JOB_ID", raising=False)
        yield standing


@pytest.fixture
def make_sweep(cluster, command, stdlib_data, workdir):
    """Yield a function that makes a sweep with a given name, which is also in the names of its jobs."""
    made = []

    def make(name: str) -> Sweep:
        made.append(Sweep(cluster, command, workdir / name))
        return made[-1]

    yield make
    try:
        for sweep in made:
            print(sweep.told())  # pytest shows it if the test has failed
    finally:
        cluster("scancel", "--user=root", check=False)


@pytest.fixture
def sweep(make_sweep, request):
    """A sweep with the name of the test."""
    return make_sweep(re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-")[:40].strip("-"))


@pytest.fixture(scope="session")
def undisturbed(stdlib_data):
    """The run directory of the LONG cell that nothing happened to. It is trained once for all worker processes."""
    workdir = stdlib_data.with_name("undisturbed")
    environment = {**os.environ, "DLM_WORKDIR": str(workdir)}
    words = ["models=[4k]", "tokens_per_param=[1,1e5]", "name=undisturbed", LONG]
    with FileLock(workdir.with_suffix(".lock")):
        subprocess.run(
            [sys.executable, "-m", "dlm.cli", "submit", SMOKE, "--launcher", "submitit_local", "--yes",
             *(word for setting in words for word in ("--set", setting))],
            cwd=PACKAGE.parent, env=environment, check=True, capture_output=True,
        )  # fmt: skip
    (run_dir,) = (workdir / "undisturbed" / "runs").iterdir()
    return run_dir
