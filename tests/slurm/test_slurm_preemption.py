"""Told to stop, a cell on a real SLURM goes on where it was: preempted, with and without grace, or out of time."""

import pytest
from conftest import LONG, curve, wait_for

from dlm.record import read_result, read_status
from dlm.wandb_file import read_wandb_run

pytestmark = pytest.mark.slurm
RIVAL = ("sbatch", "-p", "high", "-N3", "--exclusive", "-J", "rival", "-o", "/dev/null", "--wrap", "sleep 2")


@pytest.mark.parametrize(
    ("partition", "keys"),
    [("low", ""), ("low", " signal_delay_s=0"), ("grace", ""), ("grace", " signal_delay_s=0")],
    ids=["no grace", "no grace, no signal", "grace", "grace, no signal"],
)
def test_a_preempted_cell_goes_on_where_it_was(partition, keys, sweep, cluster, undisturbed):
    assert sweep.submit(LONG, launcher=f"partition={partition}{keys}").code == 0
    wait_for(sweep.trains)
    cluster(*RIVAL)
    wait_for(lambda: "PENDING" in sweep.queued() or "REQUEUED" in sweep.queued())
    assert sweep.cell["state"] == "submitted"  # not done, not failed: SLURM will start it again
    assert sweep.accounts() == [("COMPLETED", "0:0")]
    status = read_status(sweep.run_dir)
    assert (sweep.cell["state"], status.attempts) == ("done", 2), sweep.log
    assert "going on from step_" in sweep.log and "Traceback" not in sweep.log
    assert status.steps_redone == 0  # it was given the time to write a checkpoint, and no step was lost
    assert curve(sweep.run_dir) == curve(undisturbed)
    assert read_result(sweep.run_dir).loss == read_result(undisturbed).loss
    wandb = list((sweep.run_dir / "wandb").glob("offline-run-*"))
    assert len(wandb) == 2 and {path.name.split("-", 3)[3] for path in wandb} == {
        f"{sweep.folder.name}-{sweep.run_dir.name}"
    }
    assert read_wandb_run(sweep.run_dir, f"{sweep.folder.name}-{sweep.run_dir.name}") is not None


def test_told_to_stop_while_it_starts_a_cell_loses_nothing(sweep, cluster):
    """SIGUSR1 reaches the process while torch is being imported: before, that ended it."""
    assert sweep.submit("budgets=[2e10]").code == 0
    job = sweep.job_ids()[0]
    wait_for(lambda: cluster("squeue", "-h", "-s", "-o", "%i", f"--jobs={job}", check=False).count(".0"))
    for _ in range(8):
        cluster("scancel", "--signal=USR1", f"{job}", check=False)
    assert sweep.accounts() == [("COMPLETED", "0:0")]
    assert sweep.cell["state"] == "done" and sweep.cell["attempts"] >= 2, sweep.log


@pytest.mark.slow
def test_a_cell_longer_than_the_time_limit_chains_until_it_is_done(sweep):
    assert sweep.submit("budgets=[6e11]", launcher="partition=short timeout_min=1").code == 0
    assert sweep.accounts(seconds=280) == [("COMPLETED", "0:0")]
    assert sweep.cell["state"] == "done" and sweep.cell["attempts"] >= 2, sweep.log
    assert len(sweep.job_ids()) == 1 and read_status(sweep.run_dir).steps_redone == 0
