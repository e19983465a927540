"""Upload the missing parts of the runs of a sweep to a W&B server, and report what did not arrive.

The server is asked what arrived, because `wandb sync` exits with 0 even where it failed. An attempt of which the server
has no row is uploaded as a complete .wandb file. Rows that are still missing after that (because of the server's quota,
a kill in the middle of an upload, or a row that W&B's own process never received) are uploaded one by one from
metrics.jsonl into the same W&B run. The next call continues an interrupted upload.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.collect.found import config_of, run_directories
from dlm.collect.history import key_of
from dlm.collect.sources import UNREADABLE, describe
from dlm.collect.wandb_file import WandbRun, read_wandb_run, wandb_files
from dlm.collect.wandb_server import Project, default_entity
from dlm.core.errors import UserError, without_passwords
from dlm.core.files import dump_json, read_json, read_jsonl, write_atomic, write_json
from dlm.core.lease import Lease, live_holder
from dlm.core.recipe import derive
from dlm.core.typed import MisfitError, typed
from dlm.record.outcomes import State
from dlm.record.run import Result, read_result, read_status
from dlm.record.wandb import REFUSED_BY_WANDB, RESULT_PREFIX, described, fitting_tags, logged_result, run_id

Row = dict[str, Any]
Mark = tuple[int, float]  # the optimiser step and the time of a row, which together identify a measurement of a run


@dataclass(kw_only=True)
class Arrival:
    """One run on disk, and the parts of it that the server has."""

    run_id: str
    run_dir: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    skipped: str | None = None  # why the run was not compared with the server
    known: bool = False  # was complete on the server at an earlier call, and has not changed since on either side
    there: set[Mark] = field(default_factory=set)  # the rows on the server
    result_there: bool = False  # whether the server has the run and, if one is on disk, its result
    uploaded: int = 0  # rows that the server received in this call
    trouble: list[str] = field(default_factory=list)  # errors of this call

    @functools.cached_property
    def rows(self) -> dict[Mark, Row]:
        """All rows of all attempts, from the .wandb files and metrics.jsonl of the run directory."""
        return _marked(self.files.history) | _marked(read_jsonl(self.run_dir / "metrics.jsonl"))

    @functools.cached_property
    def files(self) -> WandbRun:
        """The content of the .wandb files, read once."""
        return read_wandb_run(self.run_dir, self.run_id)

    @functools.cached_property
    def lost(self) -> list[str]:
        """A line for each kind of data missing on disk: rows that no file holds any more, or the result."""
        status, has_metrics = read_status(self.run_dir), (self.run_dir / "metrics.jsonl").is_file()
        last = max((step for step, _ in self.rows), default=0)
        lost = []
        if status is not None:
            is_done = status.state is State.DONE
            # A resumed run writes status.json before it logs a row: until it is done, a few rows may be missing.
            if status.step - last > (0 if is_done else status.steps // 50):
                lost.append(f"its rows end at step {last}, status.json says {status.step}")
            if is_done and self.result is None:
                lost.append("status.json says that it is done, and its result is gone")
        if lost or (status is None and not has_metrics):  # otherwise the damaged files are only a copy
            lost += self.files.warnings
        return lost

    @functools.cached_property
    def result(self) -> Result | None:
        """The result from result.json, or else the result that the last attempt logged to W&B."""
        return read_result(self.run_dir) or logged_result(self.files.summary)

    @property
    def nothing(self) -> bool:
        """Whether the run has logged nothing, so that there is nothing to upload."""
        return not self.known and self.skipped is None and self._is_empty and not self.lost

    @property
    def _is_empty(self) -> bool:
        return not self.rows and self.result is None

    @property
    def lacking(self) -> list[Row]:
        """The rows that the server does not have, oldest first."""
        return [] if self.known else [row for mark, row in self.rows.items() if mark not in self.there]

    @property
    def to_upload(self) -> bool:
        """Whether the server lacks a row or the result that is on disk."""
        return bool(self.lacking or not self.result_there) and not self._is_empty

    @property
    def whole(self) -> bool:
        """Whether the complete run has arrived on the server."""
        return self.known or not (self.skipped or self.to_upload or self._is_empty or self.lost)


def sync(sweep_dir: Path, *, project: str | None = None) -> list[Arrival]:
    """Upload the rows and results that the server lacks, except of runs in progress, and look up what arrived.

    Args:
        sweep_dir: The folder of the sweep.
        project: ENTITY/PROJECT; by default logger.entity and logger.project in the config of the first run that has a
            config.

    Returns:
        For every run directory, what arrived and what is missing.

    Raises:
        UserError: There is no run, no login or no server, the entity refuses, or another process syncs this sweep.
    """
    run_dirs = run_directories(sweep_dir)
    if not run_dirs:
        raise UserError(f"{sweep_dir} holds no run: give the folder of a sweep that has begun")
    with Lease(sweep_dir / "ledger", doing="synced"):  # two processes at once would upload the same rows twice
        arrivals = [_look_at(run_dir) for run_dir in run_dirs]
        with_config = [one for one in arrivals if one.config]
        if not with_config:
            raise UserError(str(arrivals[0].skipped))
        path = project or _project_of(with_config[0].config)
        to_upload = _ask(path, [one for one in arrivals if one.skipped is None])
        lacking_before = [len(one.lacking) for one in to_upload]
        if to_upload:
            _upload_files(path, to_upload)
            for one in _ask(path, to_upload):
                _upload_rows(path, one)
            _ask(path, to_upload)
        for one, before in zip(to_upload, lacking_before, strict=True):
            one.uploaded = before - len(one.lacking)
    return arrivals


def _look_at(run_dir: Path) -> Arrival:
    """Read a run from its directory, and find out whether it must be skipped."""
    name = run_dir.name
    try:
        config = config_of(run_dir)
    except UserError as error:
        return Arrival(run_id=name, run_dir=run_dir, skipped=str(error))
    result = read_result(run_dir)
    for what, of in (("config", config.get("cell_id")), ("result", name if result is None else result.cell_id)):
        if of != name:  # the upload would go into the W&B run of another cell
            skipped = f"its {what} is of {of}: give the folder that name, or move it away"
            return Arrival(run_id=name, run_dir=run_dir, skipped=skipped)
    one = Arrival(run_id=run_id(config["sweep"], name), run_dir=run_dir, config=config)
    holder = live_holder(run_dir)
    if holder is not None:
        one.skipped = f"it runs (process {holder['pid']} on {holder['host']}): sync again when it has ended"
    return one


def _project_of(config: Mapping[str, Any]) -> str:
    """Return ENTITY/PROJECT to which a run was to be logged."""
    logger = config.get("logger") or {}
    return f"{logger.get('entity') or default_entity()}/{logger.get('project') or 'dlm'}"


def _marked(rows: Iterable[Mapping[str, Any]]) -> dict[Mark, Row]:
    """Return the rows that dlm logged by their (step, time), without the columns that W&B adds."""
    found = {}
    for row in rows:
        step, time = row.get("step"), row.get("time")
        if isinstance(step, (int, float)) and isinstance(time, (int, float)):
            found[int(step), float(time)] = {key: value for key, value in row.items() if not key.startswith("_")}
    return found


def _ask(path: str, arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Look up what the server has of each run, and return the runs that still have something to upload.

    The history of a run is not requested again if wandb/synced.json records that the run was complete on the server and
    if neither the files on disk nor the run on the server have changed since.
    """
    sweeps = sorted({str(one.config["sweep"]) for one in arrivals})
    server = Project(path, filters={"group": {"$in": sweeps}}, create=True)
    there = [one for one in arrivals if one.run_id in server.runs]
    for one in there:
        run = server.runs[one.run_id]
        synced = one.run_dir / "wandb/synced.json"
        one.known = synced.is_file() and synced.read_bytes() == _fingerprint(path, one, run).encode()
        one.result_there = one.known or one.result is None or f"{RESULT_PREFIX}loss" in run.summary
    to_read = [one for one in there if not one.known]
    server.read_histories(one.run_id for one in to_read)
    for one in to_read:
        run = server.runs[one.run_id]
        one.there = set(_marked(run.history))
        if one.whole:
            write_atomic(one.run_dir / "wandb/synced.json", _fingerprint(path, one, run))
    return [one for one in arrivals if one.to_upload]


