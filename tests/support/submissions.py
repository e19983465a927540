"""Plan and submit stub cells, and query the state of their sweep."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from dlm.core.paths import PACKAGE
from dlm.plan.cells import Estimate
from dlm.plan.grid import DEFAULT_GROUPS
from dlm.record.outcomes import State
from dlm.submit.cells import submit_plan
from dlm.submit.cluster import Request, Submission
from dlm.submit.job import Job, Resources
from dlm.submit.ledger import Ledger
from dlm.submit.local import LocalPool
from dlm.submit.state import cells_now
from support.stub_cell import STEPS

GROUPS = {**DEFAULT_GROUPS, "model": "4k", "objective": "masked_diffusion"}
ESTIMATED = {field.name for field in fields(Estimate)}


def make_cell(name: str, **changes) -> SimpleNamespace:
    """Make a planned cell with the fields that submission reads."""
    estimate = {name: changes.pop(name) for name in ESTIMATED & changes.keys()}
    values = {
        "cell_id": name, "global_batch_size": 8, "num_params": 4144, "num_params_total": 8000, "steps": STEPS,
        "groups": GROUPS, "overrides": {}, "estimate": Estimate(**estimate), "parent": None,
        "objective": "masked_diffusion", "block_size": 128, "branch_step": None, "own_share": 1.0,
        "flops": {"full_masked_head": 1e9},
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def make_plan(*names: str, **changes) -> SimpleNamespace:
    return plan_of(make_cell(name, **changes) for name in names)


def plan_of(cells: Iterable[SimpleNamespace]) -> SimpleNamespace:
    """Make a plan of cells, whose definition has no rules for the launcher."""
    return SimpleNamespace(cells=tuple(cells), spec=SimpleNamespace(launcher=()))


def make_pool(**options) -> LocalPool:
    """Make a pool whose jobs run stub cells instead of training."""
    return LocalPool(**{"module": "support.stub_cell", "cores": 2, "grace_sec": 5.0, "poll_sec": 0.02, **options})


def submit(plan, sweep_dir, cluster=None, **options) -> Submission:
    """Submit to this machine, or to ``cluster``."""
    return submit_plan(plan, sweep_dir, cluster=cluster or make_pool(), data_dir=sweep_dir / "data", **options)


def make_job(tmp_path: Path, name: str, *extra: str, **resources) -> Job:
    """Make a job that runs a stub cell of the sweep "sweep" in ``tmp_path``."""
    run_dir = tmp_path / "sweep" / "runs" / name
    overrides = (f"+cell={name}", f"paths.workdir={tmp_path}", "sweep=sweep", *extra)
    return Job(name=name, overrides=overrides, run_dir=run_dir, resources=Resources(**resources))


def run_in(pool: LocalPool, jobs: list[Job], *, code: Path = PACKAGE.parent, **options) -> Submission:
    """Submit jobs to a pool."""
    ledger = Ledger(jobs[0].run_dir.parents[1])
    pool.check(jobs)
    return pool.submit(Request(submission="s", jobs=jobs, ledger=ledger, code=code, environment={}, **options))


def run_dir(sweep_dir: Path, name: str) -> Path:
    """Create the run directory of a cell if necessary, and return it."""
    folder = sweep_dir / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def ask_mode(sweep_dir: Path, name: str, mode: str) -> None:
    """Set the mode that determines how a stub cell ends."""
    (run_dir(sweep_dir, name) / "mode").write_text(mode)


def write_submitted(sweep_dir, name: str, submission: str, job_id: str) -> None:
    """Record in the ledger that SLURM has accepted the job of a cell."""
    ledger = Ledger(sweep_dir)
    job = Job(name=name, overrides=(), run_dir=sweep_dir / "runs" / name)
    ledger.intent(submission, [job], cluster="slurm", code=Path("ab"))
    ledger.submitted(submission, {name: job_id})


def submission_of(sweep_dir: Path, name: str) -> str | None:
    return Ledger(sweep_dir).read()[name].submission


def state_of(sweep_dir: Path, name: str) -> tuple[State, str | None]:
    now, _ = cells_now([(name, STEPS)], sweep_dir)
    return now[name].state, now[name].reason


def wait_until(condition: Callable[[], object], *, seconds: float = 60) -> None:
    """Wait until ``condition`` holds, for at most ``seconds``, which suffice even on a busy machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what is waited for does not happen"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Return whether a process has ended."""
    stat_file = Path(f"/proc/{pid}/stat")
    return not stat_file.exists() or stat_file.read_text().rpartition(")")[2].split()[0] == "Z"


def write_command(folder: Path, name: str, body: str) -> None:
    """Write a shell script to ``folder`` that replaces the command ``name``."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def prepend_to_path(folder: Path, monkeypatch) -> None:
    """Prepend ``folder`` to PATH, so that its commands take precedence."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
