"""Read the runs of a project and their histories from a W&B server.

wandb takes a second to import, so import this module only when a server is needed. ``wandb_file`` imports wandb too.
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
from dlm.core.errors import TryAgainError, UserError, without_passwords
from dlm.record.wandb import REFUSED_BY_WANDB

RUNS_A_PAGE = 500
STEPS_A_PAGE = 10_000  # steps of a history per request
FEWER_STEPS_A_PAGE = 1000  # W&B's default, tried when a server returns fewer rows than it has
AT_ONCE = 4  # histories that are requested at the same time
FEW = 3  # reading is given up when more histories than this fail
TIMEOUT_SEC = 60
NOTICE_SEC = 5.0  # a request that takes longer is announced
NO_PROJECT = "Could not find project"  # part of W&B's error message


class Project:
    """The runs of a W&B project. ``runs`` maps ids to runs, whose histories are empty until ``read_histories``.

    The constructor takes one login and one request per RUNS_A_PAGE runs. A history takes two requests plus one request
    per STEPS_A_PAGE steps. wandb repeats requests that a busy server refuses (429, 5xx, a dropped connection).

    Args:
        path: ENTITY/PROJECT.
        filters: Filters of W&B for the runs, such as {"group": "demo"}.
        create: Create the project if it does not exist.

    Raises:
        UserError: The server, the login, the entity or the project is missing or refused.
    """

    def __init__(self, path: str, *, filters: Mapping[str, Any] | None = None, create: bool = False) -> None:
        entity, _, project = path.partition("/")
        if not entity or not project or "/" in project:
            raise UserError(f"{path!r} names no W&B project: give it as ENTITY/PROJECT")
        self.path = path
        with _notice(f"the runs of {path}"), _explained(path):
            _api().flush()  # otherwise runs() would return the result of the last request again
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
        """Fill in the histories of these runs, with the rows as they were logged.

        A run whose history cannot be read states the reason in ``unread``. Raises UserError when more than FEW
        histories, or all of them, cannot be read, because the cause is then the server.
        """
        ids = list(run_ids)
        with _notice(f"the histories of {len(ids)} runs of {self.path}"), ThreadPoolExecutor(AT_ONCE) as pool:
            failures = (error for error in pool.map(self._read_history, ids) if error is not None)
            for num_failed, error in enumerate(failures, start=1):
                if num_failed > FEW or num_failed == len(ids):
                    pool.shutdown(cancel_futures=True)
                    raise error

    def _read_history(self, run_id: str) -> UserError | None:
        """Fill in the history of one run; return the error if the history cannot be read."""
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
    """Return the entity to which W&B logs runs by default. Raises UserError without a login or a server."""
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
    """Print a notice when the request in the ``with`` block takes longer than NOTICE_SEC."""
    line = f"dlm: waiting for {what} from W&B ({_url()})"
    timer = threading.Timer(NOTICE_SEC, lambda: print(line, file=sys.stderr, flush=True))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _url() -> str:
    return without_passwords(os.environ.get("WANDB_BASE_URL", "the default server"))


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn W&B's errors into UserError or, if the server fails, TryAgainError. Other errors pass unchanged."""
    try:
        yield
    except Exception as error:
        from wandb.errors import AuthenticationError, CommError, UsageError
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        said, url = without_passwords(" ".join(str(error).split())), _url()
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
    """Convert a run from the list of runs, without a request to the server."""
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