def _fingerprint(path: str, one: Arrival, run: WandbRun) -> str:
    """Return the text of synced.json, which changes when the run changes on disk or on the server."""
    files = [*wandb_files(one.run_dir), one.run_dir / "metrics.jsonl", one.run_dir / "result.json"]
    return dump_json([path, run.version, key_of([file for file in files if file.is_file()], one.run_dir)])


def _upload_files(path: str, arrivals: Sequence[Arrival]) -> None:
    """Upload complete .wandb files: the first attempt of every run, then the second attempt of every run, and so on."""
    entity, project = path.split("/")
    command = [sys.executable, "-m", "wandb", "sync", "--include-synced", "--include-online"]
    command += ["--entity", entity, "--project", project]
    for attempts in itertools.zip_longest(*(_to_sync(one, path) for one in arrivals)):
        folders = [folder.absolute() for folder in attempts if folder is not None]
        for folder in folders:
            write_json(folder.parent / "tried.json", [*_tried(folder.parent, path), [path, folder.name]])
        with tempfile.TemporaryDirectory() as here:  # `wandb sync` writes its own logs into the working directory
            done = subprocess.run([*command, *folders], cwd=here, capture_output=True, text=True, check=False)
        if done.returncode:
            said = without_passwords(done.stderr.strip())[-300:]
            print(f"wandb sync ended with {done.returncode}: {said}", file=sys.stderr, flush=True)


