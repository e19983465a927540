"""Measure dlm's loader and `dlm prepare` beside those of TinyLlama and SMDM on this machine.

    python benchmarks/data.py --peers DIR [--rows C1,C2]

DIR holds checkouts of the peers, SMDM/ and TinyLlama/. One that is not there is reported as absent. The sides are
measured in turn (ours, peer, ours, peer, ...); results are medians. C1 is tokens per CPU-second of shuffled blocks of
2049 tokens. C2 is tokens per second of preparing the same documents with the same tokenizer; the ids must be
identical. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import os
import resource
import runpy
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import ROOT, Side, alternate, commit, compared, write_result
from dlm.data.manifest import BLOCK_SAMPLES, read_manifest
from dlm.data.mixture import Mixture
from dlm.data.noise import ORDER_STREAM
from dlm.data.packed import PackedTokens, encode_packed, open_packed

BLOCK, CHUNK_BLOCKS = 2049, 1024
PACKAGES = ("numpy", "torch", "tokenizers", "zstandard")


def lit_gpt(peer: Path) -> None:
    """Make the peer's lit_gpt importable without its __init__, which needs CUDA extensions."""
    package = types.ModuleType("lit_gpt")
    package.__path__ = [str(peer / "lit_gpt")]
    sys.modules["lit_gpt"] = package


def packed_files(folder: Path, count: int = 32) -> list[Path]:
    """Write files of random tokens as TinyLlama packs them, and read them once so that they are in memory."""
    paths = [folder / f"train_slim_0_{number:010d}.bin" for number in range(count)]
    random = np.random.default_rng(0)
    for path in paths:
        path.write_bytes(encode_packed(random.integers(0, 32000, BLOCK * CHUNK_BLOCKS).astype(np.uint16)))
    return paths


class Batches:
    """A data set whose item k is the k-th batch of dlm's training data before noise."""

    def __init__(self, source: Mixture, size: int) -> None:
        self.source, self.size = source, size

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.source.rows(self.source.order(number * self.size, self.size, seed=0)))


