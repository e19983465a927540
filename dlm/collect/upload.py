"""sync: the runs of a sweep on disk -> a W&B server, once, and what did not arrive. Called by cli.

What the server has is asked of the server, not of `wandb sync`, which ends with 0 where it failed. An attempt that has
no row there goes as its whole .wandb file; whatever then lacks (the server's quota, a kill in the middle of an upload,
a row that W&B's own process never got) goes row by row from metrics.jsonl, into the same W&B run. Cut off anywhere, the
next call goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.collect.found import config_of, run_directories
from dlm.collect.history import Key, key_of
from dlm.collect.sources import UNREADABLE, said_of
from dlm.collect.wandb_file import WandbRun, attempts_of, wandb_files
from dlm.collect.wandb_server import Project, default_entity
from dlm.core.errors import UserError
from dlm.core.files import read_json, read_jsonl, write_json
from dlm.core.lease import Lease, live_holder
from dlm.core.recipe import derive
from dlm.record.outcomes import State
from dlm.record.run import Result, read_result, read_status
from dlm.record.wandb import REFUSED_BY_WANDB, RESULT_PREFIX, described, logged_result

Row = dict[str, Any]


Mark = tuple[int, float]  # the optimiser step and the time of a row: no two measurements of a run share both


@dataclass(kw_only=True)
class Arrival:
    """One run, and what of it the server has."""

    run_id: str
    run_dir: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    skipped: str | None = None  # why it was not looked at
    known: bool = False  # found whole before, and changed nowhere since
    there: set[Mark] = field(default_factory=set)  # on the server
    result_there: bool = False
    uploaded: int = 0  # rows, by this sync
    trouble: list[str] = field(default_factory=list)  # of this sync
    files: WandbRun = field(default_factory=WandbRun)

    @functools.cached_property
    def rows(self) -> dict[Mark, Row]:
        """Every row that any attempt logged, as its own directory tells it."""
        rows: dict[Mark, Row] = {}
        for part in self.attempts:
            rows |= _marked(part.history)
        return rows | _marked(read_jsonl(self.run_dir / "metrics.jsonl"))

    @functools.cached_property
    def attempts(self) -> list[WandbRun]:
        """Its .wandb files, each read once; ``files.warnings`` say what cannot be read of them."""
        return attempts_of(self.run_dir, self.files)

    @functools.cached_property
    def lost(self) -> list[str]:
        """Why it is not whole on disk: rows that no file has any more, or its result."""
        status, metrics = read_status(self.run_dir), self.run_dir / "metrics.jsonl"
        last = max((step for step, _ in self.rows), default=0)
        lost = []
        # A resume says its step before it logs one: a little behind is not lost, of a run that is not done.
        if status is not None and status.step - last > (0 if status.state is State.DONE else status.steps // 50):
            lost.append(f"its rows end at step {last}, status.json says {status.step}")
        if status is not None and status.state is State.DONE and self.result is None:
            lost.append("status.json says that it is done, and its result is gone")
        if (status is None and not metrics.is_file()) or lost:  # else it is only a copy that is damaged
            lost += self.files.warnings
        return lost

    @functools.cached_property
    def result(self) -> Result | None:
        """Of its result.json, else as its last attempt logged it."""
        summary: Row = {}
        for part in self.attempts:
            summary |= part.summary
        return read_result(self.run_dir) or logged_result(summary)

    @property
    def nothing(self) -> bool:
        """Whether it has logged nothing."""
        return not self.known and self.skipped is None and self._empty and not self.lost

    @property
    def _empty(self) -> bool:
        return not self.rows and self.result is None

    @property
    def lacking(self) -> list[Row]:
        """What the server does not have, oldest first."""
        return [] if self.known else [row for mark, row in self.rows.items() if mark not in self.there]

    @property
    def whole(self) -> bool:
        """Whether all of it has arrived."""
        arrived = self.skipped is None and not self._empty and not self.lacking and self.result_there
        return self.known or (arrived and not self.lost)

    @property
    def to_upload(self) -> bool:
        """Whether anything is here that the server does not have."""
        return not self._empty and bool(self.lacking or not self.result_there)


def sync(sweep_dir: Path, *, project: str | None = None) -> list[Arrival]:
    """Upload what a server lacks of every run that is not going on just now; the truth about each.

    ``project`` is ENTITY/PROJECT, by default what the runs' configs name (logger.entity, or the user's own, and
    logger.project). Raises UserError without a run, a login or a server, for an entity that refuses, and while another
    process syncs this sweep.
    """
    run_dirs = run_directories(sweep_dir)
    if not run_dirs:
        raise UserError(f"{sweep_dir} holds no run: give the folder of a sweep that has begun")
    with Lease(sweep_dir / "ledger", doing="synced"):  # two at once would both upload what the server lacks
        return _sync(run_dirs, project)


def _sync(run_dirs: Sequence[Path], project: str | None) -> list[Arrival]:
    arrivals = [_arrival(run_dir) for run_dir in run_dirs]
    named = [one for one in arrivals if one.config]
    if not named:
        raise UserError(str(arrivals[0].skipped))
    path = project or _path(named[0].config)
    left = _ask(path, [one for one in arrivals if one.skipped is None])
    before = {one.run_id: len(one.lacking) for one in left}
    if left:
        _upload_files(path, left)
        for one in _ask(path, left):
            _upload_rows(path, one)
        _ask(path, left)
    for one in left:
        one.uploaded = before[one.run_id] - len(one.lacking)
    return arrivals


def _arrival(run_dir: Path) -> Arrival:
    """A run as its directory tells it."""
    try:
        config = config_of(run_dir)
    except UserError as error:
        return Arrival(run_id=run_dir.name, run_dir=run_dir, skipped=str(error))
    result = read_result(run_dir)
    for what, of in (("config", config.get("cell_id")), ("result", run_dir.name if result is None else result.cell_id)):
        if of != run_dir.name:  # it would go into the W&B run of another, or make a run that nobody trained
            said = f"its {what} is of {of}: give the folder that name, or move it away"
            return Arrival(run_id=run_dir.name, run_dir=run_dir, skipped=said)
    run_id = f"{config['sweep']}-{run_dir.name}"
    one = Arrival(run_id=run_id, run_dir=run_dir, config=config, files=WandbRun(run_id=run_id))
    holder = live_holder(run_dir)
    if holder is not None:
        one.skipped = f"it runs (process {holder['pid']} on {holder['host']}): sync again when it has ended"
    return one


def _path(config: Mapping[str, Any]) -> str:
    """ENTITY/PROJECT where a run was to be logged."""
    logger = config.get("logger") or {}
    return f"{logger.get('entity') or default_entity()}/{logger.get('project') or 'dlm'}"


def _marked(rows: Iterable[Mapping[str, Any]]) -> dict[Mark, Row]:
    """The rows that dlm logged, by their marks; what W&B adds of its own is left out."""
    found = {}
    for row in rows:
        step, time = row.get("step"), row.get("time")
        if isinstance(step, (int, float)) and isinstance(time, (int, float)):
            mark = int(step), float(time)
            found[mark] = {key: value for key, value in row.items() if not key.startswith("_")}
    return found


def _local_key(one: Arrival) -> Key:
    files = [*wandb_files(one.run_dir), one.run_dir / "metrics.jsonl", one.run_dir / "result.json"]
    return key_of([path for path in files if path.is_file()], one.run_dir)


def _ask(path: str, arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Look up what the server has of each; those of which it lacks something.

    What was found whole, and has changed neither here nor there since (wandb/synced.json), is not asked for again.
    """
    groups = sorted({str(one.config["sweep"]) for one in arrivals})
    server = Project(path, filters={"group": {"$in": groups}}, create=True)
    there = [one for one in arrivals if one.run_id in server.runs]
    for one in there:
        run = server.runs[one.run_id]
        one.known = _found_whole(one) == [path, run.version, _local_key(one)]
        one.result_there = one.known or one.result is None or f"{RESULT_PREFIX}loss" in run.summary
    to_read = [one for one in there if not one.known]
    server.read_histories(one.run_id for one in to_read)
    for one in to_read:
        run = server.runs[one.run_id]
        one.there = set(_marked(run.history))
        if one.whole:
            write_json(_marker(one), [path, run.version, _local_key(one)])
    return [one for one in arrivals if not one.known and one.to_upload]


