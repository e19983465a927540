"""Look after a sweep on SLURM until its cells have ended, then write its report: `--then report` and `dlm follow`."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlm.cli import gather
from dlm.cli.launcher import chosen, slurm_of
from dlm.cli.memory import PAGE, said_before
from dlm.cli.options import StartOptions
from dlm.cli.start import Started, look, start
from dlm.cli.targets import Sweep, existing, warn
from dlm.core import classes
from dlm.core.errors import UserError, without_passwords
from dlm.core.git import code_origin, running_code
from dlm.core.lease import Lease
from dlm.submit.cell_now import CellNow
from dlm.submit.follower import (
    Following,
    is_in_queue,
    read_following,
    stop_following,
    submit_follower,
    submit_mail,
    write_following,
)
from dlm.submit.slurm import Slurm
from dlm.submit.slurm_commands import JobLimitError, NoAnswerError
from dlm.submit.snapshot import snapshot_code
from dlm.submit.submission import PATIENCE_SEC

WEBHOOK_TIMEOUT_SEC = 20.0
MOST_FAILURES = 3  # looks in a row that could submit nothing; then the sweep ends as it is
MOST_TRIES = 4  # of putting the next follower into the queue; the controller may be restarting
TRY_AGAIN_SEC = 60.0


def reserve(options: StartOptions, folder: Path) -> None:
    """Put the follower into the queue before the cells, because a limit on submitted jobs may leave no room for it.

    If SLURM refuses it, ``arrange`` tries again and says why.
    """
    asked = _asked(options)
    slurm, before = _slurm(asked, folder), read_following(folder)
    if before is None or before.trouble is not None or not is_in_queue(before, slurm):
        with contextlib.suppress(UserError):
            _next(asked, folder, slurm, {})


def dismiss(folder: Path) -> None:
    """Take the follower out of the queue that ``reserve`` has put there, unless cells of the sweep wait or run."""
    if not _is_live(look(existing(str(folder)))):
        stop_following(folder)


def arrange(started: Started, options: StartOptions) -> None:
    """Have a sweep looked after that was just submitted. If nothing of it waits or runs, end it at once.

    A follower that is in the queue already goes on, as it is now asked for.
    """
    asked, sweep = _asked(options), started.sweep
    slurm = _slurm(asked, sweep.folder)
    with _alone(sweep.folder):
        before, now = read_following(sweep.folder), look(sweep)
        if before is not None and before.trouble is None and is_in_queue(before, slurm):
            cells = tuple(dict.fromkeys((*before.cell, *asked.cell))) if before.cell and asked.cell else ()
            made = dataclasses.replace(before, **{**asked.options, "cell": cells})
            write_following(sweep.folder, made)
        elif _is_live(now) or started.postponed:
            try:
                made = _next(asked, sweep.folder, slurm, now)
            except UserError as error:
                _note(sweep.folder, trouble=str(error))
                warn(f"the cells are submitted, but nothing looks after them: {error}; see hydra.launcher.follower")
                return
        else:
            write_following(sweep.folder, asked)
            made = None
    if made is None:
        _end(asked, sweep, slurm, now)
    else:
        print(f"job {made.job_id} looks after the sweep: it submits cells again if need be, and writes the report")


def _asked(options: StartOptions) -> Following:
    """Return how the user asks for the sweep to be looked after."""
    return Following(
        launcher=chosen(options.launcher),
        override=tuple(options.overrides),
        cell=tuple(options.cell or ()),
        pilot=options.pilot,
        allow_dirty=options.allow_dirty,
        mail=options.mail,
        webhook=options.webhook,
    )


def check(options: StartOptions, *, then: bool) -> None:
    """Raise UserError for a --then, --mail or --webhook that is not allowed."""
    if options.then not in (None, "report"):
        raise UserError(f"--then {options.then}: only report is known")
    for name, value in (("--webhook", options.webhook), ("--mail", options.mail)):
        if value is not None and not then:
            raise UserError(f"{name} {value}: nothing would send it; add --then report")
    if options.webhook is not None and not re.fullmatch(r"https?://[^/?#@\s]+([/?#]\S*)?", options.webhook):
        given = without_passwords(options.webhook)
        raise UserError(f"--webhook {given}: give a URL that begins with http:// or https://, without a user name")
    if options.mail is not None and "@" not in options.mail:
        raise UserError(f"--mail {options.mail}: give an address, as in me@example.org")


def follow(folder: Path) -> None:
    """Look at a sweep once: submit what should run, then either put the next follower into the queue or end."""
    following = read_following(folder)
    if following is None or following.ended is not None:
        print(f"nobody asked for {folder} to be looked after")
        return
    own = os.environ.get("DLM_FOLLOWER")
    if own is not None and following.job_id is not None and own != following.job_id:
        print(f"job {following.job_id} looks after {folder}, so this one ends")
        return
    sweep = existing(str(folder))
    slurm = _slurm(following, folder)
    failures, is_postponed = 0, False
    try:
        started = start(_as_options(following, folder), unattended=True)
        sweep, is_postponed = started.sweep, started.postponed
    except JobLimitError as error:  # other jobs of the user fill the queue
        is_postponed = True
        warn(str(error))
    except UserError as error:
        failures = following.failures + 1
        warn(str(error))
    with _alone(folder):
        following = read_following(folder)
        if following is None or following.ended is not None:
            return  # it was cancelled meanwhile
        now = look(sweep)
        if _is_live(now) or is_postponed or 0 < failures < MOST_FAILURES:
            _go_on(dataclasses.replace(following, failures=failures), folder, slurm, now)
            return
    _end(following, sweep, slurm, now)


def _slurm(following: Following, folder: Path) -> Slurm:
    """Return the cluster on which the sweep is looked after."""
    return slurm_of(following.override, allow_dirty=following.allow_dirty, launcher=following.launcher, sweep=folder)


def _alone(folder: Path) -> Lease:
    """Return the context in which nobody else submits cells of a sweep, or changes how it is looked after."""
    return Lease(folder, doing="submitted", patience_sec=PATIENCE_SEC)


def _is_live(now: Mapping[str, CellNow]) -> bool:
    return any(cell.is_live for cell in now.values())


def _note(folder: Path, **changes: Any) -> None:
    """Change the record of how a sweep is looked after."""
    following = read_following(folder)
    assert following is not None
    write_following(folder, dataclasses.replace(following, **changes))


def _as_options(following: Following, folder: Path) -> StartOptions:
    return StartOptions(
        target=str(folder),
        launcher=following.launcher,
        yes=True,
        allow_dirty=following.allow_dirty,
        override=list(following.override),
        cell=list(following.cell),
        pilot=following.pilot,
    )


def _next(following: Following, folder: Path, slurm: Slurm, now: Mapping[str, CellNow]) -> Following:
    """Put the next follower into the queue."""
    origin = code_origin() or running_code()
    code = snapshot_code(folder, origin=origin)
    live = (cell.record.job_id for cell in now.values() if cell.is_live and cell.record.job_id is not None)
    arrays = sorted({job_id.split("_")[0] for job_id in live})
    environment = {"DLM_CODE": code.name, **classes.environment(), **(origin.environment() if origin else {})}
    return submit_follower(following, folder, slurm, code=code, environment=environment, arrays=arrays)


def _go_on(following: Following, folder: Path, slurm: Slurm, now: Mapping[str, CellNow]) -> None:
    """Put the next follower into the queue. If SLURM refuses, its words are kept for `dlm status`, and sent."""
    for tried in range(1, MOST_TRIES + 1):
        try:
            made = _next(following, folder, slurm, now)
        except UserError as error:
            own = os.environ.get("DLM_FOLLOWER")
            if own is not None and isinstance(error, JobLimitError):  # no room for another job: this one looks again
                write_following(folder, dataclasses.replace(following, job_id=own))
                print(f"SLURM takes no further job, so job {own} is requeued", flush=True)
                with contextlib.suppress(UserError):
                    slurm.requeue(own)
                    return
            warn(f"the next follower: {error}")
            may_pass = isinstance(error, NoAnswerError) or re.search("temporar", str(error), re.IGNORECASE)
            if tried == MOST_TRIES or not may_pass:
                _note(folder, trouble=str(error))
                _tell(following, folder, now, slurm, f"nothing looks after the sweep any more: {error}", [])
                return
            time.sleep(TRY_AGAIN_SEC)
        else:
            print(f"job {made.job_id} looks next")
            return


def _end(following: Following, sweep: Sweep, slurm: Slurm, now: Mapping[str, CellNow]) -> None:
    """Write the report, tell whoever asked for it, and note the outcome. If cells were submitted meanwhile, go on."""
    folder, verdict = sweep.folder, list[str]()
    try:
        gather.report(sweep)
    except UserError as error:
        outcome = f"no report: {error}"
    except Exception as error:  # whoever waits for the end is told, and the traceback is in the log
        traceback.print_exc()
        outcome = f"no report, because of a bug of dlm: {error!r}"
    else:
        outcome, verdict = f"report: {folder / PAGE}", said_before(folder) or []
    with _alone(folder):
        now = look(sweep)
        following = read_following(folder) or following
        if _is_live(now) and following.ended is None:
            _go_on(following, folder, slurm, now)
            return
        said = "; ".join([outcome, *_tell(following, folder, now, slurm, outcome, verdict)])
        _note(folder, ended=said)
    print(said)


def _tell(
    following: Following, folder: Path, now: Mapping[str, CellNow], slurm: Slurm, outcome: str, verdict: Sequence[str]
) -> list[str]:
    """Send the outcome to whoever asked for it, and return what went wrong with that."""
    went_wrong = list[str]()
    if following.webhook is not None:
        went_wrong.append(_post(following.webhook, _message(folder, now, outcome, verdict)))
    if following.mail is not None:
        try:
            submit_mail(following.mail, folder, slurm)
        except UserError as error:
            went_wrong.append(f"no mail was sent ({error})")
    return [*filter(None, went_wrong)]


def _message(folder: Path, now: Mapping[str, CellNow], outcome: str, verdict: Sequence[str]) -> dict[str, Any]:
    """Return what a webhook gets; `text` is the key that chat programs show."""
    counts = Counter(str(cell.state) for cell in now.values())
    cells = ", ".join(f"{count} {state}" for state, count in counts.items())
    return {
        "text": f"{folder.name}: {cells}; {outcome}",
        "sweep": folder.name,
        "cells": dict(counts),
        "outcome": outcome,
        "verdict": "\n".join(verdict),
    }


def _post(url: str, message: Mapping[str, Any]) -> str:
    """Send a message to a webhook, once. Return what went wrong; empty if nothing did."""
    try:
        request = urllib.request.Request(
            url, data=json.dumps(message).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WEBHOOK_TIMEOUT_SEC):
            return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"the webhook did not take the message ({error})"
