"""Feed random and forged content to every reader of a state file: the right answer or one line, and little memory."""

import dataclasses
import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.by_hand import final_rows, finish, planned
from support.demo_runs import demo_runs
from support.fuzzing import changed_json, damaged
from support.wandb_runs import log_to_wandb

from dlm import convert
from dlm.cli.memory import said_before
from dlm.collect.mapping import load_mapping
from dlm.collect.tables import collect
from dlm.core.errors import UserError
from dlm.core.files import write_json
from dlm.core.shape import load_shape
from dlm.core.typed import read_log
from dlm.data.manifest import Manifest, PackedFile, read_data, write_manifest
from dlm.data.packed import encode_packed, open_packed
from dlm.data.prepare.encode import UnitRecord
from dlm.fit import frozen
from dlm.fit.table import fit_runs, read_runs, score_runs
from dlm.plan.definition import load_sweep
from dlm.plan.proof import proof_cells, read_forecasts
from dlm.plan.store import read_plan
from dlm.submit.admit import admit
from dlm.submit.follower import Following, read_following, write_following
from dlm.submit.ledger import Ledger, read_max_gpu_hours, write_max_gpu_hours
from dlm.submit.table import status_values, sweep_now
from dlm.submit.timeouts import may_go_on
from dlm.train.checkpoint_files import damage, load_state, seal
from dlm.train.models.encoder import TransEncoder

GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def at_most_one_gib() -> Iterator[None]:
    """Let an allocation fail that would take more than 1 GiB beyond what this process has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Iterator[Path]:
    """A sweep with a finished cell, and every state file of a cell and of a sweep."""
    with pytest.MonkeyPatch.context() as patch:
        folder, plan = planned(tmp_path_factory.mktemp("fuzz"), patch)
        cell, other = plan.cells[:2]
        run_dir = finish(folder, plan, cell)
        log_to_wandb(folder, cell, final_rows(cell))
        ledger = Ledger(folder)
        line = {"time": 1.0, "submission": "s", "cells": [cell.cell_id, other.cell_id]}
        kept = {"reasons": {other.cell_id: "failed: x"}, "steps": {cell.cell_id: 3}, "micro_batch": {cell.cell_id: 2}}
        lines: list[dict[str, Any]] = [
            {"event": "intent", **line, "cluster": "local", "was": {other.cell_id: "failed"}, "user": 0, **kept},
            {"event": "submitted", **line, "ids": {cell.cell_id: "1_0"}},
            {"event": "cancelled", **line, "reason": "by dlm cancel"},
            {"event": "ended", "time": 2.0, "cell": cell.cell_id, "state": "done", "exit_code": 0, "reason": None},
        ]
        ledger.folder.mkdir()
        ledger.path.write_text("".join(json.dumps(one) + "\n" for one in lines))
        write_max_gpu_hours(folder, 3.0)
        write_following(folder, Following(name="f", job_id="1", override=("a=b",)))
        for name, content in (
            ("lease.json", {"host": "another", "pid": 1, "started": "1"}),
            ("restarts.json", {"submission": "s", "step": 1, "fruitless": 0}),
            ("timeouts.json", {"submission": "s", "count": 1}),
            ("not_started.json", {"submission": "s", "reason": "x"}),
        ):
            write_json(folder / "runs" / other.cell_id / name, content)
        shutil.copy(run_dir / "status.json", folder / "runs" / other.cell_id)
        proof = {**json.loads((folder / "plan.json").read_text())["cells"][0], "seed": 1}
        write_json(folder / "proof.json", {"forecasts": [{"label": "x", "sha256": "a", "proof": {"cells": [proof]}}]})
        write_json(folder / "report/source.json", {"sources": {"plan.json": "a"}, "said": ["x"]})
        (folder / "report/report.html").touch()
        (folder / "fits.json").write_text("[]")
        unit = UnitRecord(key="a", limit=0, files={"train": []}, documents={}, skipped={}, bad=[], unreadable=[])
        (folder / "done.jsonl").write_text(json.dumps(dataclasses.asdict(unit)) + "\n")
        yield folder


def now(sweep_dir: Path) -> object:
    return json.dumps(status_values(sweep_now(sweep_dir, read_plan(sweep_dir))[0]))


def run_of(sweep_dir: Path, *, is_done: bool) -> Path:
    """Return the run directory of the finished cell, or of the other one."""
    return next(run for run in sweep_dir.glob("runs/*") if (run / "wandb").is_dir() == is_done)


def other(sweep_dir: Path) -> Path:
    return run_of(sweep_dir, is_done=False)


Reader = Callable[[Path], object]
IN_SWEEP: dict[str, Reader] = {
    "plan.json": lambda folder: json.dumps(read_plan(folder).to_json(estimates=True)),
    "estimate.json": read_plan,
    "proof.json": lambda folder: (read_forecasts(folder), proof_cells(folder)),
    "ledger/ledger.jsonl": lambda folder: (now(folder), Ledger(folder).check()),
    "ledger/limits.json": read_max_gpu_hours,
    "ledger/follower.json": read_following,
    "report/source.json": said_before,
    "done.jsonl": lambda folder: read_log(folder / "done.jsonl", UnitRecord, otherwise="delete it"),
}
OF_OTHER_CELL: dict[str, Reader] = {
    "lease.json": now,
    "restarts.json": lambda folder: admit(other(folder), submission="s", patience_sec=0),
    "timeouts.json": lambda folder: may_go_on(other(folder), submission="s", most=2),
    "not_started.json": now,
    "status.json": now,
}
COLLECTED = ("wandb/offline*/*.wandb", "metrics.jsonl", "validation.csv", "env.json", "config.yaml", "result.json")


def check(read: Callable[[], object]) -> None:
    """Call a reader. Asserts that it gives an answer, or a mistake of the user in one line that can be printed."""
    try:
        read()
    except UserError as error:
        line = str(error)
        assert line and "\n" not in line and line.encode()


def fuzz(path: Path, read: Callable[[], object], contents: st.SearchStrategy[bytes], *, examples: int) -> None:
    """Feed contents of a file to its reader, and restore the file."""
    valid = path.read_bytes()
    read()

    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(contents)
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check(read)

    try:
        run()
    finally:
        path.write_bytes(valid)


@pytest.mark.parametrize("name", IN_SWEEP)
def test_a_file_of_a_sweep(sweep, name):
    path = sweep / name
    fuzz(path, lambda: IN_SWEEP[name](sweep), damaged(path.read_bytes()), examples=40)


@pytest.mark.parametrize("name", OF_OTHER_CELL)
def test_a_file_of_a_run(sweep, name):
    path = other(sweep) / name
    fuzz(path, lambda: OF_OTHER_CELL[name](sweep), damaged(path.read_bytes()), examples=25)


@pytest.mark.parametrize("name", COLLECTED)
def test_a_file_of_a_run_that_is_collected_and_verified(sweep, name):
    (path,) = run_of(sweep, is_done=True).glob(name)
    fuzz(path, lambda: collect(sweep, verify=True, write=False), damaged(path.read_bytes()), examples=12)


def test_prepared_data(sweep):
    folder = sweep.parent / "data"
    folder.mkdir()
    tokens = folder / "a.bin"
    tokens.write_bytes(encode_packed(np.arange(40, dtype="<u2")))
    one = PackedFile(name="a.bin", tokens=40, bytes=tokens.stat().st_size, sha256="0")
    splits = {"train": (one,), "validation": (one,)}
    write_manifest(folder, Manifest(name="x", tokenizer="t", vocab_size=9, bos_id=0, splits=splits))
    path = folder / "manifest.json"
    fuzz(path, lambda: read_data({"data_dir": folder}), damaged(path.read_bytes()), examples=60)
    fuzz(tokens, lambda: open_packed(tokens).sum(), damaged(tokens.read_bytes()), examples=60)


class Pickled:
    """Unpickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def weights() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shape = dataclasses.replace(load_shape("4k"), vocab_size=8)
    about = {"format": 1, "shape": dataclasses.asdict(shape), "causal": False, "cell_id": "a", "step": 1}
    return about, TransEncoder(shape, causal=False).state_dict()


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_bytes_of_a_weights_file(weights, tmp_path, ending):
    path = tmp_path / f"a{ending}"
    convert.write_weights(path, *weights)
    fuzz(path, lambda: convert.read_weights(path, model="4k"), damaged(path.read_bytes()), examples=40)


