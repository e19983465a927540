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

from dlm.errors import UserError
from dlm.files import Lease, live_holder, read_json, read_jsonl, write_json
from dlm.groups import load_yaml
from dlm.history import Key, key_of
from dlm.recipe import derive
from dlm.record import RESULT_PREFIX, described, read_result
from dlm.wandb_api import Project, default_entity
from dlm.wandb_file import WandbRun, attempts_of, wandb_files

Row = dict[str, Any]
Mark = tuple[int, float]  # the optimiser step and the time of a row: no two measurements of a run share both


@dataclass(kw_only=True)
class Arrival:
    """One run, and what of it the server has."""

    run_id: str
    run_dir: Path
    skipped: str | None = None  # why it was not looked at
    known: bool = False  # found whole before, and changed nowhere since
    there: set[Mark] = field(default_factory=set)  # on the server
    result_there: bool = False
    uploaded: int = 0  # rows, by this sync
    trouble: list[str] = field(default_factory=list)

    @functools.cached_property
    def rows(self) -> dict[Mark, Row]:
        """Every row that any attempt logged, as its own directory tells it."""
        rows: dict[Mark, Row] = {}
        for part in self.attempts:
            rows |= _marked(part.history)
        return rows | _marked(read_jsonl(self.run_dir / "metrics.jsonl"))

    @functools.cached_property
    def attempts(self) -> list[WandbRun]:
        """Its .wandb files, each read once."""
        return attempts_of(self.run_dir, WandbRun(run_id=self.run_id))

    @property
    def lacking(self) -> list[Row]:
        """What the server does not have, oldest first."""
        return [] if self.known else [row for mark, row in self.rows.items() if mark not in self.there]

    @property
    def whole(self) -> bool:
        """Whether all of it has arrived."""
        return self.known or (self.skipped is None and not self.lacking and self.result_there)


def sync(sweep_dir: Path, *, project: str | None = None) -> list[Arrival]:
    """Upload what a server lacks of every run that is not going on just now; the truth about each.

    ``project`` is ENTITY/PROJECT, by default the user's own entity and the project that the runs' configs name. Raises
    UserError without a run, a login or a server, and while another process syncs this sweep.
    """
    found = sorted(sweep_dir.glob("runs/*/config.yaml"))
    if not found:
        raise UserError(f"{sweep_dir} holds no run: give the folder of a sweep that has begun")
    with Lease(sweep_dir / "ledger", doing="synced"):  # two at once would both upload what the server lacks
        return _sync([one.parent for one in found], project)


def _sync(run_dirs: Sequence[Path], project: str | None) -> list[Arrival]:
    # The name that the runs logged under, which is not the folder's once that has been moved or copied.
    sweep = _config_of(run_dirs[0])["sweep"]
    path = project or f"{default_entity()}/{_project_of(run_dirs[0])}"
    arrivals = [Arrival(run_id=f"{_config_of(one)['sweep']}-{one.name}", run_dir=one) for one in run_dirs]
    for one in arrivals:
        holder = live_holder(one.run_dir)
        if holder is not None:
            one.skipped = f"it runs (process {holder['pid']} on {holder['host']}): sync again when it has ended"
    left = _ask(path, sweep, [one for one in arrivals if one.skipped is None])
    before = {one.run_id: len(one.lacking) for one in left}
    if left:
        _upload_files(path, left)
        for one in _ask(path, sweep, left):
            _upload_rows(path, one)
        _ask(path, sweep, left)
    for one in left:
        one.uploaded = before[one.run_id] - len(one.lacking)
    return arrivals


def _marked(rows: Iterable[Mapping[str, Any]]) -> dict[Mark, Row]:
    """The rows that dlm logged, by their marks; what W&B adds of its own is left out."""
    found = {}
    for row in rows:
        step, time = row.get("step"), row.get("time")
        if isinstance(step, (int, float)) and isinstance(time, (int, float)):
            mark = int(step), float(time)
            found[mark] = {key: value for key, value in row.items() if not key.startswith("_")}
    return found


def _config_of(run_dir: Path) -> Any:
    config = load_yaml(run_dir / "config.yaml")
    if not isinstance(config, dict) or "sweep" not in config:
        raise UserError(f"{run_dir / 'config.yaml'} is not the config of a run: move that folder away, then sync again")
    return config


def _project_of(run_dir: Path) -> str:
    logger = _config_of(run_dir).get("logger") or {}
    return str(logger.get("project") or "dlm")


def _local_key(one: Arrival) -> Key:
    files = [*wandb_files(one.run_dir), one.run_dir / "metrics.jsonl", one.run_dir / "result.json"]
    return key_of([path for path in files if path.is_file()], one.run_dir)


