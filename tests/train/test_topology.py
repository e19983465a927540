"""A cell on one process and on two, ddp and FSDP2 over gloo: the same losses, and checkpoints that fit all of them."""

import subprocess
import sys

import pytest
import torch
from support.runs import losses

from dlm.core.paths import PACKAGE
from dlm.record.run import read_result
from dlm.train.checkpoint_files import state_file

# Every gradient is clipped, by its norm over all shards; norms are not decayed, so that the optimiser has its
# parameters in another order than the model.
CELL = ("experiment=debug", "logger=none", "model=4k", "model.qk_norm=true", "data.block_size=32", "training.steps=40",
        "validation.num_sequences=15", "validation.draws=2", "optimizer.decay=matrices",
        "optimizer.gradient_clip_val=0.05", "callbacks.checkpoint.every_n_steps=10",
        "callbacks.checkpoint.save_top_k=9")  # fmt: skip
TWO = {
    name: ("trainer.devices=2", f"trainer.strategy={name}", "data.micro_batch_size=2")  # accumulated twice on each
    for name in ("ddp", "fsdp2")
}
ROUNDING = {"train/loss": 1e-6, "val/loss": 1e-6, "grad_norm": 1e-5}  # relative, over 40 steps; seen: 3e-7

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(stdlib_data, tmp_path_factory):
    """Trains the cell in a folder of that name, once for all tests, from a step of another one where asked."""
    folder = tmp_path_factory.mktemp("topology")

    def run(name, *overrides, start=None):
        where = [*CELL, f"paths.run_dir={folder}/{name}", f"paths.workdir={folder}", *overrides]
        if start is not None:
            where.append(f"ckpt_path={folder}/{start[0]}/checkpoints/step_{start[1]:08d}")
        if not (folder / name).exists():
            command = [sys.executable, "-m", "dlm.launch", *where]
            done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        return folder / name

    return run


def assert_equal_but_for_rounding(run_dir, truth):
    rows, true_rows = losses(run_dir, tuple(ROUNDING)), losses(truth, tuple(ROUNDING))
    for step, row in rows.items():
        assert row.keys() == true_rows[step].keys()
        for name, value in row.items():
            assert value == pytest.approx(true_rows[step][name], rel=ROUNDING[name]), (step, name)
    return list(rows)


@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_compute_what_one_does_and_each_goes_on_from_the_other(strategy, train):
    one = train("one")
    two = train(f"two-{strategy}", *TWO[strategy])
    assert assert_equal_but_for_rounding(two, one) == list(range(1, 41))
    result = read_result(two)
    assert result is not None and result.num_devices == 2
    there = train(f"there-{strategy}", *TWO[strategy], start=("one", 20))
    back = train(f"back-{strategy}", start=(f"there-{strategy}", 30))
    assert min(assert_equal_but_for_rounding(there, one)) == 21
    assert min(assert_equal_but_for_rounding(back, one)) == 31


def test_a_sharded_run_goes_on_bit_for_bit_and_also_under_ddp(train):
    whole = train("two-fsdp2", *TWO["fsdp2"])
    asynchronous = "callbacks.checkpoint.asynchronous=true"
    again = train("again", *TWO["fsdp2"], asynchronous, start=("two-fsdp2", 30))
    rows = losses(whole, tuple(ROUNDING))
    assert losses(again, tuple(ROUNDING)) == {step: rows[step] for step in range(31, 41)}
    states = [torch.load(state_file(run / "checkpoints/step_00000040"), weights_only=True) for run in (whole, again)]
    parts = [(state["state_dict"], state["optimizer_states"][0]["state"]) for state in states]
    torch.testing.assert_close(*parts, rtol=0, atol=0)  # parameters and moments of the optimiser
    other = train("other", *TWO["ddp"], start=("two-fsdp2", 30))
    assert_equal_but_for_rounding(other, whole)