@pytest.mark.parametrize("kind", ["weights", "run", "SMDM", "safetensors"])
def test_what_a_weights_file_says(weights, tmp_path, kind):
    about, tensors = weights
    stated = {"format": 1, "shape": about["shape"], "objective": "masked_diffusion", "cell_id": "a"}
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    valid = {"weights": {"dlm": about, "model": {}}, "SMDM": {"model": {"transformer.wte.weight": 0}},
             "run": {"dlm": stated, "state_dict": {}, "global_step": 1}, "safetensors": about}[kind]  # fmt: skip

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(changed_json(valid), st.booleans())
    def run(content: Any, has_tensors: bool) -> None:
        if kind == "safetensors":
            save_file(tensors, path, metadata={"dlm": json.dumps(content)})
        else:
            if isinstance(content, dict) and has_tensors:
                for key in ("model", "state_dict"):
                    if isinstance(content.get(key), dict):
                        content[key] |= tensors
            torch.save(content, path)
        check(lambda: convert.read_weights(path, model="4k"))

    run()


@pytest.mark.parametrize("content", ["pickle", [1, 2], 7, "text", None])
def test_a_checkpoint_whose_manifest_fits_another_content(tmp_path, content):
    folder, mark = tmp_path / "checkpoints/step_00000001", tmp_path / "mark"
    folder.mkdir(parents=True)
    torch.save(Pickled(mark) if content == "pickle" else content, folder / "state.ckpt")
    seal(folder, step=1)
    assert damage(folder) is None
    for read in (lambda: load_state(folder / "state.ckpt", device="meta"), lambda: convert.read_weights(tmp_path)):
        with pytest.raises(UserError, match=r"state\.ckpt") as refused:
            read()
        assert "\n" not in str(refused.value)
    assert not mark.exists()
    path = folder / "manifest.json"
    fuzz(path, lambda: damage(folder), damaged(path.read_bytes()), examples=60)


def test_frozen_predictions_that_are_hashed_anew(tmp_path):
    path, runs = tmp_path / "a.json", demo_runs()
    result = fit_runs(runs[:-3], law="chinchilla", bootstrap=100)
    content = frozen.freeze(result, [1e13], path)
    content["forms"] = [{**form, "draws": form["draws"][:3]} for form in content["forms"]]
    path.write_text(json.dumps(frozen.extended(content)))
    score_runs(path, runs)
    fuzz(path, lambda: score_runs(path, runs), damaged(path.read_bytes()), examples=40)

    @settings(max_examples=80, deadline=None, database=None, derandomize=True)
    @given(changed_json(content))
    def run(changed: Any) -> None:
        if isinstance(changed, dict):
            text = json.dumps({key: value for key, value in changed.items() if key != "sha256"}, sort_keys=True)
            changed["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(changed))
        check(lambda: score_runs(path, runs).report())

    run()


def test_tables_mappings_and_definitions(tmp_path):
    table = tmp_path / "runs.csv"
    demo_runs()[:4].to_csv(table, index=False)
    fuzz(table, lambda: read_runs(table), damaged(table.read_bytes()), examples=60)
    mapping = tmp_path / "names.yaml"
    columns = {"params": "n", "tokens": {"product": ["a", "b"]}, "steps": "s"}
    mapping.write_text(yaml.safe_dump({"columns": columns, "history": {"step": "x", "val/loss": "y"}}))
    fuzz(mapping, lambda: load_mapping(mapping), damaged(mapping.read_bytes()), examples=60)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"name": "a", "budgets": [1e10], "models": ["4k"], "vary": {"seed": [1]}}))
    fuzz(sweep, lambda: load_sweep(sweep), damaged(sweep.read_bytes()), examples=60)
