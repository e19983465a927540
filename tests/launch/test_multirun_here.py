"""Hydra's multirun in one process, with Hydra's own launcher."""

import subprocess
import sys

from support.runs import TINY

from dlm.core.paths import PACKAGE
from dlm.record.run import read_result


def test_every_run_of_a_multirun_logs_to_a_wandb_run_of_its_own(stdlib_data, workdir):
    words = [word for word in TINY if not word.startswith("logger")]
    command = [sys.executable, "-m", "dlm.launch", "-m", *words, "logger=wandb", "training.steps=20", "seed=1,2"]
    ended = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    runs = [*(workdir / "adhoc/runs").glob("mdm-*")]
    assert [read_result(run).step for run in runs] == [20, 20]
    assert all(len([*run.glob(f"wandb/offline-run-*-adhoc-{run.name}/*.wandb")]) == 1 for run in runs)
