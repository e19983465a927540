"""build: sources of text -> a prepared data set, by many processes, resumable. Called by prepare; no torch.

All of it happens in .NAME.building beside the target: plan.json says what was asked for, done.jsonl which units are
written, data/ becomes the data set. The same sources and options give the same bytes, whatever the number of workers
and however often it was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dlm.core.errors import UserError
from dlm.core.files import append_jsonl, read_json, read_jsonl, write_json
from dlm.core.identity import content_hash
from dlm.core.lease import Lease
from dlm.data.manifest import MANIFEST, Manifest, PackedFile, read_manifest, write_manifest
from dlm.data.prepare.documents import Unit, find_splits, make_units
from dlm.data.prepare.encode import FILE_TOKENS, SKIPPED, Form, Record, digests_path, encode_unit, read_digests
from dlm.data.prepare.place import move_into_place, read_whole
from dlm.data.prepare.progress import Progress
from dlm.data.prepare.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")


KEYS = 2**64  # of documents


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked for; all of it decides the bytes."""

    name: str
    sources: tuple[str, ...]
    validation_sources: tuple[str, ...]
    validation_share: float  # of the documents, where neither folders nor files say what to hold out
    text_key: str
    tokenizer: str  # bytes, or a file or folder
    vocab_size: int | None  # None: the tokenizer's own, as the two below
    eos_id: int | None
    bos_id: int | None
    add_bos: bool  # in front of every document


def prepare_text(job: Job, data_dir: Path, *, workers: int) -> Manifest:
    """Prepare ``job`` in ``data_dir``, or go on with it. Raises UserError, which loses and overwrites nothing."""
    tokenizer = _tokenizer(job)
    units = make_units(find_splits([Path(p) for p in job.sources], [Path(p) for p in job.validation_sources]))
    plan = _plan(job, tokenizer, units)
    if _is_there(data_dir, plan):
        return read_whole(data_dir)
    building = data_dir.parent / f".{data_dir.name}.building"
    building.mkdir(parents=True, exist_ok=True)
    with Lease(building):
        _check_plan(building, plan)
        records = _build(job, units, building, workers)
        try:
            _check_splits(job, records)
        except UserError:
            shutil.rmtree(building)  # going on would end here again, and other sources or options begin anew
            raise
        manifest = _describe(job, tokenizer, units, records)
        manifest = dataclasses.replace(manifest, notes={**manifest.notes, "plan": content_hash(plan)[:16]})
        _write_whole(building / "data", manifest)
    move_into_place(building / "data", data_dir)
    shutil.rmtree(building)
    return manifest


def _tokenizer(job: Job, threads: int = 1) -> Tokenizer:
    """The job's tokenizer with the job's own ids. Raises UserError for ids that make no data set."""
    found = load_tokenizer(job.tokenizer, threads=threads)
    eos_id = found.eos_id if job.eos_id is None else job.eos_id
    if eos_id is None:
        raise UserError(f"the tokenizer {job.tokenizer} does not say which token ends a text: set --eos-id")
    bos_id = found.bos_id if job.bos_id is None else job.bos_id
    bos_id = eos_id if bos_id is None else bos_id  # as GPT-2 does it: what ends one text stands before the next
    vocab_size = found.vocab_size if job.vocab_size is None else job.vocab_size
    for key, value in (("--eos-id", eos_id), ("--bos-id", bos_id)):
        if not 0 <= value < vocab_size:
            raise UserError(f"{key} is {value}: allowed are ids below the vocabulary size {vocab_size}")
    return dataclasses.replace(found, vocab_size=vocab_size, eos_id=eos_id, bos_id=bos_id)


def _plan(job: Job, tokenizer: Tokenizer, units: Sequence[Unit]) -> dict[str, Any]:
    """What the bytes follow from, as plain values."""
    paths = dict.fromkeys(path for unit in units for path in unit.paths)
    stats = {path: Path(path).stat() for path in paths}
    return {
        **dataclasses.asdict(job),
        "tokenizer": tokenizer.sha256 or tokenizer.name,
        "library": tokenizer.library and f"{tokenizer.library} {metadata.version(tokenizer.library)}",
        "file_tokens": FILE_TOKENS,
        "units": [[unit.split, unit.start, unit.stop, *unit.paths] for unit in units],
        "files": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
    }


