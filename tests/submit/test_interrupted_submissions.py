"""Submissions to a stand-in for SLURM that are cut off at every step, and their repair."""

import pytest
from support.slurm_stand_in import end
from support.submissions import make_plan, state_of, submit

from dlm.core.errors import UserError
from dlm.record.outcomes import State
from dlm.submit.executor import Executor
from dlm.submit.ledger import Ledger
from dlm.submit.slurm import Slurm
from dlm.submit.slurm_commands import NoAnswerError


class Killed(BaseException):
    """In place of SIGKILL."""


@pytest.mark.parametrize("moment", ["before the intent", "before sbatch", "after sbatch", "in the ledger's line"])
def test_a_submission_cut_off_anywhere_is_repaired_by_the_next(slurm, sweep_dir, monkeypatch, moment):
    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "before the intent":
            patch.setattr(Ledger, "intent", die)
        elif moment == "before sbatch":
            patch.setattr(Executor, "send", die)
        else:
            patch.setattr(Ledger, "submitted", die)
        submit(make_plan("a", "b"), sweep_dir, Slurm())
    if moment == "in the ledger's line":
        with open(Ledger(sweep_dir).path, "a") as stream:
            stream.write('{"event": "submitted", "time": 1.0, "subm')
    taken = moment in ("after sbatch", "in the ledger's line")
    assert state_of(sweep_dir, "b")[0] is (State.SUBMITTED if taken else State.PLANNED)
    if taken and moment == "after sbatch":  # one of them is over before anybody looks
        end(slurm, "1001_0", "FAILED|3:0")
    done = submit(make_plan("a", "b"), sweep_dir, Slurm())
    assert set(done.submitted) == (set() if taken else {"a", "b"})
    assert Ledger(sweep_dir).read()["b"].job_id == "1001_1" and len(list(slurm.glob("*.script"))) == 1
    assert submit(make_plan("b"), sweep_dir, Slurm()).submitted == ()


def test_a_cut_off_submission_waits_until_slurm_answers(slurm, sweep_dir, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Ledger, "submitted", lambda *_: (_ for _ in ()).throw(Killed))
        submit(make_plan("a"), sweep_dir, Slurm())
    (slurm / "down").touch()
    assert "cut off" in submit(make_plan("a"), sweep_dir, Slurm()).skipped["a"]
    (slurm / "down").unlink()
    assert "PENDING" in submit(make_plan("a"), sweep_dir, Slurm()).skipped["a"]


def test_a_submission_that_timed_out_while_slurm_was_deaf_is_looked_up_later(slurm, sweep_dir, monkeypatch):
    took = Executor.send

    def time_out(self, script):
        took(self, script)
        (slurm / "down").touch()
        raise NoAnswerError("sbatch did not answer within 60 s")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="did not answer"):
        patch.setattr(Executor, "send", time_out)
        submit(make_plan("a"), sweep_dir, Slurm())
    (slurm / "down").unlink()
    assert "PENDING" in submit(make_plan("a"), sweep_dir, Slurm()).skipped["a"]


def test_an_sbatch_that_fails_after_slurm_took_the_job_is_no_refusal(slurm, sweep_dir, monkeypatch):
    took = Executor.send

    def time_out(self, script):
        took(self, script)
        raise NoAnswerError("sbatch did not answer within 60 s")

    monkeypatch.setattr(Executor, "send", time_out)
    assert submit(make_plan("a"), sweep_dir, Slurm()).job_ids == {"a": "1001_0"}