def _marker(one: Arrival) -> Path:
    return one.run_dir / "wandb" / "synced.json"


def _found_whole(one: Arrival) -> Any:
    try:
        return read_json(_marker(one)) if _marker(one).is_file() else None
    except UserError:  # torn: it is asked for again
        return None


def _upload_files(path: str, arrivals: Sequence[Arrival]) -> None:
    """`wandb sync` of the attempts of which the server has nothing, the first of every run, then the second, ...

    Each once: what `wandb sync` uploads at its second try counts W&B's steps from 0 again (tried, 0.31), and then the
    server hides rows behind others. What the first try did not bring goes row by row.
    """
    entity, project = path.split("/")
    waiting = [_untouched(one, path) for one in arrivals]
    while folders := [folders.pop(0) for folders in waiting if folders]:
        for folder in folders:
            write_json(folder.parent / "tried.json", [*_tried(folder.parent, path), [path, folder.name]])
        command = [sys.executable, "-m", "wandb", "sync", "--include-synced", "--include-online"]
        where = ["--entity", entity, "--project", project]
        paths = [str(folder.absolute()) for folder in folders]
        with tempfile.TemporaryDirectory() as here:  # it leaves logs of its own where it runs
            done = subprocess.run([*command, *where, *paths], cwd=here, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"wandb sync ended with {done.returncode}: {done.stderr.strip()[-300:]}", file=sys.stderr, flush=True)


