"""Prepare a data set from sources of text with several processes. An interrupted preparation can be resumed.

The data set is built in the folder .NAME.building next to the target folder: plan.json holds the sources and options,
done.jsonl lists the units that are written, and data/ becomes the data set. The same sources and options give the same
bytes, regardless of the number of workers and of interruptions.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dlm.core.errors import UserError
from dlm.core.files import append_jsonl, read_json, read_jsonl, write_json
from dlm.core.identity import content_hash
from dlm.core.lease import Lease
from dlm.data.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from dlm.data.prepare.documents import Unit, find_splits, make_units
from dlm.data.prepare.encode import FILE_TOKENS, SKIPPED, Encoder, TextJob, UnitRecord, digests_path
from dlm.data.prepare.place import move_into_place, undamaged
from dlm.data.prepare.progress import with_progress
from dlm.data.prepare.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")


KEYS = 2**64  # the number of possible keys of a document


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
    tokenizer = _tokenizer(job)
    units = make_units(find_splits([Path(p) for p in job.sources], [Path(p) for p in job.validation_sources]))
    plan = _plan(job, tokenizer, units)
    finished = _finished(data_dir, plan)
    if finished is not None:
        return finished
    building = data_dir.parent / f".{data_dir.name}.building"
    building.mkdir(parents=True, exist_ok=True)
    with Lease(building):
        _check_plan(building, plan)
        records = _build(job, units, building, workers)
        try:
            _check_splits(job, records)
        except UserError:
            shutil.rmtree(building)  # resuming would fail here again; a retry needs other sources or options
            raise
        manifest = _describe(job, tokenizer, units, records, plan)
        _write_whole(building / "data", manifest)
    move_into_place(building / "data", data_dir, manifest)
    shutil.rmtree(building)
    return manifest


def _tokenizer(job: TextJob, threads: int = 1) -> Tokenizer:
    """Load the tokenizer with the ids that the job sets. Raises UserError for missing or invalid ids."""
    found = load_tokenizer(job.tokenizer, threads=threads)
    eos_id = found.eos_id if job.eos_id is None else job.eos_id
    if eos_id is None:
        raise UserError(f"the tokenizer {job.tokenizer} does not say which token ends a text: set --eos-id")
    bos_id = found.bos_id if job.bos_id is None else job.bos_id
    bos_id = eos_id if bos_id is None else bos_id  # as in GPT-2: the token that ends a text also precedes the next
    vocab_size = found.vocab_size if job.vocab_size is None else job.vocab_size
    for key, value in (("--eos-id", eos_id), ("--bos-id", bos_id)):
        if not 0 <= value < vocab_size:
            raise UserError(f"{key} is {value}: allowed are ids below the vocabulary size {vocab_size}")
    return dataclasses.replace(found, vocab_size=vocab_size, eos_id=eos_id, bos_id=bos_id)


def _plan(job: TextJob, tokenizer: Tokenizer, units: Sequence[Unit]) -> dict[str, Any]:
    """Return everything that determines the bytes of the data set, as plain JSON values."""
    stats = {path: Path(path).stat() for unit in units for path in unit.paths}
    plan = {
        **dataclasses.asdict(job),
        "tokenizer": tokenizer.sha256 or tokenizer.name,
        "library": tokenizer.library and f"{tokenizer.library} {metadata.version(tokenizer.library)}",
        "file_tokens": FILE_TOKENS,
        "units": [[unit.split, unit.start, unit.stop, *unit.paths] for unit in units],
        "files": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
    }
    as_stored: dict[str, Any] = json.loads(json.dumps(plan))
    return as_stored


def _finished(data_dir: Path, plan: dict[str, Any]) -> Manifest | None:
    """Return the manifest of this plan's data set in ``data_dir``, or None if the data set is missing or damaged.

    Raises UserError if ``data_dir`` holds anything else.
    """
    if not data_dir.exists() or (data_dir.is_dir() and not any(data_dir.iterdir())):
        return None
    path = data_dir / MANIFEST
    notes = read_json(path).get("notes", {}) if path.is_file() else {}
    if notes.get("plan") != content_hash(plan)[:16]:
        raise UserError(
            f"{data_dir} exists and was not made from these sources with these options: choose another --out or move "
            "it away"
        )
    return undamaged(data_dir)


def _check_plan(building: Path, plan: dict[str, Any]) -> None:
    """Write the plan of a new preparation. Raises UserError if the folder holds a preparation with another plan."""
    path = building / "plan.json"
    if not path.is_file():
        write_json(path, plan)
        return
    before = read_json(path)
    if before != plan:
        raise UserError(
            f"{building} holds an unfinished preparation of other sources or options ({_difference(before, plan)}): "
            "repeat its command to continue it, or delete that folder to start over"
        )


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the options that differ or, if none does, the first source file that changed."""
    options = [key for key in now if key not in ("units", "files") and before.get(key) != now[key]]
    if options:
        return "; ".join(f"{key} was {_short(before.get(key))}, is {_short(now[key])}" for key in options)
    old, new = before.get("files", {}), now["files"]
    return next((f"{path} changed" for path in {**old, **new} if old.get(path) != new.get(path)), "other units")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _build(job: TextJob, units: Sequence[Unit], building: Path, workers: int) -> list[UnitRecord]:
    """Encode every unit that is not done, and return the records of all units in order."""
    validation = [number for number, unit in enumerate(units) if unit.split == "validation"]
    rest = [number for number, unit in enumerate(units) if unit.split != "validation"]
    limit = round(job.validation_share * KEYS)
    with EncoderPool(job, building, units, workers) as pool:
        records = pool.run(validation, limit=0) | pool.run(rest, limit=limit)
        keys = {number: key for number in rest if (key := records[number].smallest) is not None}
        if keys and not any("validation" in record.files for record in records.values()):
            limit = min(keys.values()) + 1  # the share held out none of the few documents: hold out one
            records |= pool.run([number for number, key in keys.items() if key < limit], limit=limit)
    return [records[number] for number in range(len(units))]


