"""wandb_api: a project on a W&B server -> its runs, and what they logged. Called by the cli's collect, and by sync.

The only module of the sweep half that imports wandb, with sync: both are imported when a server is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dlm.collect.wandb_file import WandbRun
from dlm.core.errors import TryAgainError, UserError
from dlm.record.wandb import REFUSED_BY_WANDB

RUNS_A_PAGE = 500


STEPS_A_PAGE = 10_000  # of history; W&B's own default, 1,000, is tried where the server gives less than it has


AT_ONCE = 4  # histories that are asked for at the same time


FEW = 3  # histories that may fail while the others are read


TIMEOUT_SEC = 60


NOTICE_SEC = 5.0  # after which a wait is worth a line


NO_PROJECT = "Could not find project"  # W&B's words


class Project:
    """The runs of ENTITY/PROJECT by their id, histories aside, which ``read_histories`` asks for run by run.

    One login, one request per RUNS_A_PAGE runs, and for a history two and one per STEPS_A_PAGE steps. wandb-core tries
    again what a busy server refuses (429, 5xx, a dropped connection). ``create`` makes a project that is not there.
    Raises UserError for a server, a login, an entity or a project that is not there.
    """

    def __init__(self, path: str, *, filters: Mapping[str, Any] | None = None, create: bool = False) -> None:
        entity, _, project = path.partition("/")
        if not entity or not project or "/" in project:
            raise UserError(f"{path!r} names no W&B project: give it as ENTITY/PROJECT")
        self.path = path
        self._runs = {run.id: run for run in _ask(path, filters or {}, create=create)}
        self.runs = {run_id: _as_wandb_run(run) for run_id, run in self._runs.items()}

    def read_histories(self, run_ids: Iterable[str]) -> None:
        """Fill in what these runs logged, row by row as they did; of a few that cannot be read ``unread`` says why.

        Raises UserError when it is more than a few: then it is the server.
        """
        ids, failed = list(run_ids), list[UserError]()

        def ask(run_id: str) -> list[dict[str, Any]] | UserError:
            try:
                return self._rows(run_id)
            except UserError as error:
                return error

        with _notice(f"the histories of {len(ids)} runs of {self.path}"), ThreadPoolExecutor(AT_ONCE) as pool:
            for run_id, rows in zip(ids, pool.map(ask, ids), strict=True):
                if isinstance(rows, UserError):
                    failed.append(rows)
                    self.runs[run_id].unread = str(rows)
                    if len(failed) > FEW or len(failed) == len(ids):
                        raise rows
                else:
                    self.runs[run_id].history = rows

    def _rows(self, run_id: str) -> list[dict[str, Any]]:
        """All rows of one run; a server that gave fewer than it says it has is asked in small pages, then named."""
        run, run_of = self._runs[run_id], self.runs[run_id]
        rows = _scan(self.path, run, STEPS_A_PAGE)
        counted = run._attrs.get("historyLineCount") or 0
        if len(rows) < counted:
            rows = _scan(self.path, run, 1000)
        if len(rows) < counted:
            run_of.warnings.append(f"the W&B server gave {len(rows)} of the {counted} rows that it says it has")
        return rows


def default_entity() -> str:
    """The entity that runs go to when none is named. Raises UserError without a login or a server."""
    what = "your default entity"
    try:
        with _notice(what):
            return str(_api().default_entity)
    except Exception as error:
        raise _explained(error, what) from error


@functools.cache
def _api() -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb.Api(timeout=TIMEOUT_SEC)


def _ask(path: str, filters: Mapping[str, Any], *, create: bool) -> Sequence[Any]:
    try:
        with _notice(f"the runs of {path}"):
            _api().flush()  # it would give the runs of the last time again
            runs = _api().runs(path, filters=dict(filters), per_page=RUNS_A_PAGE, lazy=False, include_sweeps=False)
            try:
                return list(runs)
            except ValueError as error:
                if not create or NO_PROJECT not in str(error):
                    raise
            entity, _, project = path.partition("/")
            _api().create_project(project, entity)
            return []
    except Exception as error:
        raise _explained(error, path) from error


@contextlib.contextmanager
def _notice(what: str) -> Iterator[None]:
    """Say what a server is taking its time for."""
    line = f"dlm: waiting for {what} from W&B ({_url()})"
    timer = threading.Timer(NOTICE_SEC, lambda: print(line, file=sys.stderr, flush=True))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _url() -> str:
    return os.environ.get("WANDB_BASE_URL", "the default server")


def _scan(path: str, run: Any, page_size: int) -> list[dict[str, Any]]:
    try:
        return list(run.scan_history(page_size=page_size))
    except Exception as error:
        raise _explained(error, f"{path}/{run.id}") from error


def _explained(error: Exception, what: str) -> Exception:
    """The user's mistake, or the server's trouble, in one line; what is neither stays itself."""
    from wandb.errors import AuthenticationError, CommError, UsageError
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    said = " ".join(str(error).split())
    url = _url()
    refused = isinstance(error, AuthenticationError) and any(code in said for code in ("401", "403", "API key"))
    if isinstance(error, UsageError) or refused:
        return UserError(f"no login at W&B ({url}): {said}; run `wandb login`, or set WANDB_API_KEY and WANDB_BASE_URL")
    if isinstance(error, ValueError) and NO_PROJECT in said:
        return UserError(f"W&B ({url}) has no project {what}, or it has no runs: give ENTITY/PROJECT as its page says")
    if isinstance(error, WandbApiFailedError) and any(words in said for words in REFUSED_BY_WANDB):
        return UserError(f"W&B ({url}) refuses {what}: {said}; give ENTITY/PROJECT as its page says")
    if isinstance(error, (AuthenticationError, CommError, WandbApiFailedError, TimeoutError)):
        return TryAgainError(f"W&B ({url}) does not answer for {what}: {said}; try again later, nothing was written")
    return error


def _as_wandb_run(run: Any) -> WandbRun:
    """A run as the page of runs tells it; nothing here asks the server again."""
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
