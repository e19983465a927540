"""What a start says of the cost, and what it refuses; the rate of this machine is given where it does not matter."""

import os
import re
import subprocess
import sys

import pytest
from support import ROOT

from dlm.cli import price
from dlm.cli.options import PlanOptions, StartOptions
from dlm.cli.targets import planned
from dlm.core.errors import UserError
from dlm.plan import cost
from dlm.plan.cost import with_estimates
from dlm.record.outcomes import State
from dlm.record.run import Status
from dlm.submit.cell_now import CellNow


def refusal(monkeypatch, rate, *, target="isoflop", top_budget="1e19", **options):
    """Why a budget is refused on a machine with this many FLOP/s for each core."""
    monkeypatch.setattr(cost, "measure_flops_per_sec", lambda models, **_: dict.fromkeys(models, rate))
    sweep = planned(PlanOptions(target=target, top_budget=top_budget, **options))
    with pytest.raises(UserError) as error:
        price.price_here(sweep.plan, left=[cell.cell_id for cell in sweep.plan.cells])
    return str(error.value)


def test_a_budget_that_this_machine_cannot_pay_is_refused_with_what_would_do(workdir, monkeypatch):
    monkeypatch.setattr("dlm.submit.local.visible_gpus", list)
    years = {}
    for rate in (1e9, 2e9):
        said = refusal(monkeypatch, rate)
        assert "LAUNCHER=submitit_slurm" in said and "the demo, `make sweep`" in said and "GPU-hours on H100" in said
        years[rate] = float(re.search(r"for about ([\d,.]+) years", said)[1].replace(",", ""))
    assert years[1e9] == pytest.approx(2 * years[2e9], rel=1e-3)
    assert not list(workdir.iterdir())


def test_the_smaller_budget_of_a_refusal_can_be_paid(workdir, monkeypatch):
    monkeypatch.setattr("dlm.submit.local.visible_gpus", list)
    said = refusal(monkeypatch, 1e15, top_budget="2e20")
    budget = re.search(r"BUDGET=(\S+),", said)[1]
    sweep = planned(PlanOptions(target="isoflop", top_budget=budget))
    priced, overrides, told = price.price_here(sweep.plan, left=[cell.cell_id for cell in sweep.plan.cells])
    hours = sum(cell.estimate.hours for cell in priced.cells) / len(os.sched_getaffinity(0))
    assert told == pytest.approx(hours)
    assert 0.1 * sweep.plan.spec.max_local_hours < hours <= 1.5 * sweep.plan.spec.max_local_hours
    assert overrides == ["trainer=cpu"]  # its cells are planned for GPUs


def sweep_plan(target, *settings):
    return with_estimates(planned(PlanOptions(target=target, settings=list(settings))).plan)


def gpu_plan(*settings):
    return sweep_plan("smoke", "hardware={device: H100, gpus_per_node: 8}", *settings)


def status(step, steps, gpu_hours=0.0):
    return Status(state=State.LOST, step=step, steps=steps, attempts=1, gpu_hours=gpu_hours, started=0, updated=0)


