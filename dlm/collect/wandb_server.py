"""Ask a W&B server for the runs of a project and for what they logged.

This module imports wandb, which takes a second, so it is imported only when a server is asked. Reading .wandb files
(``wandb_file``) imports wandb too.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dlm.collect.wandb_file import WandbRun
from dlm.core.errors import TryAgainError, UserError
from dlm.record.wandb import REFUSED_BY_WANDB

RUNS_A_PAGE = 500
STEPS_A_PAGE = 10_000  # of a history
FEWER_STEPS_A_PAGE = 1000  # W&B's own default, for a server that gives fewer rows than it has
AT_ONCE = 4  # histories that are asked for at the same time
FEW = 3  # histories that may fail while the others are read
TIMEOUT_SEC = 60
NOTICE_SEC = 5.0  # a wait that takes longer is announced
NO_PROJECT = "Could not find project"  # W&B's words


class Project:
    """The runs of a project by their ids. Their histories are empty until ``read_histories`` asks for them.

    This takes one login and one request per RUNS_A_PAGE runs; a history takes two requests and one per STEPS_A_PAGE
    steps. wandb repeats requests that a busy server refuses (429, 5xx, a dropped connection).

    Args:
        path: ENTITY/PROJECT.
        filters: W&B's filters, such as {"group": "demo"}.
        create: Create the project if it does not exist.

    Raises:
        UserError: There is no such server, login, entity or project.
    """

    def __init__(self, path: str, *, filters: Mapping[str, Any] | None = None, create: bool = False) -> None:
        entity, _, project = path.partition("/")
        if not entity or not project or "/" in project:
            raise UserError(f"{path!r} names no W&B project: give it as ENTITY/PROJECT")
        self.path = path
        with _notice(f"the runs of {path}"), _explained(path):
            _api().flush()  # otherwise it would return the runs of the last request again
            runs = _api().runs(
                path, filters=dict(filters or {}), per_page=RUNS_A_PAGE, lazy=False, include_sweeps=False
            )
            try:
                self._runs = {run.id: run for run in runs}
            except ValueError as error:
                if not create or NO_PROJECT not in str(error):
                    raise
                _api().create_project(project, entity)
                self._runs = {}
        self.runs = {run_id: _as_wandb_run(run) for run_id, run in self._runs.items()}

    def read_histories(self, run_ids: Iterable[str]) -> None:
        """Fill in the histories of these runs, row by row as they were logged.

        Where a few cannot be read, their ``unread`` says why. Raises UserError when more than a few, or all, cannot be
        read: then it is the server.
        """
        ids = list(run_ids)
        with _notice(f"the histories of {len(ids)} runs of {self.path}"), ThreadPoolExecutor(AT_ONCE) as pool:
            failures = (error for error in pool.map(self._read_history, ids) if error is not None)
            for num_failed, error in enumerate(failures, start=1):
                if num_failed > FEW or num_failed == len(ids):
                    pool.shutdown(cancel_futures=True)
                    raise error

    def _read_history(self, run_id: str) -> UserError | None:
        """Fill in the history of one run; return the error where it cannot be read."""
        run, found = self._runs[run_id], self.runs[run_id]
        num_rows = run._attrs.get("historyLineCount") or 0
        try:
            with _explained(f"{self.path}/{run_id}"):
                rows = list(run.scan_history(page_size=STEPS_A_PAGE))
                if len(rows) < num_rows:
                    rows = list(run.scan_history(page_size=FEWER_STEPS_A_PAGE))
                found.history = rows  # only now: a history that failed half-way is not kept
        except UserError as error:
            found.unread = str(error)
            return error
        if len(found.history) < num_rows:
            said = f"the W&B server gave {len(found.history)} of the {num_rows} rows that it says it has"
            found.warnings.append(said)
        return None


def default_entity() -> str:
    """The entity that runs go to when none is named. Raises UserError without a login or a server."""
    what = "your default entity"
    with _notice(what), _explained(what):
        return str(_api().default_entity)


@functools.cache
def _api() -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb.Api(timeout=TIMEOUT_SEC)


@contextlib.contextmanager
def _notice(what: str) -> Iterator[None]:
    """Announce a request that takes longer than NOTICE_SEC."""
    line = f"dlm: waiting for {what} from W&B ({_url()})"
    timer = threading.Timer(NOTICE_SEC, lambda: print(line, file=sys.stderr, flush=True))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _url() -> str:
    return os.environ.get("WANDB_BASE_URL", "the default server")


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn W&B's errors into one line: the user's mistake or the server's trouble. Other errors stay themselves."""
    try:
        yield
    except Exception as error:
        from wandb.errors import AuthenticationError, CommError, UsageError
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        said, url = " ".join(str(error).split()), _url()
        refused = isinstance(error, AuthenticationError) and any(code in said for code in ("401", "403", "API key"))
        if isinstance(error, UsageError) or refused:
            advice = "run `wandb login`, or set WANDB_API_KEY and WANDB_BASE_URL"
            raise UserError(f"no login at W&B ({url}): {said}; {advice}") from error
        advice = "give ENTITY/PROJECT as its page says"
        if isinstance(error, ValueError) and NO_PROJECT in said:
            raise UserError(f"W&B ({url}) has no project {what}, or it has no runs: {advice}") from error
        if isinstance(error, WandbApiFailedError) and any(words in said for words in REFUSED_BY_WANDB):
            raise UserError(f"W&B ({url}) refuses {what}: {said}; {advice}") from error
        if isinstance(error, (CommError, WandbApiFailedError, TimeoutError)):
            advice = "try again later, nothing was written"
            raise TryAgainError(f"W&B ({url}) does not answer for {what}: {said}; {advice}") from error
        raise


def _as_wandb_run(run: Any) -> WandbRun:
    """A run as the list of runs tells it; this asks the server for nothing."""
    attrs = run._attrs
    last_step = (attrs.get("historyKeys") or {}).get("lastStep", -1)
    return WandbRun(
        run_id=run.id,
        group=attrs.get("group"),
        config=dict(attrs.get("config") or {}),
        summary=dict(attrs.get("summaryMetrics") or {}),
        state=run.state,
        version=f"{run.id}@{attrs.get('heartbeatAt')}@{last_step}",
    )
