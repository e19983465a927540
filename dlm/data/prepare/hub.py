"""Download the text of a data set of the Hugging Face hub, hf://OWNER/NAME, as far as it is needed.

The library datasets finds the files of every split. dlm downloads whole files, in the order of the hub, until they hold
the tokens that were asked for, and reads them as it reads local files. It does not use the readers of datasets, because
they change texts without notice: a JSON file whose texts all look like dates gives timestamps, and numbers become text.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from dlm.core import text
from dlm.core.errors import UserError, shown, unknown
from dlm.core.files import append_jsonl
from dlm.core.identity import content_hash
from dlm.core.names import inside
from dlm.core.typed import read_log
from dlm.data.prepare.bad import Bad
from dlm.data.prepare.documents import Unit, read_unit
from dlm.data.prepare.encode import (
    BATCH_CHARS,
    BATCH_DOCUMENTS,
    KEYS,
    TextJob,
    digest_of,
    downloads_folder,
    key_of,
    noting,
    tokens_around,
    why_skipped,
)
from dlm.data.prepare.hub_errors import naming_refusals, one_line
from dlm.data.prepare.kinds import suffix_of
from dlm.data.prepare.progress import LINE_SEC
from dlm.data.prepare.sources import Found, PassedOver
from dlm.data.prepare.splits import BY_HASH, TRAIN, VALIDATION, VALIDATION_NAMES, Splits
from dlm.data.prepare.tokenizer import Tokenizer
from dlm.data.prepare.units import make_units

PREFIX = "hf://"
_SOURCE = re.compile(r"hf://(?:datasets/(?=[^/]+/))?(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^@\s]+))?")
_COUNT = re.compile(r"(\d+(?:\.\d*)?(?:e\+?\d{1,2})?)([kMBT]?)")


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A data set of the hub at one commit."""

    repo: str
    revision: str  # the sha of the commit
    config: str
    train: tuple[str, ...]  # paths of the files in the repository, in the order of the hub
    validation: tuple[str, ...]  # empty if the data set has no such split
    left_out: tuple[str, ...]  # the names of the splits that are not read
    unused: tuple[str, ...]  # paths of the files of data that belong to no split

    @property
    def source(self) -> str:
        """The data set as the user writes it, without its revision."""
        return PREFIX + self.repo

    def facts(self) -> dict[str, Any]:
        """Return what the plan and the manifest record of the data set."""
        files = content_hash([self.train, self.validation])[:16]
        return {
            "repo": self.repo,
            "revision": self.revision,
            "config": self.config,
            "files": files,
            "left_out": self.left_out,
        }


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """What was taken of one file of the training split: one line of hub.jsonl."""

    file: str  # its path in the repository
    tokens: int  # training tokens of this file and of those before it
    num_documents: int | None  # only the first so many documents are taken; None: all
    bad: tuple[Bad, ...]  # rows and files that were left out while its tokens were counted


def parse_tokens(value: str) -> int:
    """Return a number of tokens that is written like 25e9, 25B or 300M. Raises UserError for anything else."""
    match = _COUNT.fullmatch(value)
    sizes = {"": 1.0, **{unit: size for size, unit in text.UNITS}}
    number = Decimal(match[1]) * int(sizes[match[2]]) if match else Decimal(0)
    if not 1 <= number < 10**18 or number != int(number):
        allowed = "a whole number of tokens below 1e18, such as 25e9, 25B or 300M"
        raise UserError(f"--tokens is {shown(value)}: it must be {allowed}")
    return int(number)


def check_sources(job: TextJob) -> bool:
    """Return whether the source of a job is a data set of the hub.

    Raises UserError for sources and options that do not go together.
    """
    given = [source for source in (*job.sources, *job.validation_sources) if source.startswith(PREFIX)]
    if not given:
        for option, value in (("--tokens", job.tokens), ("--config", job.config)):
            if value is not None:
                raise UserError(f"{option} is {value}: it is for a source of the hub, hf://OWNER/NAME; leave it out")
        return False
    if len(job.sources) > 1 or job.validation_sources:
        raise UserError(f"{given[0]} must be the only source: prepare other sources apart, and mix the data sets")
    for option, globs in (("--train", job.train_globs), ("--validation", job.validation_globs)):
        if globs:
            raise UserError(f"{option} is {globs[0]!r}: the hub names the splits of {given[0]}; leave the option out")
    return True


