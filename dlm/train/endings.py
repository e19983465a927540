"""Determine how an attempt at a run ended from the exception that ended it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dlm.core import signals
from dlm.core.errors import DivergedError, ExitCode, UserError, causes
from dlm.core.files import DISK_FULL
from dlm.record.outcomes import OUTCOMES, State

# A plain RuntimeError with one of these texts means that memory ran out.
NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The outcome of one attempt at a run."""

    state: State
    reason: str | None = None  # the reason in status.json
    complaint: str | None = None  # a line that is printed to standard error
    is_raised: bool = False  # whether the exception is raised again, so that the caller shows it

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of a process that ends in this state."""
        code = OUTCOMES[self.state].exit_code
        assert code is not None
        return code


DONE = Ending(state=State.DONE)
STOPPED = Ending(state=State.PREEMPTED)  # by a signal, to be continued; its reason is the step


def ending_of(error: BaseException, run_dir: Path) -> Ending:
    """Return the outcome of the attempt at the run in ``run_dir`` that raised ``error``."""
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):  # Lightning turns it into SystemExit
        return STOPPED
    if isinstance(error, UserError):
        return Ending(state=State.BAD_CONFIG, reason=str(error), is_raised=True)
    if isinstance(error, DivergedError):
        return Ending(state=State.DIVERGED, reason=str(error), complaint=str(error))
    line = str(error).split("\n")[0]
    says_so = isinstance(error, RuntimeError) and any(words in line for words in NO_MEMORY)
    if says_so or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        reason = line or "MemoryError"
        complaint = f"out of memory: {reason}: lower data.micro_batch_size"
        return Ending(state=State.OUT_OF_MEMORY, reason=reason, complaint=complaint)
    if disk_full(error):
        reason = f"no space left on the disk of {run_dir}: make room and start it again, whole checkpoints stay"
        return Ending(state=State.FAILED, reason=reason, complaint=reason)
    if isinstance(error, ConnectionError) and signals.asked_to_stop():
        # The signal also reached W&B's process, which ended before this process could take a step.
        return Ending(state=State.PREEMPTED, reason="stopped by a signal while it started")
    return Ending(state=State.FAILED, reason=f"{type(error).__name__}: {line}", is_raised=True)


def disk_full(error: BaseException) -> bool:
    """Return whether a full disk or an exhausted quota caused an exception."""
    return any(isinstance(cause, OSError) and cause.errno in DISK_FULL for cause in causes(error))