def _to_sync(one: Arrival, path: str) -> list[Path]:
    """Return the folders of attempts of which the server has no row and that `wandb sync` has not tried before.

    A second `wandb sync` of an attempt counts W&B's steps from 0 again, and the server then hides some rows behind
    others (observed with W&B 0.31). So `wandb sync` is tried once per attempt; rows still missing are uploaded one by
    one. Attempts without rows are left out.
    """
    folders = []
    for attempt in one.files.attempts:
        marks = _marked(attempt.history).keys()
        if attempt.path is not None and marks and not marks & one.there:
            folders.append(attempt.path.parent)
    tried = _tried(one.run_dir / "wandb", path)
    return [folder for folder in folders if [path, folder.name] not in tried]


def _tried(folder: Path, path: str) -> list[list[str]]:
    """Return [ENTITY/PROJECT, attempt folder] of each `wandb sync` begun; of all folders where the record is torn."""
    record = folder / "tried.json"
    try:
        return typed(list[list[str]], read_json(record)) if record.is_file() else []
    except (UserError, MisfitError):
        return [[path, attempt.name] for attempt in folder.iterdir()]


def _upload_rows(path: str, one: Arrival) -> None:
    """Log the rows that the server lacks as the run itself would have logged them, then set the summary again."""
    import wandb

    entity, project = path.split("/")
    summary = {name: value for row in one.rows.values() for name, value in row.items()}
    if one.result is not None:
        summary |= {RESULT_PREFIX + key: value for key, value in dataclasses.asdict(one.result).items()}
    tags = fitting_tags((one.config.get("logger") or {}).get("tags"))
    try:
        config = _description(one)
    except UNREADABLE as error:
        one.trouble.append(f"its config.yaml or env.json cannot be read: {describe(error)}")
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = wandb.init(
                entity=entity, project=project, id=one.run_id, name=one.run_dir.name, group=one.config["sweep"],
                tags=tags, resume="allow", mode="online", dir=folder,
                settings=wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off"),
                reinit="finish_previous",
            )  # fmt: skip
            try:
                run.config.update(config, allow_val_change=True)  # type: ignore[no-untyped-call]
                for row in one.lacking:
                    run.log({**row, "trainer/global_step": row["step"]})
                run.summary.update(summary)  # type: ignore[no-untyped-call]
            finally:  # otherwise the next wandb.init would continue this run
                run.finish(exit_code=_exit_code(one))
    except (wandb.errors.Error, ConnectionError) as error:
        message = without_passwords(" ".join(str(error).split()))
        if any(words in message for words in REFUSED_BY_WANDB):
            raise UserError(f"W&B refuses runs in {path}: {message}; give ENTITY/PROJECT as its page says") from error
        one.trouble.append(message)


def _exit_code(one: Arrival) -> int:
    """Return the exit code that W&B is to show. Without a recorded exit code: 0 for a run with a result, else 1."""
    status = read_status(one.run_dir)
    recorded = [*(attempt.exit_code for attempt in one.files.attempts), None if status is None else status.exit_code]
    return next((code for code in reversed(recorded) if code is not None), int(one.result is None))


def _description(one: Arrival) -> Row:
    """Return what the run told W&B at its start, or would have told W&B if it had been online."""
    if "record" in one.config:  # the config comes from a .wandb file, which holds the complete description
        return dict(one.config)
    env = one.run_dir / "env.json"
    attempts = read_json(env)["attempts"] if env.is_file() else []
    facts = {key: attempts[-1].get(key) for key in ("git_sha", "device")} if attempts else {}
    if one.result is not None:
        facts["data_hash"] = one.result.data_hash
    return described(one.config, derive(one.config), attempt=len(attempts), **facts)
