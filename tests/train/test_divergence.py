"""When a run has diverged, and when its loss is only noisy."""

import math

import numpy as np
from support.runs import SHORT, TINY, losses, only_run

from dlm.core.errors import DivergedError
from dlm.record.outcomes import State
from dlm.record.run import (
    read_result,
    read_status,
)
from dlm.train.callbacks.record_writer import Spike


def test_a_loss_that_is_nan_ends_the_run_with_exit_code_3(launch, workdir):
    ended = launch(*SHORT, "optimizer.lr=1e6")
    status = read_status(only_run(workdir))
    assert ended.code == 3 and "loss is nan" in ended.err
    assert status is not None and status.state is State.DIVERGED and "loss is nan at step" in str(status.reason)
    assert str(status.reason).endswith("with attention auto")
    assert read_result(only_run(workdir)) is None
    assert all(math.isfinite(value) for row in losses(only_run(workdir)).values() for value in row.values())


def test_a_loss_that_rises_for_good_ends_the_run_with_exit_code_3(launch, workdir):
    """The learning rate jumps by far in the middle of a run that had learnt."""
    ended = launch(*TINY, "training.steps=200", "optimizer.lr=3.0", "scheduler.warmup_fraction=0.9",
                   "optimizer.gradient_clip_val=null")  # fmt: skip
    status = read_status(only_run(workdir))
    assert ended.code == 3 and status is not None and status.state is State.DIVERGED
    assert "the training loss rose to" in str(status.reason) and "more than 2.00 higher" in str(status.reason)
    calm = launch(*TINY, "training.steps=200", "optimizer.lr=3.0", "scheduler.warmup_fraction=0.9", "sweep=never",
                  "optimizer.gradient_clip_val=null", "callbacks.record.spike=null")  # fmt: skip
    assert calm.code == 0


def test_a_spike_is_told_from_noise():
    noise = np.random.default_rng(0)

    def steps_until_divergence(losses, limit=2.0):
        spike = Spike(limit)
        for step, loss in enumerate(losses):
            try:
                spike.check(loss, vocab_size=256, step=step)
            except DivergedError:
                return step
        return None

    for _ in range(200):  # a learning curve as noisy as the smallest batches are: heavy tails to one side
        curve = 2.5 + 3 * np.exp(-np.arange(400) / 40)
        assert steps_until_divergence(curve * noise.lognormal(0, 0.2, 400)) is None
    calm, lost = np.full(100, 2.5), np.full(20, 5.5)
    assert steps_until_divergence([*calm, *lost]) == 103  # four of five: 4.9 is above 2.5 + 2
    assert steps_until_divergence([*calm, 30.0, *calm]) == 100  # one step as bad as five
    assert steps_until_divergence([*calm, 5.5, 5.5, *calm]) is None
    assert steps_until_divergence([*calm, *lost], limit=None) is None
