"""A sweep that is killed with SIGKILL after it froze its forecast, and again during its proof run, ends the same."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from support import ROOT
from support.settled_sweep import settled_sweep
from support.submissions import wait_until

from dlm.collect.tables import collect
from dlm.plan.store import read_plan
from dlm.record.run import read_result, run_directory

# The command with few bootstrap replicates.
QUICK = (
    "from dlm.fit import table; fit = table.fit_sweep; "
    "table.fit_sweep = lambda runs: fit(runs, bootstrap=100); "
    "from dlm.cli.verbs import main; main()"
)


def submit(folder) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", QUICK, "submit", str(folder), "--launcher", "submitit_local", "--yes"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.long  # three starts of a sweep; tests/cli/test_proof_runs.py kills in this process, without training
def test_a_proof_run_killed_twice_tests_the_same_forecast_and_ends_with_the_same_loss(stdlib_data, workdir, tmp_path):
    folder, other = settled_sweep().folder, tmp_path / "other" / "smoke"
    shutil.copytree(folder, other)
    assert submit(other).wait() == 0
    (undisturbed,) = [cell for cell in read_plan(other).cells if cell.is_proof]

    process = submit(folder)
    wait_until((folder / "proof.json").is_file, seconds=300)
    kill(process)
    before = (folder / "proof.json").read_bytes()
    (proof,) = [cell for cell in read_plan(folder).cells if cell.is_proof]
    run_dir = run_directory(folder, proof.cell_id)
    assert proof.cell_id == undisturbed.cell_id and read_result(run_dir) is None

    process = submit(folder)
    wait_until((run_dir / "LATEST").exists, seconds=300)
    kill(process)
    assert read_result(run_dir) is None
    assert submit(folder).wait() == 0
    assert (folder / "proof.json").read_bytes() == before
    ours, theirs = read_result(run_dir), read_result(run_directory(other, proof.cell_id))
    assert ours is not None and theirs is not None and ours.attempts >= 2
    assert (ours.loss, ours.loss_se) == (theirs.loss, theirs.loss_se)
    assert f"forecast: {proof.forecast}" in (run_dir / "config.yaml").read_text()
    (folder / "plan.json").unlink()  # without a plan, the config of the run tells its role
    runs = collect(folder, write=False).runs
    assert runs.set_index("run_id")["role"].dropna().to_dict() == {proof.cell_id: "proof"}
