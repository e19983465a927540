"""One start of a sweep in this process, with real files, up to the moment when its jobs would run."""

import os
from collections import Counter
from pathlib import Path

import pytest
from support import slurm_stand_in
from support.stub_cell import result, status
from support.submissions import prepend_to_path
from typer.testing import CliRunner

from dlm.cli import start as start_module
from dlm.cli.options import PlanOptions, StartOptions
from dlm.cli.targets import planned
from dlm.cli.verbs import app
from dlm.core.errors import UserError
from dlm.plan import cost, grid
from dlm.plan.store import write_plan
from dlm.record.outcomes import State
from dlm.record.run import run_directory, write_result, write_status
from dlm.submit import cells
from dlm.submit.cluster import Submission


@pytest.fixture
def jobs(monkeypatch):
    """The names of the jobs that a start submits; none of them runs."""
    names = []

    def submit_jobs(asked, **_):
        names.extend(job.name for job in asked)
        return Submission()

    monkeypatch.setattr(cells, "submit_jobs", submit_jobs)
    monkeypatch.setattr(cost, "measure_flops_per_sec", lambda models, **_: dict.fromkeys(models, 1e10))
    return names


def record_calls(monkeypatch, owner, name):
    """The first argument of every call of a function, from now on."""
    calls, function = [], getattr(owner, name)

    def recorded(first, *args, **kwargs):
        calls.append(first)
        return function(first, *args, **kwargs)

    monkeypatch.setattr(owner, name, recorded)
    return calls


def start(target="smoke", **options):
    done = start_module.start(StartOptions(target=target, launcher="submitit_local", yes=True, **options))
    return done.sweep, done.ran_here, done.code


@pytest.fixture
def half_done(workdir, stdlib_data):
    """A sweep whose first five cells are done."""
    sweep = planned(PlanOptions(target="smoke"))
    write_plan(sweep.folder, sweep.plan)
    for cell in sweep.plan.cells[:5]:
        write_result(run_directory(sweep.folder, cell.cell_id), result(cell.cell_id, step=cell.steps))
    return sweep


def results_read(paths):
    """How often the result of each cell that has one was read."""
    return Counter(path.parent.name for path in paths if path.name == "result.json" and path.is_file())


def test_one_start_plans_once_prices_once_and_reads_each_result_once(half_done, jobs, monkeypatch):
    read = record_calls(monkeypatch, Path, "read_bytes")
    planned_specs = record_calls(monkeypatch, grid, "make_plan")
    priced_plans = record_calls(monkeypatch, cost, "with_estimates")
    sweep, ran_here, code = start()
    assert ran_here and code == 0 and sweep.folder == half_done.folder
    names = [cell.cell_id for cell in half_done.plan.cells]
    assert jobs == names[5:]
    assert results_read(read) == dict.fromkeys(names[:5], 1)
    assert len(planned_specs) == len(priced_plans) == 1


def test_a_start_prepares_the_data_before_it_plans_and_plans_once(workdir, tmp_path, jobs, monkeypatch, capsys):
    monkeypatch.setenv("DLM_DATA", str(tmp_path / "data"))
    planned_specs = record_calls(monkeypatch, grid, "make_plan")
    sweep, _, _ = start()
    assert len(planned_specs) == 1
    assert sweep.plan.data_hash is not None and all(cell.epochs for cell in sweep.plan.cells)
    assert jobs == [cell.cell_id for cell in sweep.plan.cells]
    out = capsys.readouterr().out
    assert out.startswith("preparing stdlib ...\n") and "vocabulary 256" in out


def test_a_plan_that_is_older_than_its_data_is_made_again(workdir, tmp_path, jobs, monkeypatch):
    monkeypatch.setenv("DLM_DATA", str(tmp_path / "none"))
    preview = planned(PlanOptions(target="smoke"))
    write_plan(preview.folder, preview.plan)
    monkeypatch.setenv("DLM_DATA", os.environ["DLM_DATA"].replace("none", "data"))
    sweep, _, _ = start(str(preview.folder))
    assert preview.plan.data_hash is None and sweep.plan.data_hash is not None
    assert jobs == [cell.cell_id for cell in sweep.plan.cells]
    assert not set(jobs) & {cell.cell_id for cell in preview.plan.cells}


def test_data_that_dlm_cannot_make_are_asked_for_after_the_price(workdir, tmp_path, jobs, monkeypatch, capsys):
    monkeypatch.setenv("DLM_DATA", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"slim_pajama.*dlm prepare text SOURCE --out"):
        start("isoflop", budget=["1e17"], settings=["max_local_hours=1e9", "tokens_per_param=null", "models=[6M]"])
    assert "of training here" in capsys.readouterr().out
    assert jobs == [] and not (workdir / "isoflop").exists()


