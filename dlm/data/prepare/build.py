"""Prepare a data set from sources of text with several processes. An interrupted preparation can be resumed.

The data set is built in the folder .NAME.building next to the target folder: plan.json holds the sources and options,
done.jsonl lists the units that are written, and data/ becomes the data set. The same sources and options give the same
bytes, regardless of the number of workers and of interruptions. A unit that is written is used as long as its files do
not change, whatever happens to other files.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any

from dlm.core.errors import UserError
from dlm.core.files import append_jsonl, write_json
from dlm.core.identity import content_hash
from dlm.core.lease import Lease
from dlm.core.typed import read_log, read_typed
from dlm.data.manifest import MANIFEST, Manifest, PackedFile, read_manifest, write_manifest
from dlm.data.prepare.documents import Unit
from dlm.data.prepare.encode import FILE_TOKENS, KEYS, Encoder, TextJob, UnitRecord, check_number, digests_path
from dlm.data.prepare.hub import HubData, check_not_moved, check_sources, fetch, find_hub_data
from dlm.data.prepare.place import make_building, move_into_place, undamaged
from dlm.data.prepare.progress import with_progress
from dlm.data.prepare.splits import TRAIN, VALIDATION, Splits, find_splits
from dlm.data.prepare.summary import notes_on, num_documents
from dlm.data.prepare.tokenizer import Tokenizer, load_tokenizer
from dlm.data.prepare.units import make_units

SPLITS = (TRAIN, VALIDATION)
IN_TEXT = range(1, 245)  # bytes that UTF-8 text may hold, besides NUL
LAYOUT = 2  # of the folder in which a data set is built; folders of another layout are not continued


def prepare_text(job: TextJob, data_dir: Path, *, workers: int) -> Manifest:
    """Prepare a data set, or resume an interrupted preparation of it.

    Args:
        job: The sources and options.
        data_dir: The folder to create.
        workers: The number of worker processes.

    Returns:
        The manifest of the data set.

    Raises:
        UserError: The sources or options do not define a valid data set, or ``data_dir`` holds other data, or another
            preparation is unfinished. Nothing is overwritten.
    """
    is_of_hub = check_sources(job)
    tokenizer = _tokenizer(job, workers)
    assert tokenizer.bos_id is not None
    hub = find_hub_data(job) if is_of_hub else None
    splits = None if hub else _splits(job)
    units = make_units(splits.files) if splits else []
    plan = _plan(job, tokenizer, units, hub)
    finished = _finished(data_dir, plan)
    if finished is not None:
        print(f"{data_dir} is complete: nothing to do")
        return finished
    building = make_building(data_dir)
    with Lease(building):
        _check_plan(building, plan)
        if hub:
            splits, units = fetch(hub, job, tokenizer, building)
        assert splits is not None
        records = _build(job, dict(zip(_keys(units), units, strict=True)), building, workers)
        try:
            _check_splits(job, records)
        except UserError:
            shutil.rmtree(building)  # resuming would fail here again; a retry needs other sources or options
            raise
        manifest = Manifest(
            name=job.name,
            tokenizer=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            splits=_numbered(job, records, building / "data"),
            notes={
                "sources": [*plan["sources"], *job.validation_sources],
                **({"hub": {**plan["hub"], "tokens_asked": job.tokens}} if "hub" in plan else {}),
                **notes_on(splits, units, records),
                "eos_id": tokenizer.eos_id,
                "tokenizer_sha256": tokenizer.sha256,
                "plan": content_hash(plan)[:16],
            },
        )
        _write_whole(building / "data", manifest)
    move_into_place(building / "data", data_dir, manifest)
    shutil.rmtree(building)
    return manifest


def _tokenizer(job: TextJob, threads: int = 1) -> Tokenizer:
    """Load the tokenizer with the ids that the job sets. Raises UserError for missing or invalid ids."""
    control_ids = {token for token in (job.eos_id, job.bos_id) if token is not None}
    found = load_tokenizer(job.tokenizer, threads=threads, control_ids=control_ids)
    eos_id = found.eos_id if job.eos_id is None else job.eos_id
    if eos_id is None:
        raise UserError(f"the tokenizer {job.tokenizer} does not say which token ends a text: set --eos-id")
    bos_id = found.bos_id if job.bos_id is None else job.bos_id
    bos_id = eos_id if bos_id is None else bos_id  # as in GPT-2: the token that ends a text also precedes the next
    vocab_size = found.vocab_size if job.vocab_size is None else job.vocab_size
    for key, value in (("--eos-id", eos_id), ("--bos-id", bos_id)):
        if found.library is None and value in IN_TEXT:
            raise UserError(f"{key} is {value}, a byte that documents hold: with bytes, allowed are 0 and 245 to 255")
        if not 0 <= value < vocab_size:
            raise UserError(f"{key} is {value}: allowed are ids below the vocabulary size {vocab_size}")
    return dataclasses.replace(found, vocab_size=vocab_size, eos_id=eos_id, bos_id=bos_id)


def _plan(job: TextJob, tokenizer: Tokenizer, units: Sequence[Unit], hub: HubData | None) -> dict[str, Any]:
    """Return everything that determines the bytes of the data set, as plain JSON values.

    Of a data set of the hub, its commit stands for the files, which may not be on this disk yet.
    """
    # Options that earlier versions did not have are left out where they change nothing, so that data sets which these
    # versions made are recognized.
    options = {f.name: getattr(job, f.name) for f in dataclasses.fields(job) if getattr(job, f.name) != f.default}
    plan = {
        **options,
        "tokenizer": tokenizer.sha256 or tokenizer.name,
        "library": tokenizer.library and f"{tokenizer.library} {metadata.version(tokenizer.library)}",
        "file_tokens": FILE_TOKENS,
        "units": [[unit.split, unit.start, unit.stop, *unit.paths] for unit in units],
        "files": _state_of(units),
    }
    if tokenizer.library == "tokenizers":  # with it, earlier versions encoded the names of control tokens as these
        plan["control_tokens"] = tokenizer.control
    if hub:
        plan |= {"sources": [hub.source], "hub": hub.facts()}
    as_stored: dict[str, Any] = json.loads(json.dumps(plan))
    return as_stored


def _finished(data_dir: Path, plan: dict[str, Any]) -> Manifest | None:
    """Return the manifest of this plan's data set in ``data_dir``, or None if the data set is missing or damaged.

    Raises UserError if ``data_dir`` holds anything else.
    """
    if not data_dir.exists() or (data_dir.is_dir() and not any(data_dir.iterdir())):
        return None
    path = data_dir / MANIFEST
    manifest = read_typed(path, dict[str, Any], what="manifest", otherwise="move it away") if path.is_file() else {}
    notes = manifest.get("notes")
    if not isinstance(notes, dict) or notes.get("plan") != content_hash(plan)[:16]:
        check_not_moved(plan.get("hub"), notes.get("hub") if isinstance(notes, dict) else None, data_dir)
        raise UserError(
            f"{data_dir} exists and was not made from these sources with these options: choose another --out or move "
            "it away"
        )
    return undamaged(data_dir)


def _splits(job: TextJob) -> Splits:
    return find_splits(
        [Path(p) for p in job.sources],
        [Path(p) for p in job.validation_sources],
        train_globs=job.train_globs,
        validation_globs=job.validation_globs,
        skip_unreadable=job.skip_unreadable,
    )


def _state_of(units: Sequence[Unit]) -> dict[str, list[int]]:
    """Return the size and the time of the last change of every file of the units."""
    stats = {path: Path(path).stat() for unit in units for path in unit.paths}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def _keys(units: Sequence[Unit]) -> list[str]:
    """Return a key for each unit that changes if one of its files does.

    What a training unit leaves out depends on the documents of all validation units, and so does its key.
    """
    files = _state_of(units)
    own = [
        content_hash([unit.split, unit.start, unit.stop, *([path, *files[path]] for path in unit.paths)])
        for unit in units
    ]
    held_out = [key for key, unit in zip(own, units, strict=True) if unit.split == VALIDATION]
    return [
        content_hash([key, *(held_out if unit.split == TRAIN else ())])[:16]
        for key, unit in zip(own, units, strict=True)
    ]


def _check_plan(building: Path, plan: dict[str, Any]) -> None:
    """Write the plan of this preparation.

    Raises UserError if the folder holds units of a preparation with other sources or options.
    """
    path = building / "plan.json"
    advice = f"delete the folder {building} to start over"
    before = read_typed(path, dict[str, Any], what="plan", otherwise=advice) if path.is_file() else None
    if before is not None and any((building / name).is_file() for name in ("done.jsonl", "hub.jsonl")):
        if before.get("layout") != LAYOUT:
            raise UserError(f"{building} holds an unfinished preparation of another version of dlm: delete that folder")
        check_not_moved(plan.get("hub"), before.get("hub"), building)
        if difference := _difference(before, plan):
            raise UserError(
                f"{building} holds an unfinished preparation of other sources or options ({difference}): repeat its "
                "command to continue it, or delete that folder to start over"
            )
    write_json(path, {"layout": LAYOUT, **plan})


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the options that differ. What is left out, and files that changed, concern only some of the units.

    With a data set of the hub, the tokens that were counted depend on what was left out as too long.
    """
    free = {"layout", "units", "files", "skip_bad", "skip_unreadable", *(() if "hub" in now else ("max_document",))}
    options = [key for key in {**before, **now} if key not in free and before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}" for key in options)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _build(job: TextJob, units: Mapping[str, Unit], building: Path, workers: int) -> list[UnitRecord]:
    """Encode every unit that is not done, and return the records of all units in order."""
    validation = [key for key, unit in units.items() if unit.split == VALIDATION]
    rest = [key for key, unit in units.items() if unit.split != VALIDATION]
    limit = round(job.validation_share * KEYS)
    with EncoderPool(job, building, units, workers) as pool:
        records = pool.run(validation, limit=0) | pool.run(rest, limit=limit)
        smallest = {key: found for key in rest if (found := records[key].smallest) is not None}
        if smallest and not any(VALIDATION in record.files for record in records.values()):
            limit = min(smallest.values()) + 1  # the share held out none of the few documents: hold out one
            records |= pool.run([key for key, found in smallest.items() if found < limit], limit=limit)
    return [records[key] for key in units]


