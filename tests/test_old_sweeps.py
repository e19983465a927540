"""A sweep that version 86d76fd planned, trained in part and left is read, finished and reported by the present code.

tests/support/old_sweep.tar.xz holds that sweep as it lay on disk when its processes were killed: one cell is done, one
stands at step 200 of 395 with its last checkpoint at step 160, one had just been started, and one was never begun.
`expected.json` in it holds the losses of the same four cells, trained by that version without a disturbance, and the
processor and version of torch that computed them. The training text is dlm's own documentation and source code.
"""

import csv
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from support import ROOT, TESTS

pytestmark = pytest.mark.slow
DONE, HALF = "ar-8k-1e10-8a7ef83d", "ar-8k-4e10-180d63ab"
STARTED, NOT_BEGUN = "mdm-8k-1e10-3f5ec64a", "mdm-8k-4e10-ae977de8"


def unpacked(folder: Path) -> Path:
    """Unpack the old sweep into `folder`; workdir/old in it is the folder of the sweep."""
    with tarfile.open(TESTS / "support" / "old_sweep.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def dlm(root: Path, *arguments: str) -> str:
    """Run `dlm ARGUMENTS` on the old sweep's working directory and data; it must succeed. Returns what it prints."""
    environment = os.environ | {"DLM_WORKDIR": str(root / "workdir"), "DLM_DATA": str(root / "data")}
    command = [sys.executable, "-m", "dlm.cli", *arguments]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def run_of(root: Path, cell: str) -> Path:
    return root / "workdir" / "old" / "runs" / cell


def training_losses(run: Path) -> list[list[float]]:
    """Step and training loss of every logged step of a run; of a step that was trained twice, the second loss."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    return [[step, losses[step]] for step in sorted(losses)]


def same_machine(root: Path) -> bool:
    """Whether the expected losses were computed on this kind of processor, with this torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
    expected = json.loads((root / "expected.json").read_text())
    return (processor, torch.__version__) == (expected["cpu"], expected["torch"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old sweep after the present `dlm sweep` was started on it once."""
    root = unpacked(tmp_path_factory.mktemp("old"))
    dlm(root, "sweep", str(root / "old.yaml"), "--yes")
    return root


def test_the_state_of_every_cell_of_an_old_sweep_is_read(tmp_path: Path):
    root = unpacked(tmp_path)
    cells = json.loads(dlm(root, "status", str(root / "workdir" / "old"), "--json"))
    assert [(cell["cell_id"], cell["state"], cell["step"], cell["steps"]) for cell in cells] == [
        (DONE, "done", 98, 98),
        (HALF, "lost", 200, 395),
        (STARTED, "planned", 0, 87),
        (NOT_BEGUN, "planned", 0, 351),
    ]
    assert cells[0]["loss"] == json.loads((root / "expected.json").read_text())["cells"][DONE]["loss"]


def test_an_old_sweep_keeps_its_plan_and_goes_on_from_its_last_checkpoint(finished: Path, tmp_path: Path):
    before = unpacked(tmp_path)
    plan = Path("workdir", "old", "plan.json")
    then, now = (json.loads((root / plan).read_text()) for root in (before, finished))
    assert then["spec"]["hardware"].pop("mfu") == 0.4 and now["spec"]["hardware"].pop("mfu") is None  # the defaults
    assert now == then

    status = {cell: json.loads((run_of(finished, cell) / "status.json").read_text()) for cell in (HALF, STARTED)}
    assert (status[HALF]["attempts"], status[HALF]["steps_redone"]) == (2, 40)
    assert status[STARTED]["attempts"] == 1
    result = "result.json"
    assert (run_of(finished, DONE) / result).read_bytes() == (run_of(before, DONE) / result).read_bytes()


def test_the_losses_are_those_of_an_undisturbed_sweep(finished: Path):
    """They are equal bit for bit on the processor and torch of the expected losses, nearly so on others."""
    expected = json.loads((finished / "expected.json").read_text())
    tolerance = 0 if same_machine(finished) else 1e-3
    for cell, wanted in expected["cells"].items():
        run = run_of(finished, cell)
        assert training_losses(run) == [[step, pytest.approx(loss, rel=tolerance)] for step, loss in wanted["train"]]
        assert json.loads((run / "result.json").read_text())["loss"] == pytest.approx(wanted["loss"], rel=tolerance)


def rows(table: Path) -> dict[str, dict[str, str]]:
    with table.open() as file:
        return {row["run_id"]: row for row in csv.DictReader(file)}


def test_an_old_sweep_is_collected_and_reported(finished: Path):
    """The table of runs differs from the one that the old version wrote only in how the runs were carried out."""
    folder = finished / "workdir" / "old"
    collected, expected = rows(folder / "runs.csv"), rows(finished / "expected_runs.csv")
    assert (collected[HALF]["attempts"], collected[HALF]["steps_redone"]) == ("2", "40")
    assert {row.pop("role") for row in collected.values()} == {""}  # columns that came later
    assert {float(row.pop("dropout")) for row in collected.values()} == {0.0}
    assert {float(row.pop("weight_decay")) for row in collected.values()} == {0.1}
    for row in (*collected.values(), *expected.values()):
        for column in ("tokens_per_sec", "gpu_hours", "attempts", "steps_redone", "git_sha"):
            row.pop(column)
    loss = {run: float(row.pop("loss")) for run, row in collected.items()}
    assert loss == pytest.approx({run: float(row.pop("loss")) for run, row in expected.items()}, rel=1e-3)
    assert collected == expected
    assert set(rows(folder / "excluded.csv")) == {STARTED, NOT_BEGUN}  # their losses are above the unigram entropy
    assert "autoregressive" in (folder / "report" / "report.html").read_text()
