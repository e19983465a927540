"""The error that ended an attempt decides its state, its exit code and what the user reads."""

import errno
import time
from types import SimpleNamespace

import pytest
import torch

from dlm.core import signals
from dlm.core.errors import DivergedError, ExitCode, UserError
from dlm.record.outcomes import State
from dlm.record.run import Status, read_status, write_status
from dlm.train.endings import DONE, STOPPED, Ending, ending_of
from dlm.train.run import _record_ending


def caused_by(error, cause):
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")
CASES = {
    "a mistake of the user": (UserError("lr is -1"), State.BAD_CONFIG, 2, "lr is -1", True),
    "divergence": (DivergedError("the loss is nan"), State.DIVERGED, 3, "the loss is nan", False),
    "CUDA memory": (torch.OutOfMemoryError("CUDA out of memory\nTried"), State.OUT_OF_MEMORY, 4, "CUDA out of", False),
    "host memory": (MemoryError(), State.OUT_OF_MEMORY, 4, "MemoryError", False),
    "memory in words": (RuntimeError("x: can't allocate memory"), State.OUT_OF_MEMORY, 4, "can't allocate", False),
    "a full disk": (caused_by(RuntimeError("writer"), FULL), State.FAILED, 1, "no space left on the disk of r", False),
    "any other error": (KeyError("a\nb"), State.FAILED, 1, "KeyError: 'a", True),
    "a lost connection": (ConnectionError("gone"), State.FAILED, 1, "ConnectionError: gone", True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_decides_how_an_attempt_ended(case, tmp_path):
    error, state, code, words, is_raised = CASES[case]
    ending = ending_of(error, tmp_path.with_name("r"))
    assert (ending.state, ending.exit_code, ending.is_raised) == (state, code, is_raised)
    assert ending.reason is not None and "\n" not in ending.reason
    assert words.replace("of r", f"of {tmp_path.with_name('r')}") in ending.reason
    assert (ending.complaint is None) == is_raised  # the user reads either the complaint or the exception


def test_a_signal_that_ends_wandb_first_is_a_preemption(tmp_path):
    signals.note(15)
    try:
        ending = ending_of(ConnectionError("gone"), tmp_path)
    finally:
        signals.forget()
    assert (ending.state, ending.exit_code, ending.is_raised) == (State.PREEMPTED, ExitCode.PREEMPTED, False)
    assert (DONE.exit_code, STOPPED.exit_code) == (ExitCode.DONE, ExitCode.PREEMPTED)


@pytest.mark.parametrize(("since_sec", "kept"), [(-10, True), (10, False)])
def test_a_cause_that_another_process_of_the_attempt_recorded_is_kept(since_sec, kept, tmp_path, monkeypatch):
    """Out of memory in one process ends the others with errors that are only its consequence."""
    monkeypatch.setenv("DLM_SUBMISSION", "s")
    now = time.time()
    cause = Status(state=State.OUT_OF_MEMORY, step=3, steps=40, attempts=1, submission="s", started=now, updated=now)
    write_status(tmp_path, cause)
    ending = Ending(state=State.FAILED, reason="RuntimeError: a collective failed", is_raised=True)
    _record_ending(
        tmp_path, SimpleNamespace(steps=40), ending, now + since_sec
    )  # an earlier attempt's record is no cause
    assert (read_status(tmp_path) == cause) == kept
