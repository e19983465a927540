"""Decide which cells are worth starting again."""

from __future__ import annotations

from dlm.record.outcomes import OUTCOMES, Retry, State
from dlm.submit.cell_now import CellNow
from dlm.submit.job import Resources, SlurmSettings

MAX_FAILURES = 3  # consecutive failures of unknown cause after which a cell is left alone


MAX_UNATTENDED = 10  # submissions of a cell after which the follower of a sweep leaves it alone


def why_not(now: CellNow, *, retry_failed: bool, unattended: bool = False) -> str | None:
    """Return the reason why a cell is not started; None if it is to be started.

    Args:
        now: The current state of the cell.
        retry_failed: Start a failed cell whatever the cause of the failure.
        unattended: Nobody has asked to start this cell now: one that somebody cancelled stays so, and one that was
            submitted many times is left alone.
    """
    outcome = OUTCOMES[now.state]
    if now.state is State.DONE:
        return "done"
    if outcome.retry is Retry.LEAVE:
        return f"{now.state}: {now.reason}"
    if unattended and now.state is State.CANCELLED:
        return f"{now.state}: {now.reason}"
    if unattended and now.record.submissions >= MAX_UNATTENDED:
        return f"it was submitted {now.record.submissions} times and is not done ({now.reason}): submit it by hand"
    if retry_failed:
        return None
    if outcome.retry is Retry.ASK:
        return f"{now.state} ({now.reason}): {outcome.advice}"
    failures = consecutive_failures(now)
    if outcome.retry is Retry.LIMITED and failures >= MAX_FAILURES:
        return f"failed {failures} times ({now.reason}): see `dlm logs`, or --retry-failed"
    return None


def consecutive_failures(now: CellNow) -> int:
    """Return the number of consecutive failures of a failed cell without progress, including the last failure."""
    step = now.status.step if now.status is not None else 0
    return 1 + (now.record.failures if step <= now.record.failed_at else 0)


def why_memory_stays_short(
    now: CellNow, resources: Resources, settings: SlurmSettings, *, micro_batch: int | None
) -> str | None:
    """Return the reason why a cell would run out of memory again; None if another attempt is worthwhile.

    Args:
        now: The current state of a cell that ran out of memory.
        resources: The resources that the next job of the cell requests.
        settings: The launcher's keys.
        micro_batch: The smaller micro-batch of the next job; None if the previous job used a single sequence.
    """
    if now.is_host_oom and resources.gpus_per_node and settings.mem_gb is None:  # a smaller one saves GPU memory
        return f"{now.reason}: that is memory of the host, raise hydra.launcher.mem_gb"
    if micro_batch is None:
        return f"out of memory ({now.reason}) with one sequence at a time: use more devices"
    return None