def test_a_grown_sweep_keeps_its_started_cells_and_reads_their_results_once(half_done, jobs, monkeypatch):
    read = record_calls(monkeypatch, Path, "read_bytes")
    sweep, _, _ = start(budget=["8e10"])
    kept = {cell.cell_id for cell in half_done.plan.cells[:5]}
    names = {cell.cell_id for cell in sweep.plan.cells}
    assert kept <= names and {cell.budget_flops for cell in sweep.plan.cells} > {8e10}
    assert results_read(read) == dict.fromkeys(kept, 1)
    assert set(jobs) == names - kept


def test_a_start_with_nothing_left_says_so(half_done, jobs, capsys):
    for cell in half_done.plan.cells:
        write_result(run_directory(half_done.folder, cell.cell_id), result(cell.cell_id, step=cell.steps))
    _, ran_here, code = start()
    assert (ran_here, code, jobs) == (True, 0, [])
    assert "is done: nothing to train" in capsys.readouterr().out


@pytest.fixture
def all_bad(workdir, stdlib_data):
    """A sweep whose cells all have a mistake in their config."""
    sweep = planned(PlanOptions(target="smoke"))
    write_plan(sweep.folder, sweep.plan)
    for cell in sweep.plan.cells:
        folder = run_directory(sweep.folder, cell.cell_id)
        folder.mkdir(parents=True)
        write_status(folder, status(State.BAD_CONFIG, exit_code=2, reason="optimizer.lr is x"))
    return sweep


def test_a_start_of_which_nothing_is_left_fails(all_bad, jobs):
    assert start()[1:] == (True, 2)
    cell = all_bad.plan.cells[0]
    write_result(run_directory(all_bad.folder, cell.cell_id), result(cell.cell_id, step=cell.steps))
    assert start()[1:] == (True, 0) and jobs == []  # one cell is done, which is something


def test_a_submission_to_slurm_of_which_nothing_is_left_fails(all_bad, tmp_path, monkeypatch, capsys):
    prepend_to_path(tmp_path / "bin", monkeypatch)
    slurm_stand_in.install(tmp_path / "bin", tmp_path / "db")
    done = start_module.start(StartOptions(target="smoke", launcher="submitit_slurm", yes=True))
    assert done.code == 2 and not done.ran_here and "submitted 0 cells" in capsys.readouterr().out


def test_a_cell_that_is_cancelled_while_it_is_postponed_is_not_started_here(workdir, stdlib_data, monkeypatch, jobs):
    started = []
    steps = {cell.cell_id: cell.steps for cell in planned(PlanOptions(target="smoke")).plan.cells}

    def submit_jobs(asked, *, sweep_dir, **_):
        started.append([job.name for job in asked])
        for job in asked:
            write_result(job.run_dir, result(job.name, step=steps[job.name]))
        if len(started) == 1:
            left = next(name for name in steps if name not in started[0])
            words = ["cancel", str(sweep_dir), "--cell", left, "--yes"]
            assert f"{left}: neither ran nor waited" in CliRunner().invoke(app, words).output
            started.append([left])
        return Submission(submitted=tuple(job.name for job in asked))

    monkeypatch.setattr(cells, "submit_jobs", submit_jobs)
    assert start(pilot=True)[1:] == (True, 0)
    assert len(started[0]) == 1 and sorted([*started[0], *started[1], *started[2]]) == sorted(steps)  # and none twice


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"override": ["hydra.launcher.partition=x"]}, "is for SLURM, and this would run here"),
        ({"override": ["optimizer.lr=1"]}, "use --set optimizer.lr=1"),
        ({"budget": ["1e11"], "top_budget": "1e11"}, "exclude each other"),
        ({"max_gpu_hours": 0.0, "settings": ["hardware={device: H100, gpus_per_node: 1}"]}, "--max-gpu-hours 0"),
    ],
)
def test_a_start_refuses_options_that_do_not_fit(stdlib_data, workdir, jobs, monkeypatch, options, words):
    monkeypatch.setattr("dlm.submit.local.visible_gpus", lambda: ["0"])
    with pytest.raises(UserError, match=words):
        start(**options)
    assert jobs == [] and not (workdir / "smoke").exists()


@pytest.mark.parametrize("verb", ["status", "collect"])
def test_a_verb_after_planning_reads_each_result_once(half_done, monkeypatch, verb):
    read = record_calls(monkeypatch, Path, "read_bytes")
    assert CliRunner().invoke(app, [verb, "smoke"]).exit_code == 0
    assert results_read(read) == dict.fromkeys((cell.cell_id for cell in half_done.plan.cells[:5]), 1)
