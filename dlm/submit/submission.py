"""Submit jobs: snapshot the code, write down the intent, and hand the jobs to a cluster."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from dlm.core.git import code_origin
from dlm.core.lease import Lease
from dlm.submit.cluster import Cluster, Event, Request, Submission
from dlm.submit.job import Job
from dlm.submit.ledger import Ledger
from dlm.submit.snapshot import check_clean, snapshot_code

PATIENCE_SEC = 120.0  # for another submission of the same sweep; longer than the lease of a dead one stays fresh


def submitting(cluster: Cluster, sweep_dir: Path) -> contextlib.AbstractContextManager[object]:
    """Keep other submissions of the sweep out while its cells are looked at and submitted.

    Needed only where jobs queue; on this machine the leases of the cells suffice. Raises UserError when the cluster
    cannot be used from here. Entering the context raises it when another submission goes on for more than PATIENCE_SEC.
    """
    if not cluster.queues:
        return contextlib.nullcontext()
    cluster.check([])
    return Lease(sweep_dir, doing="submitted", patience_sec=PATIENCE_SEC)


def submit_jobs(
    jobs: Sequence[Job],
    *,
    cluster: Cluster,
    sweep_dir: Path,
    on_event: Callable[[Event], None] = lambda event: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Submission:
    """Submit jobs to a cluster; both `dlm submit` and Hydra's `-m` end here.

    Returns when a queueing cluster has accepted every job, otherwise when every process has ended.

    Args:
        jobs: The jobs. On a queueing cluster the caller holds ``submitting``.
        cluster: Where they are to run.
        sweep_dir: The folder of the sweep.
        on_event: Called when a job of this machine starts or ends.
        on_tick: Called several times a second while jobs run on this machine.

    Raises:
        UserError: The cluster refuses, a job cannot fit, or the code differs from the last commit where that matters.
    """
    if not jobs:
        return Submission()
    origin = code_origin()
    if not cluster.settings.allow_dirty:
        check_clean(origin)
    cluster.check(jobs)
    code = snapshot_code(sweep_dir, origin=origin)
    return cluster.submit(
        Request(
            submission=f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}",
            jobs=jobs,
            ledger=Ledger(sweep_dir),
            code=code,
            environment={"DLM_CODE": code.name, **(origin.environment() if origin else {})},
            on_event=on_event,
            on_tick=on_tick,
        )
    )
