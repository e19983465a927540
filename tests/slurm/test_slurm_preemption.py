"""Told to stop, a cell on a real SLURM goes on where it was: preempted, with and without grace, or out of time."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.slurm_sweep import LONG, curve, wait_for

from dlm.collect.wandb_file import read_wandb_run
from dlm.record.run import read_result, read_status

pytestmark = pytest.mark.slurm
RIVAL = ("sbatch", "-p", "high", "-N3", "--exclusive", "-J", "rival", "-o", "/dev/null", "--wrap", "sleep 2")


def test_preempted_cells_go_on_where_they_were(cluster, make_sweep, undisturbed):
    """With and without grace, with and without the user signal: all at once, by one rival."""
    ways = {
        "plain": "partition=low",
        "no-signal": "partition=low signal_delay_s=0",
        "grace": "partition=grace",
        "grace-no-signal": "partition=grace signal_delay_s=0",
    }
    sweeps = {name: make_sweep(name) for name in ways}
    with ThreadPoolExecutor() as pool:  # one after the other, the first would be done before the last is submitted
        ended = pool.map(lambda name: sweeps[name].submit(LONG, launcher=ways[name]), ways)
        assert [one.code for one in ended] == [0] * len(ways)
    for sweep in sweeps.values():
        wait_for(sweep.trains)
    cluster(*RIVAL)
    for sweep in sweeps.values():
        wait_for(lambda sweep=sweep: {"PENDING", "REQUEUED"} & set(sweep.queued()))
        assert sweep.cell["state"] in ("submitted", "running")  # not done, not failed: SLURM will start it again
    for name, sweep in sweeps.items():
        assert sweep.accounts() == [("COMPLETED", "0:0")], name
        status, said = read_status(sweep.run_dir), sweep.log
        assert (sweep.cell["state"], status.attempts) == ("done", 2), said
        assert "going on from step_" in said and "Traceback" not in said, said
        assert status.steps_redone == 0, name  # it was given the time to write a checkpoint, and no step was lost
        assert curve(sweep.run_dir) == curve(undisturbed)
        assert read_result(sweep.run_dir).loss == read_result(undisturbed).loss
        attempts = [path.name.split("-", 3)[3] for path in (sweep.run_dir / "wandb").glob("offline-run-*")]
        assert attempts == [f"{name}-{sweep.run_dir.name}"] * 2  # one W&B run
        assert read_wandb_run(sweep.run_dir, attempts[0]) is not None


def _listens(pid: int) -> bool:
    """Whether a process has begun to note SIGUSR1, before it imports torch.

    Before that, while Python itself starts, the signal ends it, and SLURM says FAILED.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it ended just now
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def test_a_cell_that_is_told_to_stop_while_it_starts_loses_nothing(sweep, cluster):
    """SIGUSR1 reaches the process while torch is being imported: before, that ended it."""
    assert sweep.submit("budgets=[2e10]").code == 0
    job = sweep.job_ids()[0]
    wait_for(lambda: any(_listens(pid) for pid in sweep.processes()), sleep=0.02)
    for _ in range(8):
        cluster("scancel", "--signal=USR1", f"{job}", check=False)
    assert sweep.accounts() == [("COMPLETED", "0:0")]
    assert sweep.cell["state"] == "done" and sweep.cell["attempts"] >= 2, sweep.log


@pytest.mark.long  # SLURM counts time limits in minutes
def test_cells_longer_than_the_time_limit_chain_until_they_are_done(sweep, cluster):
    """Two of one array: one of its tasks has the array's own job id, and must not requeue the other.

    The signal comes half a minute after the start: the budget is one that no machine has trained by then.
    """
    assert sweep.submit("budgets=[7e11]", "seeds=[0,1]", launcher="partition=short timeout_min=1").code == 0
    assert sweep.accounts(seconds=500) == [("COMPLETED", "0:0")] * 2
    cells = sweep.status()
    assert [cell["state"] for cell in cells] == ["done"] * 2
    assert [cell["attempts"] >= 2 and cell["steps_redone"] == 0 for cell in cells] == [True] * 2, cells
    assert len(sweep.job_ids()) == 2  # requeued by themselves, not submitted again
    attempts = [json.loads((run / "env.json").read_text())["attempts"] for run in sweep.run_dirs]
    assert all("RESTART_COUNT" in tried[-1]["slurm"] for tried in attempts)


def test_two_ranks_on_two_nodes_agree_to_stop_and_survive_the_loss_of_one(sweep, cluster, undisturbed):
    on_two = ("trainer.strategy=fsdp2",)
    more = [word for one in on_two for word in ("--override", one)]
    assert sweep.submit(LONG, launcher="nodes=2 partition=grace", more=more).code == 0
    wait_for(sweep.trains)
    cluster(*RIVAL)
    wait_for(lambda: not sweep.trains())
    wait_for(lambda: read_status(sweep.run_dir).attempts == 2)
    wait_for(sweep.trains)
    assert read_status(sweep.run_dir).steps_redone == 0, sweep.log  # both wrote one checkpoint, and were requeued
    os.kill(min(sweep.processes(SLURM_PROCID=1)), signal.SIGKILL)
    assert sweep.accounts()[0][0] == "FAILED"
    assert sweep.cell["state"] == "failed", sweep.cell
    assert sweep.submit(LONG, launcher="nodes=2", more=more).code == 0
    sweep.accounts()
    result = read_result(sweep.run_dir)
    assert result is not None and (result.num_devices, result.attempts) == (2, 3), sweep.log
    assert result.loss == pytest.approx(read_result(undisturbed).loss, abs=1e-4)
