"""One cell on one process and on two, ddp and FSDP2 over gloo: the same losses, and checkpoints that fit them all."""

import pytest
import torch

from dlm.core.files import read_jsonl
from dlm.record.run import merge_metrics, read_result
from dlm.train.checkpoint_files import state_file

# Every gradient is clipped, by its norm over all shards; norms are not decayed, so that the optimiser has its
# parameters in another order than the model.
CELL = ("experiment=debug", "logger=none", "model=4k", "model.qk_norm=true", "data.block_size=32", "training.steps=40",
        "validation.num_sequences=15", "validation.draws=2", "optimizer.decay=matrices",
        "optimizer.gradient_clip_val=0.05", "callbacks.checkpoint.every_n_steps=10",
        "callbacks.checkpoint.save_top_k=9")  # fmt: skip
TWO = {name: ("trainer.devices=2", f"trainer.strategy={name}") for name in ("ddp", "fsdp2")}
ROUNDING = {"train/loss": 1e-6, "val/loss": 1e-6, "grad_norm": 1e-5}  # relative, over 40 steps; seen: 3e-7

pytestmark = pytest.mark.slow


def rows_of(run_dir):
    return {row["step"]: {name: row[name] for name in ROUNDING if name in row}
            for row in merge_metrics(read_jsonl(run_dir / "metrics.jsonl"))}  # fmt: skip


def assert_the_same(rows, truth):
    for step, row in rows.items():
        assert row.keys() == truth[step].keys()
        for name, value in row.items():
            assert value == pytest.approx(truth[step][name], rel=ROUNDING[name]), (step, name)


def same_states(*checkpoints):
    """Parameters and moments of the optimiser, bit for bit."""
    states = [torch.load(state_file(path), weights_only=True) for path in checkpoints]
    parts = [(state["state_dict"], state["optimizer_states"][0]["state"]) for state in states]
    torch.testing.assert_close(*parts, rtol=0, atol=0)


@pytest.fixture
def run(command, launch, stdlib_data, workdir):
    """Trains in a folder, from a step of another where asked; its rows."""

    def train(name, *overrides, start=None):
        where = (*CELL, f"paths.run_dir={workdir}/{name}", *overrides)
        if start is not None:
            where = (*where, f"ckpt_path={workdir}/{start[0]}/checkpoints/step_{start[1]:08d}")
        ended = command("dlm.launch", *where) if "trainer.devices=2" in overrides else launch(*where)
        assert ended.code == 0, ended.err
        return rows_of(workdir / name)

    return train


@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_compute_what_one_does(strategy, run, workdir):
    """Whatever the micro-batch; and a run begun on one kind of machine goes on, and ends, on another."""
    one = run("one")
    two = run("two", *TWO[strategy], "data.micro_batch_size=2")  # accumulated twice on each
    assert two.keys() == one.keys() == set(range(1, 41))
    assert_the_same(two, one)
    result = read_result(workdir / "two")
    assert result is not None and result.num_devices == 2
    there = run("there", *TWO[strategy], start=("one", 20))
    back = run("back", start=("there", 30))
    assert min(there) == 21 and min(back) == 31
    assert_the_same(there, one)
    assert_the_same(back, one)


def test_a_sharded_run_goes_on_bit_for_bit_and_under_ddp(run, workdir):
    whole = run("whole", *TWO["fsdp2"])
    again = run("again", *TWO["fsdp2"], "callbacks.checkpoint.asynchronous=true", start=("whole", 30))
    assert again == {step: whole[step] for step in range(31, 41)}
    same_states(*(workdir / name / "checkpoints" / "step_00000040" for name in ("whole", "again")))
    other = run("other", *TWO["ddp"], start=("whole", 30))
    assert_the_same(other, whole)
