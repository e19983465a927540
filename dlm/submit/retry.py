"""Decide which cells are worth starting again."""

from __future__ import annotations

from dlm.record.outcomes import OUTCOMES, Retry, State
from dlm.submit.job import Resources, SlurmSettings
from dlm.submit.ledger import CellNow, CellRecord

MAX_FAILURES = 3  # a cell that failed this often of an unknown cause, and got no further, is left alone


def why_not(now: CellNow, *, failures: int, retry_failed: bool, max_failures: int = MAX_FAILURES) -> str | None:
    """Why a cell in this state is not started, or None when it is."""
    outcome = OUTCOMES[now.state]
    if now.state == State.DONE:
        return "done"
    if outcome.retry is Retry.LEAVE:
        return f"{now.state}: {now.reason}"
    if retry_failed:
        return None
    if outcome.retry is Retry.ASK:
        return f"{now.state} ({now.reason}): {outcome.advice}"
    if outcome.retry is Retry.LIMITED and failures + 1 >= max_failures:
        return f"failed {failures + 1} times ({now.reason}): see `dlm logs`, or --retry-failed"
    return None


def failures_since_progress(record: CellRecord, now: CellNow) -> int:
    """Earlier failures that count: those since the cell last got further."""
    step = now.status.step if now.status is not None else 0
    return record.failures if step <= record.failed_at else 0


def is_host_oom(now: CellNow, resources: Resources, settings: SlurmSettings | None) -> bool:
    """Whether a smaller micro-batch would not help: SLURM ended a job with GPUs, and got no other mem_gb since."""
    unchanged = settings is None or settings.mem_gb is None
    return resources.gpus_per_node > 0 and unchanged and str(now.reason).startswith("SLURM says OUT_OF_MEMORY")
