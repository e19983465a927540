"""How cells end on a real SLURM, and that SLURM, the run directory and `dlm status` say the same of it."""

import json
import os
import signal
import subprocess

import pytest
from support.slurm_sweep import LONG, SHORT, Sweep, curve, wait_for

from dlm.record.run import read_result, read_status

pytestmark = pytest.mark.slurm


def pid_of(sweep: Sweep) -> int:
    """The process that trains the only cell."""
    return int(json.loads((sweep.run_dir / "lease.json").read_text())["pid"])


def test_a_failing_cell_is_failed_with_its_own_exit_code(make_sweep):
    ways = {
        "bug": (["+callbacks.t._target_=lightning.pytorch.callbacks.BatchSizeFinder"], "budgets=[2e10]", 1, "failed"),
        "wrong": (["+trainer.nonsense=1"], "budgets=[2e10]", 2, "bad_config"),
        "hot": ([], "optimizer.lr=1e4", 3, "diverged"),
    }
    sweeps = {name: make_sweep(name) for name in ways}
    for name, (overrides, setting, *_) in ways.items():
        extra = ["budgets=[4e10]", "optimizer.gradient_clip_val=null"] if name == "hot" else []
        more = [word for override in overrides for word in ("--override", override)]
        assert sweeps[name].submit(setting, *extra, more=more).code == 0
    for name, (*_, code, state) in ways.items():
        sweep = sweeps[name]
        assert sweep.accounts() == [("FAILED", f"{code}:0")], name
        assert (sweep.cell["state"], bool(sweep.cell["reason"])) == (state, True)
        again = sweep.submit(ways[name][1], *(["budgets=[4e10]", "optimizer.gradient_clip_val=null"] * (name == "hot")))
        assert ("submitted 1 cell" in again.out) is (name == "bug"), again.out  # an unknown cause is tried again


def test_memory_that_runs_out_is_exit_code_4(cluster, command, stdlib_data, workdir):
    ended = command("dlm.launch", "-m", "experiment=debug", "logger=none", "model=170M", "model.vocab_size=256",
                    "hydra/launcher=submitit_slurm", "hydra.launcher.allow_dirty=true", "hydra.launcher.poll_sec=1",
                    "hydra.launcher.setup=['ulimit -v 3500000']")  # fmt: skip
    (run_dir,) = (workdir / "adhoc/runs").glob("mdm-*")
    assert ended.code == 4, ended.err + (run_dir / "log.txt").read_text()
    status = read_status(run_dir)
    assert (status.state, status.exit_code) == ("out_of_memory", 4) and "can't allocate memory" in status.reason


def test_a_cell_that_is_killed_goes_on_where_it_was_bit_for_bit(sweep, undisturbed):
    assert sweep.submit(LONG).code == 0
    wait_for(sweep.trains)
    os.kill(pid_of(sweep), signal.SIGKILL)
    assert sweep.accounts()[0][0] == "FAILED"
    assert sweep.cell["state"] == "failed" and "lost a process to SIGKILL" in sweep.cell["reason"]
    assert sweep.submit(LONG).code == 0
    sweep.accounts()
    assert sweep.cell["state"] == "done" and sweep.cell["attempts"] == 2
    assert curve(sweep.run_dir) == curve(undisturbed)
    assert read_result(sweep.run_dir).loss == read_result(undisturbed).loss


def test_a_node_that_dies_gives_its_cell_to_another_and_one_process_trains_it(sweep, cluster, undisturbed):
    assert sweep.submit(LONG).code == 0
    wait_for(sweep.trains)
    node = cluster("squeue", "-h", "-o", "%N").strip()
    cluster.stop(node, how=signal.SIGKILL)  # the cell itself trains on: SLURM does not know
    try:
        sweep.accounts()
    finally:
        cluster.start(node)
    assert read_result(sweep.run_dir) is not None, sweep.log
    assert sweep.cell["state"] == "done"
    assert curve(sweep.run_dir) == curve(undisturbed)
    wait_for(lambda: cluster("sinfo", "-h", "-N", "-n", node, "-p", "low", "-o", "%T").strip() == "idle")


