"""Decide which cells are worth starting again."""

from __future__ import annotations

from dlm.record.outcomes import OUTCOMES, Retry, State
from dlm.submit.job import Resources, SlurmSettings
from dlm.submit.ledger import CellNow

MAX_FAILURES = 3  # consecutive failures of unknown cause after which a cell is left alone


def why_not(now: CellNow, *, retry_failed: bool, max_failures: int = MAX_FAILURES) -> str | None:
    """Why a cell is not started; None when it is.

    Args:
        now: The cell.
        retry_failed: Start it whatever made it fail.
        max_failures: Leave it alone after so many consecutive failures of unknown cause.
    """
    outcome = OUTCOMES[now.state]
    if now.state is State.DONE:
        return "done"
    if outcome.retry is Retry.LEAVE:
        return f"{now.state}: {now.reason}"
    if retry_failed:
        return None
    if outcome.retry is Retry.ASK:
        return f"{now.state} ({now.reason}): {outcome.advice}"
    failures = consecutive_failures(now)
    if outcome.retry is Retry.LIMITED and failures >= max_failures:
        return f"failed {failures} times ({now.reason}): see `dlm logs`, or --retry-failed"
    return None


def consecutive_failures(now: CellNow) -> int:
    """How often a failed cell has failed in a row without getting any further, the last failure included."""
    step = now.status.step if now.status is not None else 0
    return 1 + (now.record.failures if step <= now.record.failed_at else 0)


def why_memory_stays_short(
    now: CellNow, resources: Resources, settings: SlurmSettings, *, micro_batch: int | None
) -> str | None:
    """Why a cell that ran out of memory would do so again; None when it is worth another try.

    Args:
        now: The cell.
        resources: What its next job asks for.
        settings: The launcher's keys.
        micro_batch: The smaller micro-batch of its next job; None when the last one was a single sequence.
    """
    if is_host_oom(now, resources, settings):
        return f"{now.reason}: that is memory of the host, raise hydra.launcher.mem_gb"
    if micro_batch is None:
        return f"out of memory ({now.reason}) with one sequence at a time: use more devices"
    return None


def is_host_oom(now: CellNow, resources: Resources, settings: SlurmSettings) -> bool:
    """Whether a cell on GPUs ran out of the host's memory, and no other mem_gb is asked for.

    The micro-batch lives in the memory of the GPUs, so a smaller one does not help.
    """
    return now.is_host_oom and resources.gpus_per_node > 0 and settings.mem_gb is None