class EncoderPool:
    """A pool of processes that encode units. They start when the first unit is to be encoded.

    A single process would only wait for another, so with one worker or one unit this process encodes by itself.
    """

    def __init__(self, job: TextJob, building: Path, units: Mapping[str, Unit], workers: int) -> None:
        self.job, self.building, self.units, self.log = job, building, units, building / "done.jsonl"
        records = read_log(self.log, UnitRecord, otherwise=f"delete the folder {building} to start over")
        self.done: dict[tuple[str, int], UnitRecord] = {
            (one.key, one.limit): one for one in records if self._is_whole(one)
        }
        self._bad: dict[str, list[str]] = {}
        processes = min(workers, len(units))
        held_out = [key for key, unit in units.items() if unit.split == VALIDATION]
        self._arguments = (job, building, held_out, max(workers // processes, 1))
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, spawn, _start_worker, self._arguments)
        self._others = multiprocessing.active_children()  # child processes of the calling program

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:  # partly encoded units will be encoded again
            for process in set(multiprocessing.active_children()) - set(self._others):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def _is_whole(self, record: UnitRecord) -> bool:
        """Return whether a record is that of a unit of this preparation and all of its files have their sizes.

        The files of a unit that was encoded twice belong to the later record.
        """
        if record.key not in self.units or not record.fits(self.job):
            return False
        paths = [(self.building / "data" / file.name, file.bytes) for files in record.files.values() for file in files]
        digests = self.units[record.key].split != VALIDATION or digests_path(self.building, record.key).is_file()
        return digests and all(path.is_file() and path.stat().st_size == size for path, size in paths)

    def run(self, keys: Sequence[str], *, limit: int) -> dict[str, UnitRecord]:
        """Encode those of the units ``keys`` that are not done, and return the records of all of them."""
        found = {key: self.done[key, limit] for key in keys if (key, limit) in self.done}
        self._check(found.values())
        todo = [key for key in keys if key not in found]
        if not todo:
            return found
        sizes = {key: self.units[key].size for key in todo}
        return found | {record.key: record for record in with_progress(self._encode(todo, limit), sizes)}

    def _encode(self, todo: Sequence[str], limit: int) -> Iterator[UnitRecord]:
        """Encode units, log each record when its unit is written, and yield it."""
        try:
            for record in self._records(todo, limit):
                append_jsonl(self.log, dataclasses.asdict(record))
                self._check([record])
                yield record
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, perhaps for want of memory: run the command again with fewer --workers; it goes "
                "on where it stopped"
            ) from error

    def _records(self, todo: Sequence[str], limit: int) -> Iterator[UnitRecord]:
        """Encode units and yield their records as they are done."""
        if self._pool is None:
            encoder = _encoder_of(*self._arguments)
            for key in todo:
                yield encoder.encode_unit(key, self.units[key], limit)
            return
        # The workers inherit the mask, so that Ctrl-C reaches this process alone, even while they import.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [self._pool.submit(_work, key, self.units[key], limit) for key in todo]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in as_completed(futures):
            yield future.result()

    def _check(self, records: Iterable[UnitRecord]) -> None:
        """Raise UserError if the units so far have more rows without text than the user allows."""
        self._bad |= {record.key: record.bad for record in records if record.bad}
        check_number([row for rows in self._bad.values() for row in rows], self.job.skip_bad)


