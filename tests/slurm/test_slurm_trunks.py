"""Cells that share a trunk on a real SLURM: the branches wait for their trunk, and nothing disturbs the losses."""

import pytest
from support.slurm_sweep import curve, wait_for

from dlm.record.run import read_result

pytestmark = [pytest.mark.slurm, pytest.mark.long]

SHARED = ("branches=true", "groups.scheduler=wsd", "scheduler.warmup_tokens_per_param=1", "budgets=[2e10,4e10,9e10]")


def test_branches_start_when_their_trunk_has_ended_and_have_the_losses_of_their_own_runs(make_sweep, cluster):
    shared, apart = make_sweep("shared"), make_sweep("apart")
    assert shared.submit(*SHARED).code == 0
    wait_for(lambda: "RUNNING" in shared.queued())
    assert sorted(shared.queued()) == ["PENDING", "PENDING", "RUNNING"]  # the trunk alone
    assert shared.accounts(seconds=600) == [("COMPLETED", "0:0")] * 3
    assert apart.submit(*("branches=false" if word.startswith("branches") else word for word in SHARED)).code == 0
    assert apart.accounts(seconds=600) == [("COMPLETED", "0:0")] * 3
    branches = 0
    for ours, theirs in zip(shared.run_dirs, apart.run_dirs, strict=True):
        assert ours.name == theirs.name
        assert read_result(ours).loss == read_result(theirs).loss
        here, there = curve(ours), curve(theirs)
        first = min(here)
        if first > min(there):
            branches += 1
            for rows in (here, there):  # the mean over the steps since the row before, which are fewer in a branch
                rows[first].pop("train/loss")
        assert here == {step: there[step] for step in here}
    assert branches == 2
