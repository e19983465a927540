"""What a job of `dlm doctor` finds on its node."""

import os
import sys

import pytest
import torch

from dlm.core.files import read_json
from dlm.train import node_check


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Return a function that runs the check in a folder and returns what it writes."""

    def run():
        (tmp_path / "x.token").write_text("t")
        monkeypatch.setattr(sys, "argv", ["node_check", str(tmp_path / "x.json")])
        node_check.main()
        return read_json(tmp_path / "x.json")

    return run


def test_the_findings_are_those_of_this_process(found, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("DLM_SBATCH", "")
    monkeypatch.setenv("DLM_SETUP_TROUBLE", "module load x (exit code 1); ")
    said = found()
    assert said["token"] == "t" and abs(said["clock_ahead_sec"]) < 5 and said["omp_threads"] == "3"
    assert said["num_cpus"] == len(os.sched_getaffinity(0)) and said["sbatch"] is None
    assert said["setup_trouble"] == "module load x (exit code 1)"
    assert said["modules"]["torch"] == {"found": torch.__version__}
    assert len(said["cuda"]["found"]["gpus"]) == torch.cuda.device_count()


def test_a_broken_library_is_a_finding(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a\nno kernel image")))
    said = found()
    assert "wandb" in said["modules"]["wandb"]["error"] and "found" in said["modules"]["lightning"]
    assert said["cuda"] == {"error": "RuntimeError: no kernel image"}


@pytest.mark.gpu
def test_a_gpu_multiplies(found):
    (gpu, *_) = found()["cuda"]["found"]["gpus"]
    assert gpu["name"] == torch.cuda.get_device_name(0) and gpu["memory_gib"] > 1
