"""A cell on one process and on two, ddp and FSDP2 over gloo: the same losses, and checkpoints that fit all of them.

That ddp goes on from one process and one process from ddp is tested in `make test-long` only.
"""

import subprocess
import sys

import pytest
import torch
from support.runs import launch_here, losses
from support.two_processes import train_on_two

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
    name: (  # accumulated twice on each
        "trainer.devices=2",
        f"trainer.strategy={name}",
        "data.micro_batch_size=2",
        "trainer.cross_entropy=chunked",
    )
    for name in ("ddp", "fsdp")
}
ROUNDING = {"train/loss": 1e-6, "val/loss": 1e-6, "grad_norm": 1e-5}  # relative, over 40 steps; seen: 3e-7

pytestmark = pytest.mark.slow


def arguments(folder, name, *overrides, start=None):
    where = (f"paths.run_dir={folder}/{name}", f"paths.workdir={folder}")
    first = () if start is None else (f"ckpt_path={folder}/{start[0]}/checkpoints/step_{start[1]:08d}",)
    return [*CELL, *where, *first, *overrides]


@pytest.fixture(scope="module")
def folder(stdlib_data, tmp_path_factory):
    """A folder with the runs of the cell, in folders of their own.

    `one` and `back` are trained by one process, all others by two. `two-ddp` starts its second process itself; the
    others are trained one after the other by the same two processes.
    """
    folder = tmp_path_factory.mktemp("topology")
    launch_here(folder, *arguments(folder, "one"))
    command = [sys.executable, "-m", "dlm.launch", *arguments(folder, "two-ddp", *TWO["ddp"])]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    train_on_two(
        arguments(folder, "two-fsdp", *TWO["fsdp"]),
        arguments(folder, "there", *TWO["fsdp"], start=("one", 20)),
    )
    launch_here(folder, *arguments(folder, "back", start=("there", 30)))
    return folder


def assert_equal_but_for_rounding(run_dir, truth):
    rows, true_rows = losses(run_dir, tuple(ROUNDING)), losses(truth, tuple(ROUNDING))
    for step, row in rows.items():
        assert row.keys() == true_rows[step].keys()
        for name, value in row.items():
            assert value == pytest.approx(true_rows[step][name], rel=ROUNDING[name]), (step, name)
    return list(rows)


@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_compute_what_one_does(strategy, folder):
    two = folder / f"two-{strategy}"
    assert assert_equal_but_for_rounding(two, folder / "one") == list(range(1, 41))
    result = read_result(two)
    assert result is not None and result.num_devices == 2


def test_a_sharded_run_goes_on_from_one_process_and_one_process_from_it(folder):
    assert min(assert_equal_but_for_rounding(folder / "there", folder / "one")) == 21
    assert min(assert_equal_but_for_rounding(folder / "back", folder / "one")) == 31


@pytest.mark.long  # more starts of two processes
def test_a_sharded_run_goes_on_bit_for_bit_and_also_under_ddp(folder):
    start = ("two-fsdp", 30)
    train_on_two(
        arguments(folder, "other", *TWO["ddp"], start=start),
        arguments(
            folder, "whole-model", *TWO["fsdp"], "trainer.strategy=fsdp2", "trainer.fsdp_wrap=model", start=start
        ),
        arguments(folder, "there-ddp", *TWO["ddp"], start=("one", 20)),
    )
    launch_here(folder, *arguments(folder, "back-ddp", start=("there-ddp", 30)))
    assert min(assert_equal_but_for_rounding(folder / "there-ddp", folder / "one")) == 21
    assert min(assert_equal_but_for_rounding(folder / "back-ddp", folder / "one")) == 31
    again = arguments(folder, "again", *TWO["fsdp"], "callbacks.checkpoint.asynchronous=true", start=start)
    train_on_two(again)
    whole, again = folder / "two-fsdp", folder / "again"
    rows = losses(whole, tuple(ROUNDING))
    assert losses(again, tuple(ROUNDING)) == {step: rows[step] for step in range(31, 41)}
    states = [torch.load(state_file(run / "checkpoints/step_00000040"), weights_only=True) for run in (whole, again)]
    parts = [(state["state_dict"], state["optimizer_states"][0]["state"]) for state in states]
    torch.testing.assert_close(*parts, rtol=0, atol=0)  # parameters and moments of the optimiser
    for name in ("other", "whole-model"):
        assert_equal_but_for_rounding(folder / name, whole)