def _is_there(data_dir: Path, plan: dict[str, Any]) -> bool:
    """Whether the very same was prepared before. Raises UserError when something else is there."""
    if not data_dir.exists() or (data_dir.is_dir() and not any(data_dir.iterdir())):
        return False
    path = data_dir / MANIFEST
    notes = read_json(path).get("notes", {}) if path.is_file() else {}
    if notes.get("plan") != content_hash(plan)[:16]:
        raise UserError(
            f"{data_dir} exists and was not made from these sources with these options: choose another --out or move "
            "it away"
        )
    try:
        return read_manifest(data_dir) is not None
    except UserError:  # damaged: it is made anew
        return False


def _check_plan(building: Path, plan: dict[str, Any]) -> None:
    """Write the plan of a new preparation. Raises UserError when another one was begun here."""
    path = building / "plan.json"
    if not path.is_file():
        write_json(path, plan)
        return
    before, now = read_json(path), json.loads(json.dumps(plan))
    if before == now:
        return
    changed = [key for key in now if before.get(key) != now[key]]
    told = [f"{key} was {_short(before.get(key))}, is {_short(now[key])}" for key in changed if key not in _LONG]
    raise UserError(
        f"{building} holds an unfinished preparation of other sources or options "
        f"({'; '.join(told) or _moved(before, now)}): repeat its command to go on with it, or delete that folder to "
        "start over"
    )