def test_scancel_by_hand_is_cancelled_and_can_be_submitted_again(sweep, cluster):
    assert sweep.submit("budgets=[2e12]", more=["--override", "callbacks.checkpoint.every_n_steps=50"]).code == 0
    wait_for(sweep.trains)
    cluster("scancel", sweep.job_ids()[0])
    assert sweep.accounts()[0][0].startswith("CANCELLED")
    assert sweep.cell["state"] == "cancelled" and "SLURM says CANCELLED" in sweep.cell["reason"]
    assert "submitted 1 cell" in sweep.submit("budgets=[2e12]").out
    assert sweep.command("dlm.cli", "cancel", sweep.folder, "--yes").code == 0  # while it waits or has just begun
    wait_for(lambda: sweep.cell["state"] == "cancelled")


def test_with_accounting_down_every_state_is_still_seen(sweep, cluster):
    cluster.stop("slurmdbd")
    try:
        assert sweep.submit(LONG).code == 0
        wait_for(sweep.trains)
        assert sweep.cell["state"] == "running"
        os.kill(pid_of(sweep), signal.SIGKILL)
        wait_for(lambda: not sweep.queued())
        assert sweep.cell["state"] == "failed" and "lost a process to SIGKILL" in sweep.cell["reason"]
        assert "sacct failed" in sweep.command("dlm.cli", "status", sweep.folder).err
        bad = ["--override", "+trainer.nonsense=1"]
        assert "submitted 1 cell" in sweep.submit(LONG, more=bad).out
        wait_for(lambda: not sweep.queued())
        assert sweep.cell["state"] == "bad_config"
    finally:
        cluster.start("slurmdbd")
        wait_for(lambda: cluster("sacctmgr", "-n", "show", "cluster", check=False).strip())


def test_a_workdir_that_the_nodes_do_not_see_is_found_through_slurm(sweep, cluster):
    cluster("scontrol", "update", "PartitionName=low", "State=DOWN")
    hidden = sweep.folder.with_name("hidden")
    try:
        assert sweep.submit(SHORT).code == 0
        sweep.folder.rename(hidden)
        cluster("scontrol", "update", "PartitionName=low", "State=UP")
        wait_for(lambda: not cluster("squeue", "-h").strip())
    finally:
        cluster("scontrol", "update", "PartitionName=low", "State=UP")
    hidden.rename(sweep.folder)
    assert sweep.cell["state"] == "lost" and "do the nodes see the workdir?" in sweep.cell["reason"]
    assert "submitted 1 cell" in sweep.submit(SHORT).out


def test_a_job_that_never_starts_says_why(sweep):
    assert sweep.submit(SHORT, launcher="nodes=1 additional_parameters={begin:now+1hour}").code == 0
    wait_for(lambda: "BeginTime" in sweep.cell["reason"], sleep=1)
    assert sweep.cell["state"] == "submitted"
    said = sweep.command("dlm.cli", "logs", sweep.run_dir.name).complaint
    assert "has said nothing yet: it is submitted (SLURM says PENDING (BeginTime))" in said


def test_a_full_disk_costs_no_whole_checkpoint(sweep, undisturbed):
    """The run directory on a file system with room for two checkpoints and a half."""
    assert sweep.submit(LONG, launcher="additional_parameters={hold:null}").code == 0
    size = sum(path.stat().st_size for path in (undisturbed / "checkpoints").glob("*/state.ckpt")) // len(
        list((undisturbed / "checkpoints").iterdir())
    )
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={5 * size // 2 + 300_000}", "tmpfs", sweep.run_dir], check=True
    )
    try:
        sweep.cluster("scontrol", "release", sweep.job_ids()[0].split("_")[0])
        assert sweep.accounts()[0] == ("FAILED", "1:0"), sweep.log
        assert sweep.cell["state"] == "failed" and "no space left on the disk" in sweep.cell["reason"], sweep.log
        assert "Traceback" not in sweep.log, sweep.log
        kept = list((sweep.run_dir / "checkpoints").glob("step_*"))
        assert kept
        subprocess.run(["mount", "-o", "remount,size=100M", sweep.run_dir], check=True)
        assert sweep.submit(LONG).code == 0
        sweep.accounts()
        assert f"going on from {max(path.name for path in kept)}" in sweep.log
        assert curve(sweep.run_dir) == curve(undisturbed)
    finally:
        subprocess.run(["umount", "--lazy", sweep.run_dir], check=True)