class EncoderPool:
    """A pool of processes that encode units. They start when the first unit is to be encoded."""

    def __init__(self, job: TextJob, building: Path, units: Sequence[Unit], workers: int) -> None:
        self.building, self.units, self.log = building, units, building / "done.jsonl"
        records = TypeAdapter(list[UnitRecord]).validate_python(read_jsonl(self.log))
        self.done = {(record.unit, record.limit): record for record in records if self._is_whole(record)}
        processes = min(workers, len(units))
        arguments = (job, building, max(workers // processes, 1))
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, arguments)
        self._others = multiprocessing.active_children()  # child processes of the calling program

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # partly encoded units will be encoded again
            for process in set(multiprocessing.active_children()) - set(self._others):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def _is_whole(self, record: UnitRecord) -> bool:
        """Return whether all files of a record exist with the recorded sizes.

        The files of a unit that was encoded twice belong to the later record.
        """
        paths = [(self.building / "data" / file.name, file.bytes) for files in record.files.values() for file in files]
        digests = self.units[record.unit].split != "validation" or digests_path(self.building, record.unit).is_file()
        return digests and all(path.is_file() and path.stat().st_size == size for path, size in paths)

    def run(self, numbers: Sequence[int], *, limit: int) -> dict[int, UnitRecord]:
        """Encode those of the units ``numbers`` that are not done, and return the records of all of them."""
        found = {number: self.done[number, limit] for number in numbers if (number, limit) in self.done}
        todo = [number for number in numbers if number not in found]
        if not todo:
            return found
        sizes = {number: self.units[number].size for number in todo}
        return found | {record.unit: record for record in with_progress(self._encode(todo, limit), sizes)}

    def _encode(self, todo: Sequence[int], limit: int) -> Iterator[UnitRecord]:
        """Encode units, log each record when its unit is written, and yield it."""
        try:
            for future in as_completed(
                [self._pool.submit(_work, number, self.units[number], limit) for number in todo]
            ):
                record = future.result()
                append_jsonl(self.log, dataclasses.asdict(record))
                yield record
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, perhaps for want of memory: run the command again with fewer --workers; it goes "
                "on where it stopped"
            ) from error


_encoder: Encoder  # global of a worker process, set by _start_worker


def _start_worker(job: TextJob, building: Path, threads: int) -> None:
    """Load the tokenizer once per worker, and make the worker end when its parent process ends for any reason."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    _encoder = Encoder(job=job, tokenizer=_tokenizer(job, threads), building=building)


def _end_with_parent() -> None:
    """Exit when the parent process ends. Otherwise the workers of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(number: int, unit: Unit, limit: int) -> UnitRecord:
    return _encoder.encode_unit(number, unit, limit)


def _describe(
    job: TextJob,
    tokenizer: Tokenizer,
    units: Sequence[Unit],
    records: Sequence[UnitRecord],
    plan: dict[str, Any],
) -> Manifest:
    """Return the manifest of the data set that was written."""
    assert tokenizer.bos_id is not None
    return Manifest(
        name=job.name,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        splits={split: tuple(file for record in records for file in record.files.get(split, ())) for split in SPLITS},
        notes={
            "sources": [*job.sources, *job.validation_sources],
            "files": len(plan["files"]),
            "bytes": sum(unit.size for unit in units),
            "documents": _documents(records),
            "skipped": {reason: sum(record.skipped[reason] for record in records) for reason in SKIPPED},
            "eos_id": tokenizer.eos_id,
            "tokenizer_sha256": tokenizer.sha256,
            "plan": content_hash(plan)[:16],
        },
    )


def _documents(records: Sequence[UnitRecord]) -> dict[str, int]:
    return {split: sum(record.documents.get(split, 0) for record in records) for split in SPLITS}


def _check_splits(job: TextJob, records: Sequence[UnitRecord]) -> None:
    """Raise UserError if a split has no documents."""
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
    """Write the manifest, and delete files that it does not name, such as partial files of a killed process."""
    named = {file.name for files in manifest.splits.values() for file in files}
    for path in folder.iterdir():
        if path.name not in named:
            path.unlink()
    write_manifest(folder, manifest)
    read_manifest(folder)  # raises UserError for a missing file or a wrong size
