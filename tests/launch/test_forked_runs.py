"""Runs that are forked from a process that has imported torch are as runs in new processes."""

import os
import subprocess
import sys

import pytest
from support.runs import SHORT, losses, only_run

from dlm.core.paths import PACKAGE
from dlm.submit.cluster import Request
from dlm.submit.job import THREAD_VARIABLES, Job
from dlm.submit.ledger import Ledger
from dlm.submit.local import LocalPool

STATE = """
import gc, os, sys
from dlm import launch
launch.preload()
import torch
tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor) and found.numel() > 1]
print(len(os.listdir("/proc/self/task")), tensors, torch.cuda.is_initialized(), "dlm.train.run" in sys.modules)
"""


@pytest.mark.long  # the server itself refuses to fork once it has a second thread
def test_the_imports_start_no_thread_and_make_no_tensor():
    """A fork copies one thread only: what another one holds or does would be lost. torchmetrics makes a constant."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, "1")
    done = subprocess.run(
        [sys.executable, "-c", STATE], cwd=PACKAGE.parent, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "[]", "False", "True"]


TWO = {"two": ("trainer.devices=2", "trainer.strategy=ddp")}


@pytest.mark.parametrize("more", [{}, pytest.param(TWO, marks=pytest.mark.long)], ids=["one", "two"])
def test_forked_runs_import_nothing_again_and_give_the_same_losses(
    more, stdlib_data, workdir, tmp_path, start, monkeypatch
):
    kinds = {"first": (), **more, "one": ("trainer.threads=2",)}  # the imports are in the log of the first
    jobs = [
        Job(name=name, overrides=(*SHORT, *own, f"sweep={name}"), run_dir=tmp_path / name)
        for name, own in kinds.items()
    ]
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    pool = LocalPool(cores=1, poll_sec=0.02)
    request = Request(submission="s", jobs=jobs, ledger=Ledger(tmp_path), code=PACKAGE.parent, environment={})
    logs = {job.name: job.run_dir / "log.txt" for job in jobs}
    assert pool.submit(request).exit_codes == dict.fromkeys(kinds, 0), [log.read_text() for log in logs.values()]
    imported = {line.rpartition("|")[2].strip() for line in logs["one"].read_text().splitlines()}
    monkeypatch.delenv("PYTHONPROFILEIMPORTTIME")
    assert imported and not imported & {"torch", "lightning", "wandb", "dlm.train.run"}
    for variable in THREAD_VARIABLES:
        monkeypatch.setenv(variable, "1")
    new = start(*SHORT, *kinds["one"], "sweep=new")
    assert new.wait(300) == 0, new.communicate()
    runs = [only_run(workdir, sweep) for sweep in ("one", "new")]
    assert losses(runs[0]) == losses(runs[1]) != {}
    configs = [(run / "config.yaml").read_text() for run in runs]
    assert configs[0].replace("one", "new") == configs[1]
