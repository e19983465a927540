"""The states of a cell, and what follows from each state: exit code, retry rule and advice to the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from dlm.core.errors import ExitCode


class State(StrEnum):
    """The state of a cell: what its run is doing, or how the run ended."""

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


class Retry(StrEnum):
    """What the next `dlm submit` does with a cell."""

    LEAVE = "leave it alone"
    START = "start it"
    HALVE = "start it with half the micro-batch"
    LIMITED = "start it, until it has failed several times without getting further"
    ASK = "start it only with --retry-failed"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that follows from the state of a cell."""

    retry: Retry
    advice: str  # what the user should do about a cell that has no result
    exit_code: ExitCode | None = None  # the exit code of a process that ends in this state
    is_failure: bool = False  # whether something went wrong, so that the reason is worth keeping


OUTCOMES: Mapping[State, Outcome] = {
    State.PLANNED: Outcome(retry=Retry.START, advice="submit it"),
    State.SUBMITTED: Outcome(retry=Retry.LEAVE, advice="wait, then collect again"),
    State.RUNNING: Outcome(retry=Retry.LEAVE, advice="wait, then collect again"),
    State.DONE: Outcome(retry=Retry.LEAVE, advice="nothing", exit_code=ExitCode.DONE),
    State.PREEMPTED: Outcome(retry=Retry.START, advice="submit again", exit_code=ExitCode.PREEMPTED),
    State.CANCELLED: Outcome(retry=Retry.START, advice="submit again"),
    State.LOST: Outcome(retry=Retry.START, advice="submit again", is_failure=True),
    State.OUT_OF_MEMORY: Outcome(
        retry=Retry.HALVE,
        advice="submit again: it is tried with half the micro-batch",
        exit_code=ExitCode.OUT_OF_MEMORY,
        is_failure=True,
    ),
    State.FAILED: Outcome(
        retry=Retry.LIMITED,
        advice="see its log (`dlm logs`), then submit again",
        exit_code=ExitCode.BUG,
        is_failure=True,
    ),
    State.DIVERGED: Outcome(
        retry=Retry.ASK,
        advice="lower optimizer.lr in the definition, or submit with --retry-failed",
        exit_code=ExitCode.DIVERGED,
        is_failure=True,
    ),
    State.BAD_CONFIG: Outcome(
        retry=Retry.ASK,
        advice="mend the definition or its overrides, then submit with --retry-failed",
        exit_code=ExitCode.USER_ERROR,
        is_failure=True,
    ),
}
_BY_EXIT_CODE = {int(one.exit_code): state for state, one in OUTCOMES.items() if one.exit_code is not None}


def state_of_exit(exit_code: int) -> State:
    """Return the state that follows from the exit code of a process.

    Args:
        exit_code: The exit code as ``subprocess`` returns it. A negative code is the number of the signal that ended
            the process and means LOST. A code that dlm does not use means FAILED.
    """
    return State.LOST if exit_code < 0 else _BY_EXIT_CODE.get(exit_code, State.FAILED)


def goes_on(state: State) -> bool:
    """Whether the next submission continues a cell that has ended in this state, without being asked to."""
    return OUTCOMES[state].retry in (Retry.START, Retry.HALVE, Retry.LIMITED)


def names_cause(exit_code: int | None) -> bool:
    """Whether an exit code states why a cell failed or stopped: true for the codes in OUTCOMES except DONE and BUG."""
    return exit_code in _BY_EXIT_CODE.keys() - {ExitCode.DONE, ExitCode.BUG}