_LONG = ("units", "files")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _moved(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first source file that is another than before."""
    old, new = before.get("files", {}), now["files"]
    return next((f"{path} changed" for path in {**old, **new} if old.get(path) != new.get(path)), "other units")


def _build(job: Job, units: Sequence[Unit], building: Path, workers: int) -> list[Record]:
    """Encode every unit that is not done; the records of all, in order."""
    with Crew(job, building, units, workers) as crew:
        crew.run([n for n, unit in enumerate(units) if unit.split == "validation"])
        limit = round(job.validation_share * KEYS)
        rest = [n for n, unit in enumerate(units) if unit.split != "validation"]
        crew.run(rest, limit=limit)
        keys = {n: key for n in rest if (key := crew.records[n].smallest) is not None}
        if keys and not any("validation" in record.files for record in crew.records.values()):
            limit = min(keys.values()) + 1  # so few documents that the share held none out: hold out one
            crew.run([n for n, key in keys.items() if key < limit], limit=limit)
        return [crew.records[n] for n in range(len(units))]


class Crew:
    """Processes that encode units, and the records of those that are done."""

    def __init__(self, job: Job, building: Path, units: Sequence[Unit], workers: int) -> None:
        self.job, self.building, self.units, self.workers = job, building, units, workers
        records = map(Record.from_json, read_jsonl(building / "done.jsonl"))
        self.done = {(record.unit, record.limit): record for record in records if self._is_whole(record)}
        self.records: dict[int, Record] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._others = multiprocessing.active_children()  # of the program that prepares the data

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # what is half done will be done again
            for process in set(multiprocessing.active_children()) - set(self._others):
                process.terminate()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _is_whole(self, record: Record) -> bool:
        """Whether what the record says is there: a unit done twice has the later record's files."""
        paths = [(self.building / "data" / file.name, file.bytes) for files in record.files.values() for file in files]
        digests = self.units[record.unit].split != "validation" or digests_path(self.building, record.unit).is_file()
        return digests and all(path.is_file() and path.stat().st_size == size for path, size in paths)

    def run(self, numbers: Sequence[int], *, limit: int = 0) -> None:
        """Encode the units ``numbers``, those that are not done, and keep every unit's record."""
        found = {number: self.done.get((number, limit)) for number in numbers}
        todo = [number for number, record in found.items() if record is None]
        self.records |= {number: record for number, record in found.items() if record is not None}
        if not todo:
            return
        with Progress([self.units[number].size for number in todo], "preparing") as progress:
            for record in self._encode(todo, limit):
                append_jsonl(self.building / "done.jsonl", dataclasses.asdict(record))
                self.records[record.unit] = self.done[record.unit, limit] = record
                progress.add(
                    self.units[record.unit].size,
                    documents=sum(record.documents.values()),
                    tokens=sum(file.tokens for files in record.files.values() for file in files),
                )

    def _encode(self, todo: Sequence[int], limit: int) -> Iterator[Record]:
        (self.building / "done.jsonl").touch()
        self._pool = self._pool or self._make_pool()
        waiting = {self._pool.submit(_work, number, self.units[number], limit) for number in todo}
        try:
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, by want of memory perhaps: run it again, with fewer --workers; it goes on where "
                "it stopped"
            ) from error

    def _make_pool(self) -> ProcessPoolExecutor:
        workers = min(self.workers, len(self.units))
        start = (self.job, str(self.building / "data"), max(self.workers // workers, 1))
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, start)


_form: Form  # of a worker


def _start_worker(job: Job, folder: str, threads: int) -> None:
    """Load the tokenizer once; end with the parent, however that ends."""
    global _form
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    _form = _make_form(job, folder, threads)


def _end_with_parent() -> None:
    """A pool's workers would wait for work for ever once their parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_form(job: Job, folder: str, threads: int) -> Form:
    tokenizer = _tokenizer(job, threads)
    assert tokenizer.eos_id is not None
    return Form(
        name=job.name,
        folder=folder,
        tokenizer=tokenizer,
        text_key=job.text_key,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id if job.add_bos else None,
    )


def _work(number: int, unit: Unit, limit: int) -> Record:
    held_out = _held_out(_form.folder) if unit.split == "train" else frozenset()
    return encode_unit(number, unit, _form, limit=limit, held_out=held_out)


@functools.cache
def _held_out(folder: str) -> frozenset[bytes]:
    """Read once: units of a train split come after all of the validation split."""
    return read_digests(Path(folder).parent)


def _describe(job: Job, tokenizer: Tokenizer, units: Sequence[Unit], records: Sequence[Record]) -> Manifest:
    """The manifest of everything that was written."""
    splits: dict[str, tuple[PackedFile, ...]] = {
        split: tuple(file for record in records for file in record.files.get(split, ())) for split in SPLITS
    }
    assert tokenizer.bos_id is not None
    return Manifest(
        name=job.name,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        splits=splits,
        notes={
            "sources": [*job.sources, *job.validation_sources],
            "files": len({path for unit in units for path in unit.paths}),
            "bytes": sum(unit.size for unit in units),
            "documents": _documents(records),
            "skipped": {reason: sum(record.skipped[reason] for record in records) for reason in SKIPPED},
            "eos_id": tokenizer.eos_id,
            "tokenizer_sha256": tokenizer.sha256,
        },
    )


def _documents(records: Sequence[Record]) -> dict[str, int]:
    return {split: sum(record.documents.get(split, 0) for record in records) for split in SPLITS}


def _check_splits(job: Job, records: Sequence[Record]) -> None:
    """Raise UserError when a split is empty."""
    where, documents = ", ".join(job.sources), _documents(records)
    if not any(documents.values()):
        raise UserError(f"{where} holds no documents: give files with text")
    if not documents["validation"]:
        raise UserError(f"the validation files of {where} hold no documents: give others with --validation-source")
    if not documents["train"]:
        raise UserError(
            f"{where} leaves no documents to train on, {documents['validation']} were held out: give more text, lower "
            f"--validation-share {job.validation_share:g}, or name the held-out files with --validation-source"
        )


def _write_whole(folder: Path, manifest: Manifest) -> None:
    """The manifest, and nothing beside what it names: a process that was killed may have left half a file."""
    for path in folder.iterdir():
        if path.name not in {file.name for files in manifest.splits.values() for file in files}:
            path.unlink()
    write_manifest(folder, manifest)
    read_whole(folder)
