"""The shipped sweeps are planned byte for byte as they always were: a changed id would orphan finished runs.

stored/plans.json holds, for each shipped sweep, its cell ids and the SHA-256 of plan.json and of the files in cell/,
once with data that are not prepared and once with data of a known hash. stored/smoke.json is a whole plan.json.
"""

import hashlib
import json
from pathlib import Path

import pytest

from dlm.core.paths import sweeps_dir
from dlm.data.manifest import Manifest, PackedFile, write_manifest
from dlm.plan.definition import load_sweep
from dlm.plan.grid import make_plan
from dlm.plan.store import write_plan

STORED = Path(__file__).parent / "stored"
PLANS = json.loads((STORED / "plans.json").read_text())


def prepare_pretended_data(root: Path) -> None:
    """Folders with a manifest of which no tokens are read."""
    for name, vocab_size, tokens in (("stdlib", 256, 10**9), ("slim_pajama", 32000, 627 * 10**9)):
        (root / name).mkdir()
        (root / name / "a.bin").write_bytes(b"abc")
        files = (PackedFile(name="a.bin", tokens=tokens, bytes=3, sha256="0"),)
        splits = {"train": files, "validation": files}
        write_manifest(
            root / name, Manifest(name=name, tokenizer="none", vocab_size=vocab_size, bos_id=0, splits=splits)
        )


def sha256(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(contents)).hexdigest()


@pytest.mark.parametrize("data", ["unprepared", "prepared"])
@pytest.mark.parametrize("name", sorted(path.stem for path in sweeps_dir().glob("*.yaml")))
def test_a_shipped_sweep_is_planned_as_it_was_stored(name, data, tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    if data == "prepared":
        prepare_pretended_data(tmp_path)
    plan = write_plan(tmp_path / "sweep", make_plan(load_sweep(sweeps_dir() / f"{name}.yaml")))
    stored = PLANS[name][data]
    assert [cell.cell_id for cell in plan.cells] == stored["cell_ids"]
    written = (tmp_path / "sweep" / "plan.json").read_bytes()
    if (name, data) == ("smoke", "unprepared"):
        assert written.decode() == (STORED / "smoke.json").read_text()  # shows what differs
    assert sha256(written) == stored["plan.json"]
    cells = [path.read_bytes() for path in sorted((tmp_path / "sweep" / "cell").iterdir())]
    assert sha256(*cells) == stored["cell/"]


def test_one_changed_value_changes_every_id(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    plan = make_plan(load_sweep(sweeps_dir() / "smoke.yaml", ["optimizer.lr=5.0001e-3"]))
    assert not {cell.cell_id for cell in plan.cells} & set(PLANS["smoke"]["unprepared"]["cell_ids"])
