"""A folder of .wandb files stands in for a server: runs of any program that logged offline."""

import tarfile

import pytest
from support import ROOT

from dlm.collect import WandbFolder, collect_mapped, load_mapping
from dlm.core.errors import UserError

MAPPING = """
columns: {params: net.weights_without_embedding, tokens: {product: [optim.max_steps, optim.batch_size]},
          steps: optim.max_steps, step_offset: 1}
history: {step: trainer/global_step, val/loss: val/loss}
require: {dataset: [stdlib]}
"""


@pytest.fixture
def folder(tmp_path):
    with tarfile.open(ROOT / "analysis/results/other_project.tar.xz") as archive:
        archive.extractall(tmp_path / "wandb", filter="data")
    return tmp_path / "wandb"


def test_runs_that_logged_offline_become_rows(folder, tmp_path):
    (tmp_path / "names.yaml").write_text(MAPPING)
    collected = collect_mapped(WandbFolder(folder), load_mapping(tmp_path / "names.yaml"), tmp_path / "out")
    assert len(collected.runs) == 20 and set(collected.runs["source"]) == {"wandb"}
    assert collected.runs["loss"].between(1, 6).all()
    reasons = collected.excluded.set_index("run_id")["reason"]
    assert set(reasons.index) == {"mlp-16-1250-stopped", "mlp-8-500-shuffled"}
    assert "dataset is 'shuffled'" in reasons["mlp-8-500-shuffled"]


def test_a_run_without_an_end_is_crashed_and_one_that_failed_is_failed(folder):
    (folder / "mlp-2-80.wandb").write_bytes((folder / "mlp-2-80.wandb").read_bytes()[:4096])
    runs = WandbFolder(folder).runs
    assert runs["mlp-2-80"].state == "crashed"
    assert runs["mlp-16-1250-stopped"].state == "failed" and runs["mlp-8-500"].state == "finished"


def test_a_folder_that_cannot_be_used_is_said_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"there is no \.wandb file in"):
        WandbFolder(tmp_path / "nothing")
    (folder / "again.wandb").write_bytes((folder / "mlp-2-80.wandb").read_bytes())
    with pytest.raises(UserError, match="are of one run, mlp-2-80"):
        WandbFolder(folder)
    (folder / "again.wandb").write_bytes(b":W&B\xe1\xbe\x00")
    with pytest.raises(UserError, match="does not name its run"):
        WandbFolder(folder)
