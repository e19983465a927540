"""An objective that is added by the steps of CONTRIBUTING.md is planned and trained, and its model is causal."""

import json
import os
import re
import shutil
import subprocess
import sys

from dlm.core.objectives import OBJECTIVES
from dlm.core.paths import PACKAGE

OBJECTIVE = '''
import torch.nn.functional as F
from dlm.train.objectives import Objective

class SkipOne(Objective):
    """Predicts every token from those before it but for the last."""

    name = "skip_one"

    def __init__(self, *, bos_id, smoothing):
        self.bos_id, self.smoothing = bos_id, smoothing

    def corrupt(self, tokens_BT, t_B, uniform_BT):
        return {"tokens": tokens_BT}

    probe = corrupt

    def loss(self, model, batch):
        tokens_BT = batch["tokens"]
        logits_BTV = model(F.pad(tokens_BT[:, :-2], (2, 0), value=self.bos_id))
        ce_M = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none",
                               label_smoothing=self.smoothing)
        return ce_M.view_as(tokens_BT).mean(dim=1)
'''
ROW = """    "skip_one": ObjectiveInfo(
        target="dlm.train.objectives.skip_one.SkipOne", id_head="skip", label="Skip one", keys=("smoothing",),
        causal=True, is_bound=False,
    ),
"""
CONFIG = "name: skip_one\nsmoothing: 0.05\n"
SWEEP = """
name: added
budgets: [1.6e8]
models: [4k]
objectives: [skip_one]
groups: {data: stdlib}
set: {data.batch_size: 8, data.block_size: 32, validation.num_sequences: 8, optimizer.lr: 3.0e-3}
"""
PLAN_AND_TRAIN = """
import json, sys
from pathlib import Path
import torch
from dlm import launch
from dlm.convert import load_model
from dlm.core.paths import workdir
from dlm.core.shape import load_shape
from dlm.plan import load_sweep, make_plan, write_plan
from dlm.record import read_result

folder = workdir() / "added"
plan = make_plan(load_sweep(Path("added.yaml")))
write_plan(folder, plan)
(cell,) = plan.cells
sys.argv = ["dlm.launch", f"+cell={cell.cell_id}", f"hydra.searchpath=[file://{folder}]", "sweep=added", "logger=none"]
code = launch.main()
run_dir = folder / "runs" / cell.cell_id
model = load_model(run_dir)
tokens = torch.arange(16)[None]
changed = tokens.clone()
changed[0, 9] = 200
with torch.no_grad():
    moved = (model(changed) - model(tokens)).abs().amax(-1)[0] > 0
print(json.dumps({
    "code": code, "cell_id": cell.cell_id, "steps": cell.steps, "flops": dict(cell.flops),
    "estimator": read_result(run_dir).estimator, "rows": len(model.embedding.weight), "moved": moved.tolist(),
}))
"""


def test_a_causal_objective_added_as_contributing_says_is_planned_and_trained(stdlib_data, workdir, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "dlm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE.parent / "configs", tmp_path / "configs")
    (tmp_path / "dlm/train/objectives/skip_one.py").write_text(OBJECTIVE)
    table = tmp_path / "dlm/core/objectives.py"
    table.write_text(table.read_text().replace("OBJECTIVES = {\n", "OBJECTIVES = {\n" + ROW))
    (tmp_path / "configs/objective/skip_one.yaml").write_text(CONFIG)
    (tmp_path / "added.yaml").write_text(SWEEP)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PLAN_AND_TRAIN],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["code"] == 0 and facts["steps"] >= 20 and facts["cell_id"].startswith("skip-4k-")
    assert facts["flops"]["full_masked_head"] == facts["flops"]["full"]  # every position has logits
    assert facts["estimator"] == "exact"
    assert facts["rows"] == 256  # no row for a mask token
    assert facts["moved"] == [place >= 9 for place in range(16)]  # a later token changes no earlier prediction


def test_no_other_code_asks_which_objective_it_is():
    """What depends on the objective is in the table, so that an added one is treated right everywhere."""
    own = {"core/objectives.py", *(f"train/objectives/{name}.py" for name in OBJECTIVES)}
    named = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for name in OBJECTIVES
        if re.search(rf"""["']{name}["']""", path.read_text())
    }
    assert named - own == {"plan/definition.py"}  # the default of `objectives:`
