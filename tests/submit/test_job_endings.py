"""What becomes of a cell whose job ended on a stand-in for SLURM."""

import dataclasses
import os
import time

import pytest
from support.slurm_stand_in import end
from support.stub_cell import status
from support.submissions import make_plan, run_dir, state_of, submission_of, submit

from dlm.record.outcomes import State
from dlm.record.run import write_status
from dlm.submit.slurm import Slurm


@pytest.mark.parametrize(
    ("said", "state", "again"),
    [
        ("FAILED|1:0", State.FAILED, True),
        ("FAILED|2:0", State.BAD_CONFIG, False),
        ("FAILED|4:0", State.OUT_OF_MEMORY, True),
        ("OUT_OF_MEMORY|0:125", State.OUT_OF_MEMORY, True),
        ("FAILED|0:53", State.LOST, True),
        ("NODE_FAIL|0:0", State.LOST, True),
        ("TIMEOUT|0:0", State.PREEMPTED, True),
        ("CANCELLED by 1000|0:15", State.CANCELLED, True),
        ("COMPLETED|0:0", State.LOST, True),  # without a result
    ],
)
def test_how_slurm_ended_a_silent_cell_decides_about_the_next_try(slurm, sweep_dir, said, state, again):
    submit(make_plan("a"), sweep_dir, Slurm())
    end(slurm, "1001_0", said)
    assert state_of(sweep_dir, "a")[0] is state
    assert bool(submit(make_plan("a"), sweep_dir, Slurm()).submitted) is again


def test_the_cells_own_last_word_wins_where_slurm_saw_it_end_that_way(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    said = status(State.DIVERGED, exit_code=3, reason="loss is nan", submission=submission_of(sweep_dir, "a"))
    write_status(run_dir(sweep_dir, "a"), said)
    end(slurm, "1001_0", "FAILED|3:0")
    assert state_of(sweep_dir, "a") == (State.DIVERGED, "loss is nan")
    (slurm / "1001_0.ended").write_text("CANCELLED by 0|0:15")
    assert state_of(sweep_dir, "a")[0] is State.CANCELLED
    submit(make_plan("a"), sweep_dir, Slurm(), retry_failed=True)
    end(slurm, "1002_0", "NODE_FAIL|0:0")  # before the cell could say anything
    assert state_of(sweep_dir, "a") == (State.LOST, "job 1002_0: SLURM says NODE_FAIL")


@pytest.mark.parametrize("hours", [-24, 24])
def test_clocks_that_differ_between_nodes_change_nothing(slurm, sweep_dir, hours):
    submit(make_plan("a", "b"), sweep_dir, Slurm())
    for name in "ab":
        then = time.time() + 3600 * hours
        said = status(State.DIVERGED, exit_code=3, reason="loss is nan", submission=submission_of(sweep_dir, name))
        write_status(run_dir(sweep_dir, name), dataclasses.replace(said, started=then, updated=then))
        end(slurm, f"1001_{'ab'.index(name)}", "FAILED|3:0")
    assert state_of(sweep_dir, "a") == (State.DIVERGED, "loss is nan")
    submit(make_plan("b"), sweep_dir, Slurm(), retry_failed=True)
    end(slurm, "1002_0", "FAILED|4:0")
    assert state_of(sweep_dir, "b")[0] is State.OUT_OF_MEMORY  # the status is of the submission before


def test_a_run_by_hand_after_the_job_has_the_last_word(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    (sweep_dir / "ledger/1001_0_0_log.out").touch()
    os.utime(sweep_dir / "ledger/1001_0_0_log.out", (1, 1))
    end(slurm, "1001_0", "FAILED|2:0")
    assert state_of(sweep_dir, "a")[0] is State.BAD_CONFIG
    write_status(run_dir(sweep_dir, "a"), status(State.PREEMPTED, exit_code=75, reason="by Ctrl-C"))
    assert state_of(sweep_dir, "a") == (State.PREEMPTED, "by Ctrl-C")


def test_a_job_that_slurm_has_forgotten_is_lost(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    (slurm / "1001_0.live").unlink()
    assert state_of(sweep_dir, "a")[0] is State.LOST
