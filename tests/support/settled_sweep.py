"""A sweep whose cells are done without training: their results follow a known law, so that fits determine N*."""

import math
from pathlib import Path

import numpy as np

from dlm.cli.options import PlanOptions
from dlm.cli.targets import Sweep, planned
from dlm.plan.store import write_plan
from dlm.record.outcomes import State
from dlm.record.run import run_directory, write_result, write_status
from support.stub_cell import result, status

# Small budgets, at which the best size lies within the models, and a proof run of a few seconds.
SETTINGS = (
    "budgets=[1e10,2e10,4e10]",
    "models=[4k,8k,19k,33k,49k]",
    "tokens_per_param=null",
    "proof={factor: 1.25}",
    "set.validation.draws=2",
)


def true_loss(params: float, tokens: float) -> float:
    return 1.2 + 50 / math.sqrt(params) + 234 / math.sqrt(tokens)


def finish(folder: Path, cell, loss: float) -> None:
    """Write the files of a run that has ended with this loss."""
    run_dir = run_directory(folder, cell.cell_id)
    values = {"step": cell.steps, "tokens": cell.tokens, "loss": loss, "loss_se": 0.001, "estimator": "mc"}
    write_result(run_dir, result(cell.cell_id, **values))
    write_status(run_dir, status(State.DONE, step=cell.steps, steps=cell.steps, exit_code=0))


def settled_sweep(*settings: str, sigma: float = 0.002, target: str = "smoke") -> Sweep:
    """Plan ``target`` with SETTINGS and ``settings``, and finish its cells with the true loss and relative noise."""
    sweep = planned(PlanOptions(target=target, settings=[*SETTINGS, *settings]))
    write_plan(sweep.folder, sweep.plan)
    noise = np.random.default_rng(0)
    for cell in sweep.plan.cells:
        loss = true_loss(cell.num_params, cell.tokens) * (1 + sigma * noise.standard_normal())
        finish(sweep.folder, cell, loss)
    return sweep