def test_only_the_steps_that_are_left_cost_something(workdir, stdlib_data):
    plan = gpu_plan()
    cell, total = plan.cells[0], plan.cells[0].estimate.gpu_hours
    half = CellNow(state=State.LOST, status=status(cell.steps // 2, cell.steps))
    whole = CellNow(state=State.PLANNED)
    options = StartOptions(target="smoke", max_gpu_hours=0.0)
    costs = {}
    for name, now in (("half", half), ("whole", whole)):
        with pytest.raises(UserError, match="GPU-hours to go are more than --max-gpu-hours 0") as error:
            price.agree_on_cost(plan, workdir / "smoke", options, left={cell.cell_id: now})
        costs[name] = float(str(error.value).split()[0])
    assert costs["whole"] == pytest.approx(total, rel=1e-3)
    assert costs["half"] == pytest.approx(total * (1 - (cell.steps // 2) / cell.steps), rel=1e-3)


@pytest.mark.parametrize(
    ("given", "defined", "yes", "limit"),
    [
        (None, None, False, None),
        (100.0, None, False, 100.0),  # --max-gpu-hours
        (None, 100.0, False, 100.0),  # max_gpu_hours of the definition
        (5.0, 100.0, False, 5.0),
        (None, 1e-12, True, None),  # a cost beyond the definition that --yes confirms
    ],
)
def test_the_limit_of_gpu_hours_is_the_given_one_else_the_defined_one(workdir, stdlib_data, given, defined, yes, limit):
    plan = gpu_plan(*([] if defined is None else [f"max_gpu_hours={defined}"]))
    left = {cell.cell_id: CellNow(state=State.PLANNED) for cell in plan.cells}
    options = StartOptions(target="smoke", max_gpu_hours=given, yes=yes)
    assert price.agree_on_cost(plan, workdir / "smoke", options, left=left) == limit


def test_a_cost_beyond_the_definition_needs_to_be_confirmed(workdir, stdlib_data):
    plan = gpu_plan("max_gpu_hours=1e-12")
    left = {cell.cell_id: CellNow(state=State.PLANNED) for cell in plan.cells}
    with pytest.raises(UserError, match="max_gpu_hours is 1e-12: confirm with YES=1"):
        price.agree_on_cost(plan, workdir / "smoke", StartOptions(target="smoke"), left=left)


@pytest.mark.parametrize(
    ("target", "settings", "hours", "asked"),
    [
        ("smoke", (), 0.1, False),
        ("smoke", (), 0.2, True),
        ("smoke", (), None, True),  # on SLURM
        ("demo", (), 0.2, False),
        ("demo", ("max_epochs=3",), 0.2, True),  # no longer the demonstration that everybody knows
        ("smoke", ("max_gpu_hours=1e-12",), 0.1, True),
    ],
)
def test_a_terminal_asks_unless_the_sweep_is_short_or_the_demonstration(
    workdir, stdlib_data, monkeypatch, target, settings, hours, asked
):
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    questions = []
    monkeypatch.setattr(price.typer, "confirm", lambda question, **_: questions.append(question))
    plan = gpu_plan(*settings) if "max_gpu" in str(settings) else sweep_plan(target, *settings)
    left = {cell.cell_id: CellNow(state=State.PLANNED) for cell in plan.cells}
    for yes in (False, True):
        price.agree_on_cost(plan, workdir / target, StartOptions(target=target, yes=yes), left=left, local_hours=hours)
    assert questions == ["Start it?"] * asked


def sweep_hours(workdir, stdlib_data, core):
    """What `dlm sweep` says that smoke would take on one core, in the unit that it chooses, as seconds."""
    command = ["sweep", "smoke", "--set", "max_local_hours=1e-9", "--launcher", "submitit_local"]
    done = subprocess.run(
        [sys.executable, "-m", "dlm.cli", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (workdir / "smoke").exists()
    value, unit = re.search(r"for about ([\d,.]+) (\w+),", done.stderr).groups()
    return float(value.replace(",", "")) * {"s": 1, "min": 60, "h": 3600}[unit]


@pytest.mark.long
def test_the_rate_of_this_machine_is_measured(workdir, stdlib_data):
    assert sweep_hours(workdir, stdlib_data, min(os.sched_getaffinity(0))) > 1


@pytest.mark.long
def test_a_busy_core_makes_the_sweep_longer(workdir, stdlib_data):
    """With the core shared by three other processes, the estimate is much longer."""
    core = min(os.sched_getaffinity(0))
    alone = sweep_hours(workdir, stdlib_data, core)
    spin = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile os.getppid() == {os.getpid()}: pass"
    busy = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(3)]
    try:
        assert sweep_hours(workdir, stdlib_data, core) > 1.7 * alone
    finally:
        for process in busy:
            process.kill()
            process.wait()