def rate(batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """Read all batches. Returns the tokens per CPU-second."""
    began = time.process_time()
    tokens = sum(batch.numel() for batch in batches)
    return {"tokens_per_cpu_sec": tokens / (time.process_time() - began)}


def loader_row(peers: Path, folder: Path) -> dict[str, Any]:
    """C1: shuffled blocks in batches, each side through its DataLoader without worker processes.

    The peer as SMDM's pretraining sets it up: eight files at a time. Its bare iterator, which makes no batches, is
    beside ours without a DataLoader as well.
    """
    lit_gpt(peers / "SMDM")
    packed_dataset = importlib.import_module("lit_gpt.packed_dataset")
    paths = packed_files(folder)
    num_blocks = len(paths) * CHUNK_BLOCKS
    split = [PackedTokens(part, block_size=BLOCK, stride=BLOCK) for part in (paths[:20], paths[20:])]
    one = Mixture([PackedTokens(paths, block_size=BLOCK, stride=BLOCK)], [BLOCK_SAMPLES], [ORDER_STREAM])
    two = Mixture(split, [5682, 2510], [7, 8])

    def ours(source: Mixture, size: int, loader: bool) -> dict[str, float]:
        batches, numbers = Batches(source, size), range(num_blocks // size)
        return rate(
            DataLoader(batches, batch_size=None, sampler=numbers) if loader else map(batches.__getitem__, numbers)
        )

    def peer(size: int, loader: bool) -> dict[str, float]:
        dataset = packed_dataset.PackedDataset([str(path) for path in paths], 8, BLOCK, shuffle=True, seed=0)
        if loader:
            return rate(itertools.islice(DataLoader(dataset, batch_size=size), num_blocks // size))
        return rate(itertools.islice(dataset, num_blocks))

    cases = {
        "batches of 8": (one, 8, True),
        "batches of 256": (one, 256, True),
        "batches of 8 from two sources": (two, 8, True),
        "bare, batches of 8": (one, 8, False),
        "bare, batches of 256": (one, 256, False),
    }
    row = {
        name: compared(*alternate(lambda c=case: ours(*c), lambda c=case: peer(*c[1:]))) for name, case in cases.items()
    }
    return {"what": "loader, shuffled blocks of 2049 tokens", "tokens": num_blocks * BLOCK, **row}


def documents() -> Iterator[str]:
    """The standard library's sources in pieces of some thousand characters, about the length of web pages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    held = 0
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(errors="ignore")
        held += len(text)
        for number, start in enumerate(range(0, len(text), 4000)):
            yield f"{path.name} {number}\n{text[start : start + 4000]}"
        if held > 40e6:
            return


def write_corpus(folder: Path) -> None:
    """Write documents in the format of SlimPajama, and a tokenizer of 32,000 pieces trained on them."""
    import tokenizers
    import zstandard

    texts = list(dict.fromkeys(documents()))
    np.random.default_rng(0).shuffle(texts)
    held_out, train = texts[:50], texts[50:]
    for split, part, count in (("train", train, 8), ("validation", held_out, 1)):
        for number in range(count):
            rows = ({"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}} for text in part[number::count])
            path = folder / "corpus" / split / "chunk1" / f"{number}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=32000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(train[:4000], trainer)
    (folder / "tokenizer").mkdir()
    model.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')


def peer_prepare(peer: Path, folder: Path, out: Path, whole: bool) -> None:
    """Run the peer's own script on the corpus: its loop over documents in one process, or all of its processes."""
    lit_gpt(peer)
    sys.modules["lit_gpt"].Tokenizer = importlib.import_module("lit_gpt.tokenizer").Tokenizer  # type: ignore[attr-defined]
    importlib.import_module("lit_gpt.packed_dataset")
    script = runpy.run_path(str(peer / "scripts" / "prepare_slimpajama.py"), run_name="peer")
    files = sorted((folder / "corpus" / "train" / "chunk1").iterdir())
    options = {"source_path": folder / "corpus", "tokenizer_path": folder / "tokenizer", "destination_path": out}
    options["chunk_size"] = BLOCK * 16  # its own chunk would leave most of a small corpus unwritten
    began = time.perf_counter()
    if whole:
        script["prepare"](**options)
    else:
        script["prepare_full"](**options, filenames_subset=[str(path) for path in files])
    print(json.dumps({"seconds": time.perf_counter() - began}))


def timed(command: list[str]) -> tuple[float, float, str]:
    """Run a command. Returns its wall seconds, its CPU-seconds and its output."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, used, done.stdout


def read_tokens(paths: list[Path]) -> np.ndarray:
    return np.concatenate([open_packed(path) for path in paths])


def prepare_row(peers: Path, folder: Path) -> dict[str, Any]:
    """C2: `dlm prepare text` with its start-up, beside the peer's loop without its imports, in wall time."""
    write_corpus(folder)
    counter = iter(range(1000))
    made: dict[str, Path] = {}
    tokens: list[int] = []

    def ours() -> dict[str, float]:
        out = made["ours"] = folder / f"ours{next(counter)}"
        command = [sys.executable, "-m", "dlm.data.prepare.command", "text", str(folder / "corpus"), "--out", str(out)]
        wall, cpu, _ = timed([*command, "--tokenizer", str(folder / "tokenizer")])
        manifest = read_manifest(out)
        assert manifest is not None
        tokens.append(manifest.tokens("train"))
        everything = tokens[-1] + manifest.tokens("validation")
        return {"tokens_per_sec": everything / wall, "tokens_per_cpu_sec": everything / cpu}

    def peer(whole: bool) -> Side:
        def run() -> dict[str, float]:
            out = made["peer"] = folder / f"peer{next(counter)}"
            command = [sys.executable, __file__, "--peers", str(peers), "--peer-prepare", str(folder), str(out)]
            _, _, printed = timed([*command, *(["--whole"] if whole else [])])
            return {"tokens_per_sec": tokens[-1] / json.loads(printed.splitlines()[-1])["seconds"]}

        return run

    row: dict[str, Any] = {}
    for name, whole in (("loop over documents, one process", False), ("its processes on all cores", True)):
        row[name] = compared(*alternate(ours, peer(whole)))
        if not whole:
            _check_ids(made["ours"], made["peer"])
    return {"what": "prepare, .jsonl.zst and a BPE of 32,000", "tokens": tokens[-1], "cores": os.cpu_count(), **row}


def _check_ids(ours: Path, peer: Path) -> None:
    """Check that our tokens begin with the peer's, which drops a last chunk that is not full."""
    manifest = read_manifest(ours)
    assert manifest is not None
    left = read_tokens([ours / file.name for file in manifest.splits["train"]])
    right = read_tokens(sorted(peer.glob("*.bin")))
    assert len(left) - BLOCK * 16 <= len(right) <= len(left), (len(left), len(right))
    assert np.array_equal(left[: len(right)], right)


ROWS = {"C1": ("SMDM", loader_row), "C2": ("TinyLlama", prepare_row)}


def measure(name: str, peers: Path) -> dict[str, Any]:
    """Measure one row, or say why there is none."""
    peer, row = ROWS[name]
    if not (peers / peer / "lit_gpt").is_dir():
        return {"absent": f"ls {peer}/lit_gpt: no such directory under --peers"}
    with tempfile.TemporaryDirectory() as folder:
        return {"peer": peer, "peer_commit": commit(peers / peer), **row(peers, Path(folder))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--peer-prepare", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer_prepare:
        peer_prepare(options.peers / "TinyLlama", *options.peer_prepare, options.whole)
        return
    rows = {name: measure(name, options.peers.resolve()) for name in options.rows.split(",")}
    command = f"python benchmarks/data.py --peers DIR --rows {options.rows}"
    path = write_result(f"data_cpu_{datetime.date.today()}", rows, command=command, packages=PACKAGES)
    print(json.dumps(rows, indent=2))
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
