"""Submit jobs: copy the code into a snapshot, record the intent in the ledger, and pass the jobs to a cluster."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from dlm.core import classes
from dlm.core.git import code_origin, running_code
from dlm.core.lease import Lease
from dlm.submit.cell_now import CellNow
from dlm.submit.cluster import Cluster, Event, Request, Submission
from dlm.submit.job import Job
from dlm.submit.ledger import Ledger
from dlm.submit.snapshot import check_clean, snapshot_code, tell_of_untracked

# How long to wait for another submission of the same sweep; the lease of a dead process becomes stale sooner.
PATIENCE_SEC = 120.0


def submitting(cluster: Cluster, sweep_dir: Path) -> contextlib.AbstractContextManager[object]:
    """Return a context that excludes other submissions of a sweep while its cells are inspected and submitted.

    Needed only where jobs queue; on this machine the leases of the cells suffice. Raises UserError when the cluster
    cannot be used from here, or a line of the ledger is damaged. Entering the context raises it when another submission
    goes on for more than PATIENCE_SEC.
    """
    Ledger(sweep_dir).check()
    if not cluster.queues:
        return contextlib.nullcontext()
    cluster.check([])
    return Lease(sweep_dir, doing="submitted", patience_sec=PATIENCE_SEC)


def submit_jobs(
    jobs: Sequence[Job],
    *,
    cluster: Cluster,
    sweep_dir: Path,
    live: Sequence[CellNow] = (),
    before_first: Callable[[], None] = lambda: None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Submission:
    """Submit jobs to a cluster, for `dlm submit` and for Hydra's `-m`.

    Returns when a cluster with a queue has accepted every job, or when every process on this machine has ended.

    Args:
        jobs: The jobs. For a cluster with a queue, the caller must hold the context ``submitting``.
        cluster: Where the jobs are to run.
        sweep_dir: The folder of the sweep.
        live: The other cells of the sweep that wait or run; they count for the limits of the sweep.
        before_first: Called before the first job is put into a queue.
        on_event: Called when a job on this machine starts or ends.
        on_tick: Called several times a second while jobs run on this machine.

    Raises:
        UserError: The cluster refuses the jobs or cannot run one of them, or the code differs from the last commit and
            the settings of the cluster do not allow this (``allow_dirty``).
    """
    if not jobs:
        return Submission()
    origin = code_origin() or running_code()  # a follower runs from a snapshot, and its environment names the commit
    if not cluster.settings.allow_dirty:
        check_clean(origin)
    cluster.check(jobs)
    code = snapshot_code(sweep_dir, origin=origin)
    tell_of_untracked(origin)
    return cluster.submit(
        Request(
            submission=f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}",
            jobs=jobs,
            ledger=Ledger(sweep_dir),
            code=code,
            environment={"DLM_CODE": code.name, **classes.environment(), **(origin.environment() if origin else {})},
            live=live,
            before_first=before_first,
            on_event=on_event,
            on_tick=on_tick,
        )
    )