def find_hub_data(job: TextJob) -> HubData:
    """Ask the hub for the data set of a job.

    Raises:
        UserError: The source is misspelt, a package is missing, or the hub has no such data.
        TryAgainError: The hub does not answer.
    """
    source = job.sources[0]
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise UserError(f"{source} is no data set of the hub: write hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    repo = match["repo"]
    with naming_refusals(source):
        import datasets
        import huggingface_hub

        huggingface_hub.utils.logging.set_verbosity_error()  # it warns of every README without a block of metadata
        api = huggingface_hub.HfApi()
        info = api.dataset_info(repo, revision=match["revision"])
        revision = info.sha
        assert revision is not None
        if info.gated:  # the description of a gated data set is public, its files are not
            api.auth_check(repo, repo_type="dataset")
        try:
            builder = datasets.load_dataset_builder(repo, job.config, revision=revision)
        except ValueError as error:
            _check_config(source, job.config, datasets.get_dataset_config_names(repo, revision=revision))
            raise UserError(f"{source} is no data set that the library datasets can read: {one_line(error)}") from error
    files = dict(builder.config.data_files or {})
    splits = {str(split): [_path_of(file, revision) for file in paths] for split, paths in files.items()}
    if "train" not in splits:
        raise UserError(f"{source} has no split train: it has {', '.join(splits) or 'no files of data'}")
    held = next((name for name in VALIDATION_NAMES if name in splits), None)
    present = {file.rfilename for file in info.siblings or () if suffix_of(Path(file.rfilename)) is not None}
    unused = sorted(present.difference(*splits.values()))
    found = HubData(
        repo=repo,
        revision=revision,
        config=builder.config.name,
        train=tuple(splits["train"]),
        validation=tuple(splits[held]) if held else (),
        left_out=tuple(name for name in splits if name not in ("train", held)),
        unused=tuple(unused),
    )
    unread = next((path for path in (*found.train, *found.validation) if suffix_of(Path(path)) is None), None)
    if unread is not None:
        raise UserError(f"{source} holds {unread}, of a kind that dlm does not read: save it as .jsonl or .parquet")
    return found


def _check_config(source: str, config: str | None, configs: Sequence[str]) -> None:
    """Raise UserError if a data set has no such config, or has several and none is named."""
    if config is None and len(configs) > 1:
        raise UserError(f"{source} has several configs: set --config to one of {', '.join(configs)}")
    if config is not None and config not in configs:
        raise unknown("--config", config, configs)


def _path_of(file: str, revision: str) -> str:
    """Return the path in the repository of a file that datasets names hf://datasets/OWNER/NAME@SHA/PATH."""
    before, _, path = file.partition(f"@{revision}/")
    if not path:
        raise UserError(f"{before} is not a file of the data set itself: download it, and prepare the local file")
    return path


def check_not_moved(now: Mapping[str, Any] | None, before: Any, folder: Path) -> None:
    """Raise UserError if ``folder`` holds the same data set of the hub at another commit.

    Args:
        now: The ``facts`` of the data set as the hub has it now; None if the source is not of the hub.
        before: The facts that the preparation in ``folder`` recorded; None or another value if its source was not of
            the hub.
        folder: The folder of a finished or an unfinished preparation.
    """
    if not now or not isinstance(before, dict):
        return
    if now["repo"] == before.get("repo") and now["revision"] != before.get("revision"):
        source = PREFIX + now["repo"]
        raise UserError(
            f"{source} is now at commit {now['revision'][:12]}, and {folder} was made from an earlier one: write "
            f"{source}@{before.get('revision')} to keep to it, or delete that folder to start over"
        )


def fetch(found: HubData, job: TextJob, tokenizer: Tokenizer, building: Path) -> tuple[Splits, list[Unit]]:
    """Download the files that a job needs to ``building``/hub. Files that are there are not downloaded again.

    Args:
        found: The data set.
        job: The options. With ``tokens``, the last file is read up to the document with which the training split
            reaches that number.
        tokenizer: Counts the tokens.
        building: The folder of the unfinished preparation.

    Returns:
        The files of each split, and their units.

    Raises:
        UserError: A file holds something else than documents.
        TryAgainError: The hub does not answer.
    """
    if found.left_out:
        print(f"{found.source}: the splits train and validation are read, and {text.listed(found.left_out)} left out")
    downloads = _Downloads(found, downloads_folder(building))
    held_out = [downloads.get(path) for path in found.validation]
    files: list[tuple[str | None, Path]] = [(VALIDATION, path) for path in held_out]
    split = TRAIN if held_out else None
    if job.tokens is None:
        files += [(split, downloads.get(path)) for path in found.train]
        units = make_units(files)
    else:
        counter = _Counter(job, tokenizer, held_out, building)
        taken = _as_many(downloads, counter, job.tokens, building / "hub.jsonl")
        files += [(split, downloads.place(item.file)) for item in taken]
        num_whole = len(files) - (taken[-1].num_documents is not None)
        units = make_units(files[:num_whole])
        units += [_unit_of(path, split, taken[-1].num_documents) for split, path in files[num_whole:]]
    passed_over = [PassedOver(path=f"{found.source}/{path}", reason="in no split of the hub") for path in found.unused]
    rule = "that of the hub" if held_out else BY_HASH
    return Splits(files=files, rule=rule, found=Found(passed_over=passed_over)), units


def _unit_of(path: Path, split: str | None = None, num_documents: int | None = None) -> Unit:
    """Return a unit that is a whole file, or the first documents of one."""
    kind = suffix_of(path)
    assert kind is not None
    size = path.stat().st_size
    return Unit(split=split, kind=kind, paths=(str(path),), size=size, num_documents=num_documents)


class _Downloads:
    """The files of a data set of the hub in a folder on this disk."""

    def __init__(self, found: HubData, folder: Path) -> None:
        self.found, self.folder = found, folder
        self._number, self._said = 0, time.monotonic()

    def get(self, path: str) -> Path:
        """Return the local copy of a file. The library downloads it if it is missing, or continues a download."""
        local = self.place(path)
        with naming_refusals(self.found.source):
            import huggingface_hub
            from huggingface_hub.utils.tqdm import disable_progress_bars

            disable_progress_bars()
            huggingface_hub.hf_hub_download(
                self.found.repo,
                path,
                repo_type="dataset",
                revision=self.found.revision,
                local_dir=self.folder,
            )
        self._tell()
        return local

    def place(self, path: str) -> Path:
        """Return where the local copy of a file is. Raises UserError for a path that leads elsewhere."""
        return inside(self.folder, *path.split("/"))

    def _tell(self) -> None:
        """Print how far the download is, at most every LINE_SEC."""
        self._number += 1
        if time.monotonic() - self._said > LINE_SEC:
            self._said = time.monotonic()
            total = len(self.found.train) + len(self.found.validation)
            print(f"downloading: {self._number} files of the {total} of {self.found.source}", flush=True)


def _as_many(downloads: _Downloads, counter: _Counter, asked: int, log: Path) -> list[_Taken]:
    """Return what the first ``asked`` training tokens take of each file. Download the files that are not there.

    If the data set holds fewer tokens, return all files and print a warning.
    """
    done = read_log(log, _Taken, otherwise=f"delete the folder {log.parent} to start over")
    for item in (item for taken in done for item in taken.bad):
        counter.note(item)
    total = done[-1].tokens if done else 0
    for path in downloads.found.train[len(done) :]:
        if total >= asked:
            break
        already = len(counter.bad)
        added, num_documents = counter.take(downloads.get(path), asked - total)
        total += added
        left_out = tuple(counter.bad[already:])
        done.append(_Taken(file=path, tokens=total, num_documents=num_documents, bad=left_out))
        append_jsonl(log, dataclasses.asdict(done[-1]))
    if total < asked:
        print(
            f"dlm: warning: {downloads.found.source} holds {total:,} training tokens, fewer than --tokens {asked:,}: "
            "the data set gets all of them",
            file=sys.stderr,
        )
    return done


class _Counter:
    """Counts the tokens by which documents lengthen the training split when the module encode writes them.

    Args:
        job: The options.
        tokenizer: The tokenizer, with the special tokens that the job sets.
        held_out: The files of the validation split. If there are none, the hash of a document decides.
        building: The folder of the unfinished preparation.
    """

    def __init__(self, job: TextJob, tokenizer: Tokenizer, held_out: Sequence[Path], building: Path) -> None:
        self.job, self.tokenizer = job, tokenizer
        self.bad: list[Bad] = []  # what was left out of all files
        self.note = noting(self.bad, job, building)
        self.limit = 0 if held_out else round(job.validation_share * KEYS)
        self.held_out = {digest_of(document) for path in held_out for document in self._documents(path)}

    def take(self, path: Path, wanted: int) -> tuple[int, int | None]:
        """Count the documents of a file, up to the one with which they reach ``wanted`` tokens.

        Returns:
            (tokens, documents), or (tokens, None) if the whole file holds fewer tokens.
        """
        tokens = number = 0
        for batch in _batches(self._documents(path)):
            for added in self._tokens(batch):
                tokens, number = tokens + added, number + 1
                if tokens >= wanted:
                    return tokens, number
        return tokens, None

    def _documents(self, path: Path) -> Iterator[str]:
        return read_unit(_unit_of(path), self.job.text_key, self.note, max_document=self.job.max_document)

    def _tokens(self, documents: Sequence[str]) -> list[int]:
        """Return the training tokens of each document; 0 for one that is held out or left out."""
        kept = {number: document for number, document in enumerate(documents) if self._is_kept(document)}
        around = sum(map(len, tokens_around(self.job, self.tokenizer)))
        encoded = self.tokenizer.encode(list(kept.values())) if kept else []
        lengths = {number: len(ids) + around for number, ids in zip(kept, encoded, strict=True)}
        return [lengths.get(number, 0) for number in range(len(documents))]

    def _is_kept(self, document: str) -> bool:
        if why_skipped(document, self.tokenizer) is not None:
            return False
        digest = digest_of(document)
        return digest not in self.held_out and key_of(digest) >= self.limit


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents for the calls of the tokenizer."""
    batch, chars = list[str](), 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if chars >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
