"""Upload to a W&B server what it lacks of the runs of a sweep, and tell what did not arrive.

What arrived is found out by asking the server: `wandb sync` exits with 0 even where it failed. An attempt of which the
server has no row is uploaded as a whole .wandb file. Whatever is missing after that (because of the server's quota, a
kill in the middle of an upload, or a row that W&B's own process never received) is uploaded row by row from
metrics.jsonl into the same W&B run. An upload that was interrupted is continued by the next call.
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
from dlm.core.errors import UserError
from dlm.core.files import dump_json, read_json, read_jsonl, write_atomic, write_json
from dlm.core.lease import Lease, live_holder
from dlm.core.recipe import derive
from dlm.record.outcomes import State
from dlm.record.run import Result, read_result, read_status
from dlm.record.wandb import REFUSED_BY_WANDB, RESULT_PREFIX, described, logged_result, run_id

Row = dict[str, Any]
Mark = tuple[int, float]  # the optimiser step and the time of a row: no two measurements of a run share both


@dataclass(kw_only=True)
class Arrival:
    """One run on disk, and what the server has of it."""

    run_id: str
    run_dir: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    skipped: str | None = None  # why it was not looked at
    known: bool = False  # was whole on the server before, and has changed neither here nor there since
    there: set[Mark] = field(default_factory=set)  # the rows on the server
    result_there: bool = False
    uploaded: int = 0  # rows that this call brought to the server
    trouble: list[str] = field(default_factory=list)  # what went wrong in this call

    @functools.cached_property
    def rows(self) -> dict[Mark, Row]:
        """Every row of every attempt, as the run directory has it."""
        return _marked(self.files.history) | _marked(read_jsonl(self.run_dir / "metrics.jsonl"))

    @functools.cached_property
    def files(self) -> WandbRun:
        """The .wandb files, read once."""
        return read_wandb_run(self.run_dir, self.run_id)

    @functools.cached_property
    def lost(self) -> list[str]:
        """What is missing on disk: rows that no file has any more, or the result."""
        status, has_metrics = read_status(self.run_dir), (self.run_dir / "metrics.jsonl").is_file()
        last = max((step for step, _ in self.rows), default=0)
        lost = []
        if status is not None:
            is_done = status.state is State.DONE
            # A resumed run writes its step before it logs one: while it is not done, a little behind is not lost.
            if status.step - last > (0 if is_done else status.steps // 50):
                lost.append(f"its rows end at step {last}, status.json says {status.step}")
            if is_done and self.result is None:
                lost.append("status.json says that it is done, and its result is gone")
        if lost or (status is None and not has_metrics):  # otherwise only a copy is damaged
            lost += self.files.warnings
        return lost

    @functools.cached_property
    def result(self) -> Result | None:
        """The result from result.json, else as the last attempt logged it."""
        return read_result(self.run_dir) or logged_result(self.files.summary)

    @property
    def nothing(self) -> bool:
        """Whether the run has logged nothing."""
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
        """Whether the server lacks anything that is here."""
        return bool(self.lacking or not self.result_there) and not self._is_empty

    @property
    def whole(self) -> bool:
        """Whether the whole run has arrived."""
        return self.known or not (self.skipped or self.to_upload or self._is_empty or self.lost)


def sync(sweep_dir: Path, *, project: str | None = None) -> list[Arrival]:
    """Upload what the server lacks of every run that is not running, and look up what arrived.

    Args:
        sweep_dir: The folder of the sweep.
        project: ENTITY/PROJECT; by default what the config of the first run names (logger.entity and logger.project).

    Raises:
        UserError: There is no run, no login or no server, the entity refuses, or another process syncs this sweep.
    """
    run_dirs = run_directories(sweep_dir)
    if not run_dirs:
        raise UserError(f"{sweep_dir} holds no run: give the folder of a sweep that has begun")
    with Lease(sweep_dir / "ledger", doing="synced"):  # two at once would both upload what the server lacks
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
    """A run as its directory shows it."""
    name = run_dir.name
    try:
        config = config_of(run_dir)
    except UserError as error:
        return Arrival(run_id=name, run_dir=run_dir, skipped=str(error))
    result = read_result(run_dir)
    for what, of in (("config", config.get("cell_id")), ("result", name if result is None else result.cell_id)):
        if of != name:  # it would go into the W&B run of another cell
            skipped = f"its {what} is of {of}: give the folder that name, or move it away"
            return Arrival(run_id=name, run_dir=run_dir, skipped=skipped)
    one = Arrival(run_id=run_id(config["sweep"], name), run_dir=run_dir, config=config)
    holder = live_holder(run_dir)
    if holder is not None:
        one.skipped = f"it runs (process {holder['pid']} on {holder['host']}): sync again when it has ended"
    return one


def _project_of(config: Mapping[str, Any]) -> str:
    """ENTITY/PROJECT where a run was to be logged."""
    logger = config.get("logger") or {}
    return f"{logger.get('entity') or default_entity()}/{logger.get('project') or 'dlm'}"


def _marked(rows: Iterable[Mapping[str, Any]]) -> dict[Mark, Row]:
    """The rows that dlm logged, by their marks, without the columns that W&B adds."""
    found = {}
    for row in rows:
        step, time = row.get("step"), row.get("time")
        if isinstance(step, (int, float)) and isinstance(time, (int, float)):
            found[int(step), float(time)] = {key: value for key, value in row.items() if not key.startswith("_")}
    return found


def _ask(path: str, arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Look up what the server has of each run, and return the runs of which it lacks something.

    A run that was found whole before, and has changed neither here nor there since (wandb/synced.json), is not asked
    for again.
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
    """The text of synced.json, which changes when the run does, here or on the server."""
    files = [*wandb_files(one.run_dir), one.run_dir / "metrics.jsonl", one.run_dir / "result.json"]
    return dump_json([path, run.version, key_of([file for file in files if file.is_file()], one.run_dir)])


def _upload_files(path: str, arrivals: Sequence[Arrival]) -> None:
    """Upload whole .wandb files: first the first attempt of every run, then the second of every run, and so on."""
    entity, project = path.split("/")
    command = [sys.executable, "-m", "wandb", "sync", "--include-synced", "--include-online"]
    command += ["--entity", entity, "--project", project]
    for attempts in itertools.zip_longest(*(_to_sync(one, path) for one in arrivals)):
        folders = [folder.absolute() for folder in attempts if folder is not None]
        for folder in folders:
            write_json(folder.parent / "tried.json", [*_tried(folder.parent, path), [path, folder.name]])
        with tempfile.TemporaryDirectory() as here:  # `wandb sync` leaves logs of its own where it runs
            done = subprocess.run([*command, *folders], cwd=here, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip()[-300:]
            print(f"wandb sync ended with {done.returncode}: {said}", file=sys.stderr, flush=True)


def _to_sync(one: Arrival, path: str) -> list[Path]:
    """The folders of the attempts that have rows, none of them on the server, and that were not tried before.

    A second `wandb sync` of an attempt counts W&B's steps from 0 again, and the server then hides rows behind others
    (tried with W&B 0.31). So an attempt is tried once, and the rest of it is uploaded row by row.
    """
    folders = []
    for attempt in one.files.attempts:
        marks = _marked(attempt.history).keys()
        if attempt.path is not None and marks and not marks & one.there:
            folders.append(attempt.path.parent)
    tried = _tried(one.run_dir / "wandb", path)
    return [folder for folder in folders if [path, folder.name] not in tried]


def _tried(folder: Path, path: str) -> list[list[str]]:
    """[ENTITY/PROJECT, folder of an attempt] of each `wandb sync` that was begun; where the record is torn, of all."""
    record = folder / "tried.json"
    try:
        return list(read_json(record)) if record.is_file() else []
    except UserError:
        return [[path, attempt.name] for attempt in folder.iterdir()]


def _upload_rows(path: str, one: Arrival) -> None:
    """Log the rows that the server lacks into its run, as the run itself would have, then the last values again."""
    import wandb

    entity, project = path.split("/")
    summary = {name: value for row in one.rows.values() for name, value in row.items()}
    if one.result is not None:
        summary |= {RESULT_PREFIX + key: value for key, value in dataclasses.asdict(one.result).items()}
    try:
        config = _description(one)
    except UNREADABLE as error:
        one.trouble.append(f"its config.yaml or env.json cannot be read: {describe(error)}")
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = wandb.init(
                entity=entity, project=project, id=one.run_id, name=one.run_dir.name, group=one.config["sweep"],
                tags=(one.config.get("logger") or {}).get("tags"), resume="allow", mode="online", dir=folder,
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
        message = " ".join(str(error).split())
        if any(words in message for words in REFUSED_BY_WANDB):
            raise UserError(f"W&B refuses runs in {path}: {message}; give ENTITY/PROJECT as its page says") from error
        one.trouble.append(message)


def _exit_code(one: Arrival) -> int:
    """The exit code that W&B is to show; a run that recorded none has failed unless it has a result."""
    status = read_status(one.run_dir)
    recorded = [*(attempt.exit_code for attempt in one.files.attempts), None if status is None else status.exit_code]
    return next((code for code in reversed(recorded) if code is not None), int(one.result is None))


def _description(one: Arrival) -> Row:
    """What the run told W&B of itself at its start, or would have told it."""
    if "record" in one.config:  # its config was found in W&B's own file, with all that it told then
        return dict(one.config)
    env = one.run_dir / "env.json"
    attempts = read_json(env)["attempts"] if env.is_file() else []
    facts = {key: attempts[-1].get(key) for key in ("git_sha", "device")} if attempts else {}
    if one.result is not None:
        facts["data_hash"] = one.result.data_hash
    return described(one.config, derive(one.config), attempt=len(attempts), **facts)