def _ask(path: str, sweep: str, arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Look up what the server has of each; those of which it lacks something.

    What was found whole, and has changed neither here nor there since (wandb/synced.json), is not asked for again.
    """
    server = Project(path, filters={"group": sweep}, missing_ok=True)
    there = [one for one in arrivals if one.run_id in server.runs]
    for one in there:
        run = server.runs[one.run_id]
        one.result_there = read_result(one.run_dir) is None or f"{RESULT_PREFIX}loss" in run.summary
        one.known = _found_whole(one) == [path, run.version, _local_key(one)]
    to_read = [one for one in there if not one.known]
    server.read_histories(one.run_id for one in to_read)
    for one in to_read:
        run = server.runs[one.run_id]
        one.there = set(_marked(run.history))
        if one.whole:
            write_json(_marker(one), [path, run.version, _local_key(one)])
    return [one for one in arrivals if not one.whole]


def _marker(one: Arrival) -> Path:
    return one.run_dir / "wandb" / "synced.json"


def _found_whole(one: Arrival) -> Any:
    return read_json(_marker(one)) if _marker(one).is_file() else None


def _upload_files(path: str, arrivals: Sequence[Arrival]) -> None:
    """`wandb sync` of the attempts of which the server has nothing, the first of every run, then the second, ...

    Each once: what `wandb sync` uploads at its second try counts W&B's steps from 0 again (tried, 0.31), and then the
    server hides rows behind others. What the first try did not bring goes row by row.
    """
    entity, project = path.split("/")
    waiting = [_untouched(one, path) for one in arrivals]
    while folders := [folders.pop(0) for folders in waiting if folders]:
        for folder in folders:
            write_json(folder.parent / "tried.json", [*_tried(folder.parent), [path, folder.name]])
        command = [sys.executable, "-m", "wandb", "sync", "--include-synced", "--include-online"]
        where = ["--entity", entity, "--project", project]
        paths = [str(folder.absolute()) for folder in folders]
        with tempfile.TemporaryDirectory() as here:  # it leaves logs of its own where it runs
            done = subprocess.run([*command, *where, *paths], cwd=here, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"wandb sync ended with {done.returncode}: {done.stderr.strip()[-300:]}", file=sys.stderr, flush=True)


def _tried(folder: Path) -> list[list[str]]:
    """(ENTITY/PROJECT, folder of an attempt) of each `wandb sync` that was begun."""
    path = folder / "tried.json"
    return read_json(path) if path.is_file() else []


def _untouched(one: Arrival, path: str) -> list[Path]:
    """The folders of the attempts that have rows, none of them on the server, in their order."""
    parts = [(part.path.parent, _marked(part.history).keys()) for part in one.attempts if part.path is not None]
    tried = _tried(one.run_dir / "wandb")
    return [folder for folder, marks in parts if marks and not marks & one.there and [path, folder.name] not in tried]


def _upload_rows(path: str, one: Arrival) -> None:
    """Log what the server lacks into its run of that id, as the run itself would have, and the last values again."""
    import wandb

    entity, project = path.split("/")
    config, result = load_yaml(one.run_dir / "config.yaml"), read_result(one.run_dir)
    quiet = wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off")
    last: Row = {}
    for row in one.rows.values():
        last |= row
    if result is not None:
        last |= {RESULT_PREFIX + key: value for key, value in dataclasses.asdict(result).items()}
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            wandb.init(entity=entity, project=project, id=one.run_id, name=one.run_dir.name, group=config["sweep"],
                       resume="allow", mode="online", dir=folder, settings=quiet) as run,
        ):  # fmt: skip
            described_so = _description(one.run_dir, config)
            run.config.update(described_so, allow_val_change=True)  # type: ignore[no-untyped-call]
            for row in one.lacking:
                run.log({**row, "trainer/global_step": row["step"]})
            run.summary.update(last)  # type: ignore[no-untyped-call]
    except (wandb.errors.Error, ConnectionError) as error:
        one.trouble.append(" ".join(str(error).split()))


def _description(run_dir: Path, config: Mapping[str, Any]) -> Row:
    """What the run told, or would have told, W&B of itself at its start."""
    attempts = read_json(run_dir / "env.json")["attempts"] if (run_dir / "env.json").is_file() else []
    facts = {key: attempts[-1].get(key) for key in ("git_sha", "device")} if attempts else {}
    result = read_result(run_dir)
    if result is not None:
        facts["data_hash"] = result.data_hash
    return described(config, derive(config), attempt=len(attempts), **facts)