def _encoder_of(job: TextJob, building: Path, held_out: Sequence[str], threads: int) -> Encoder:
    return Encoder(job=job, tokenizer=_tokenizer(job, threads), building=building, held_out=held_out)


_encoder: Encoder  # global of a worker process, set by _start_worker


def _start_worker(job: TextJob, building: Path, held_out: Sequence[str], threads: int) -> None:
    """Load the tokenizer once per worker, and make the worker end when its parent process ends for any reason."""
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    _encoder = _encoder_of(job, building, held_out, threads)


def _end_with_parent() -> None:
    """Exit when the parent process ends. Otherwise the workers of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(key: str, unit: Unit, limit: int) -> UnitRecord:
    return _encoder.encode_unit(key, unit, limit)


def _numbered(job: TextJob, records: Sequence[UnitRecord], folder: Path) -> dict[str, tuple[PackedFile, ...]]:
    """Give the files of the units names with the numbers of the units, and return the files of each split in order."""
    splits: dict[str, list[PackedFile]] = {split: [] for split in SPLITS}
    for number, record in enumerate(records):
        for split, files in record.files.items():
            for counter, file in enumerate(files):
                name = f"{split}_{job.name}_{number:06d}_{counter:010d}.bin"
                (folder / file.name).rename(folder / name)
                splits[split].append(dataclasses.replace(file, name=name))
    return {split: tuple(files) for split, files in splits.items()}


def _check_splits(job: TextJob, records: Sequence[UnitRecord]) -> None:
    """Raise UserError if a split has no documents."""
    where, documents = ", ".join(job.sources), num_documents(records)
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
    """Write the manifest, and delete files that it does not name, such as partial files of a killed process."""
    named = {file.name for files in manifest.splits.values() for file in files}
    for path in folder.iterdir():
        if path.name not in named:
            path.unlink()
    write_manifest(folder, manifest)
    read_manifest(folder)  # raises UserError for a missing file or a wrong size
