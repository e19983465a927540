"""The sandbox stands and goes without a trace; sweeps run on it, and SLURM says the truth about them."""

import subprocess
import sys
from pathlib import Path

import pytest

from dlm.record import read_result, read_status

pytestmark = pytest.mark.slurm


def test_two_sandboxes_side_by_side_and_no_trace(cluster):
    hosts = Path("/etc/hosts").read_bytes()
    script = Path(__file__).parent / "sandbox.py"
    other = subprocess.run([sys.executable, script, "--nodes", "1", "bash", "-c", "srun hostname && exit 7"],
                           capture_output=True, text=True, check=False, timeout=120)  # fmt: skip
    assert other.returncode == 7, other.stderr
    folder = other.stdout.split("SLURM stands: nodes ")[1].split("-n1")[0]
    assert not list(Path("/tmp").glob(f"dlm-slurm-{folder}*")) and Path("/etc/hosts").read_bytes() == hosts
    assert cluster("srun", "-N3", "-n3", "echo", "here").split() == ["here"] * 3


def test_submit_returns_and_the_cells_are_done(sweep):
    ended = sweep.submit("--set", "budgets=[2e10,4e10]")
    assert ended.code == 0, ended.err
    assert all(cell["state"] == "submitted" or cell["state"] == "running" for cell in sweep.status())
    assert sweep.accounts() == [("COMPLETED", "0:0")] * 2
    assert [cell["state"] for cell in sweep.status()] == ["done"] * 2
    again = sweep.submit("--set", "budgets=[2e10,4e10]")
    assert again.code == 0 and len(sweep.accounts()) == 2  # nothing is submitted twice


def test_a_cell_that_diverges_is_failed_with_3(sweep):
    assert sweep.submit("--set", "budgets=[4e10]", "--set", "optimizer.lr=1e4",
                        "--set", "optimizer.gradient_clip_val=null").code == 0  # fmt: skip
    assert sweep.accounts() == [("FAILED", "3:0")]
    assert [cell["state"] for cell in sweep.status()] == ["diverged"]


def test_a_cancelled_cell_is_not_done(sweep):
    assert sweep.submit("--set", "budgets=[2e12]").code == 0
    sweep.wait_for(lambda: [cell["state"] for cell in sweep.status()] == ["running"])
    assert sweep.command("dlm.cli", "cancel", sweep.folder, "--yes").code == 0
    (account,) = sweep.accounts()
    assert account[0].startswith("CANCELLED")
    (cell,) = sweep.status()
    assert cell["state"] == "cancelled"


@pytest.mark.parametrize("partition", ["low", "grace"])
def test_a_preempted_cell_goes_on_where_it_was(partition, sweep, cluster):
    assert sweep.submit("--set", "budgets=[4e11]", "--override", f"hydra.launcher.partition={partition}").code == 0
    (run_dir,) = sweep.wait_for(lambda: sweep.folder.joinpath("runs").is_dir() and sweep.run_dirs)
    sweep.wait_for(lambda: (run_dir / "LATEST").is_file())
    cluster("sbatch", "-p", "high", "-N3", "--exclusive", "-J", "rival", "-o", "/dev/null", "--wrap", "sleep 3")
    assert sweep.accounts() == [("COMPLETED", "0:0")]
    status, result = read_status(run_dir), read_result(run_dir)
    assert status.attempts == 2 and result is not None
    (cell,) = sweep.status()
    assert cell["state"] == "done" and cell["attempts"] == 2
    assert "going on from step_" in (run_dir / "log.txt").read_text()