def _tried(folder: Path, path: str) -> list[list[str]]:
    """(ENTITY/PROJECT, folder of an attempt) of each `wandb sync` that was begun; all of them where that is torn."""
    try:
        tried: list[list[str]] = read_json(folder / "tried.json") if (folder / "tried.json").is_file() else []
    except UserError:
        tried = [[path, attempt.name] for attempt in folder.iterdir()]
    return tried


def _untouched(one: Arrival, path: str) -> list[Path]:
    """The folders of the attempts that have rows, none of them on the server, in their order."""
    parts = [(part.path.parent, _marked(part.history).keys()) for part in one.attempts if part.path is not None]
    tried = _tried(one.run_dir / "wandb", path)
    return [folder for folder, marks in parts if marks and not marks & one.there and [path, folder.name] not in tried]


def _upload_rows(path: str, one: Arrival) -> None:
    """Log what the server lacks into its run of that id, as the run itself would have, and the last values again."""
    import wandb

    entity, project = path.split("/")
    quiet = wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off")
    last: Row = {}
    for row in one.rows.values():
        last |= row
    if one.result is not None:
        last |= {RESULT_PREFIX + key: value for key, value in dataclasses.asdict(one.result).items()}
    try:
        told = _description(one)
    except UNREADABLE as error:
        one.trouble.append(f"its config.yaml or env.json cannot be read: {said_of(error)}")
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = wandb.init(
                entity=entity, project=project, id=one.run_id, name=one.run_dir.name, group=one.config["sweep"],
                tags=(one.config.get("logger") or {}).get("tags"), resume="allow", mode="online", dir=folder,
                settings=quiet, reinit="finish_previous",
            )  # fmt: skip
            try:
                run.config.update(told, allow_val_change=True)  # type: ignore[no-untyped-call]
                for row in one.lacking:
                    run.log({**row, "trainer/global_step": row["step"]})
                run.summary.update(last)  # type: ignore[no-untyped-call]
            finally:  # the next run is to be its own
                run.finish(exit_code=_exit_code(one))
    except (wandb.errors.Error, ConnectionError) as error:
        said = " ".join(str(error).split())
        if any(words in said for words in REFUSED_BY_WANDB):
            raise UserError(f"W&B refuses runs in {path}: {said}; give ENTITY/PROJECT as its page says") from error
        one.trouble.append(said)


def _exit_code(one: Arrival) -> int:
    """What the run ended with, as W&B is to show it: of a run that never said so, that it failed unless it is done."""
    status = read_status(one.run_dir)
    said = [None if status is None else status.exit_code, *(part.exit_code for part in reversed(one.attempts))]
    known = [code for code in said if code is not None]
    return known[0] if known else int(one.result is None)


def _description(one: Arrival) -> Row:
    """What the run told, or would have told, W&B of itself at its start."""
    if "record" in one.config:  # its config was found in W&B's own file, with all that it told then
        return dict(one.config)
    env = one.run_dir / "env.json"
    attempts = read_json(env)["attempts"] if env.is_file() else []
    facts = {key: attempts[-1].get(key) for key in ("git_sha", "device")} if attempts else {}
    if one.result is not None:
        facts["data_hash"] = one.result.data_hash
    return described(one.config, derive(one.config), attempt=len(attempts), **facts)
