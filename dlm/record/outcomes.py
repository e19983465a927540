"""How a run can end: states, exit codes, whether it is tried again, and what to do about it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from dlm.core.errors import ExitCode

if TYPE_CHECKING:
    pass


class State(StrEnum):
    """What a cell is doing."""

    PLANNED = "planned"
    SUBMITTED = "submitted"
    RUNNING = "running"
    PREEMPTED = "preempted"
    DONE = "done"
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"
    BAD_CONFIG = "bad_config"
    LOST = "lost"
    CANCELLED = "cancelled"


BY_EXIT_CODE: dict[int, State] = {
    ExitCode.USER_ERROR: State.BAD_CONFIG,
    ExitCode.DIVERGED: State.DIVERGED,
    ExitCode.OUT_OF_MEMORY: State.OUT_OF_MEMORY,
    ExitCode.PREEMPTED: State.PREEMPTED,
}


FAILURES = (State.FAILED, State.OUT_OF_MEMORY, State.DIVERGED, State.BAD_CONFIG, State.LOST)


def state_of_exit(exit_code: int) -> State:
    """The state behind a non-zero exit code; one below zero is a signal: LOST."""
    return State.LOST if exit_code < 0 else BY_EXIT_CODE.get(exit_code, State.FAILED)


# States whose cause a second try does not remove.
NOT_AGAIN = {
    State.DIVERGED: "lower optimizer.lr",
    State.BAD_CONFIG: "mend the definition",
}


# What to do about a cell that has no result, by its state.
ADVICE = {
    State.PLANNED: "submit it",
    State.SUBMITTED: "wait, then collect again",
    State.RUNNING: "wait, then collect again",
    State.PREEMPTED: "submit again",
    State.LOST: "submit again",
    State.CANCELLED: "submit again",
    State.FAILED: "see its log.txt, then submit again",
    State.OUT_OF_MEMORY: "lower data.micro_batch_size, then submit with --retry-failed",
    State.DIVERGED: "lower optimizer.lr in the definition",
    State.BAD_CONFIG: "mend the definition or its overrides, then submit with --retry-failed",
}
