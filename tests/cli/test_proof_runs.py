"""From a sweep whose cells are done to a scored proof run, in this process and without training."""

import functools
import html
import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from support import slurm_stand_in
from support.format_1 import as_format_1
from support.settled_sweep import finish, settled_sweep, true_loss
from support.stub_cell import status
from support.submissions import prepend_to_path
from typer.testing import CliRunner

from dlm.cli import fits as cli_fits
from dlm.cli import gather, price
from dlm.cli import start as start_module
from dlm.cli.options import StartOptions
from dlm.cli.targets import Sweep, existing, planned
from dlm.cli.verbs import app
from dlm.core.errors import UserError
from dlm.fit import table
from dlm.plan import cost
from dlm.plan.store import read_plan, write_plan
from dlm.record.outcomes import State
from dlm.record.run import run_directory, write_status
from dlm.submit import cells, submission
from dlm.submit.cluster import Submission

OBJECTIVE = "masked_diffusion"
FITTED = functools.cache(cli_fits._fitted.__wrapped__)  # equal runs of several tests are fitted once


@pytest.fixture(autouse=True)
def quick(stdlib_data, workdir, monkeypatch):
    """Few bootstrap replicates, one fit of equal runs, no measurement of this machine, no files of figures."""
    monkeypatch.setattr(cli_fits, "_fitted", FITTED)
    fit_sweep = table.fit_sweep
    monkeypatch.setattr(table, "fit_sweep", lambda runs: fit_sweep(runs, bootstrap=100))
    monkeypatch.setattr(cost, "measure_flops_per_sec", lambda models, **_: dict.fromkeys(models, 1e10))
    monkeypatch.setattr("dlm.report.figures.save", lambda figure, folder, name: {"svg": b"<svg></svg>"})
    monkeypatch.setattr("dlm.report.figures.inline_svg", lambda drawing, name, description: "<svg></svg>")


@pytest.fixture
def trained(monkeypatch):
    """Jobs are not run: each ends at once with the loss of the true law. Yields the names of the jobs."""
    names = []

    def submit_jobs(jobs, *, sweep_dir, **_):
        by_name = {cell.cell_id: cell for cell in read_plan(sweep_dir).cells}
        for job in jobs:
            cell = by_name[job.name]
            finish(sweep_dir, cell, true_loss(cell.num_params, cell.tokens))
            names.append(job.name)
        return Submission(submitted=tuple(job.name for job in jobs))

    monkeypatch.setattr(cells, "submit_jobs", submit_jobs)
    return names


def start(folder, launcher="submitit_local", **options):
    done = start_module.start(StartOptions(target=str(folder), launcher=launcher, yes=True, **options))
    return done.sweep, done.ran_here, done.code


def proof_of(folder):
    (forecast,) = json.loads((folder / "proof.json").read_text())["forecasts"]
    return forecast


def test_a_settled_sweep_freezes_trains_and_scores_its_proof_run(trained, capsys):
    sweep = settled_sweep()
    started, ran_here, code = start(sweep.folder)
    assert ran_here and code == 0
    forecast = proof_of(sweep.folder)
    (proof,) = [cell for cell in started.plan.cells if cell.is_proof]
    assert trained == [proof.cell_id] and proof.forecast == forecast["sha256"]
    assert abs(proof.num_params / forecast["predictions"]["50000000000"]["N"] - 1) < 0.01
    assert proof.estimate.hours > 0
    gather.report(started)
    said = capsys.readouterr().out
    ending = said.strip().splitlines()
    at = next(i for i, line in enumerate(ending) if line.startswith(f"{OBJECTIVE}: Proof run at 5e10 FLOPs"))
    assert re.search(r"predicted \S+ \(\S+ to \S+\), measured \S+, z = -?\d\.\d$", ending[at])
    assert ending[-1].startswith("report:") and at < len(ending) - 1
    z = float(ending[at].rsplit("= ")[1])
    assert abs(z) < 2.5  # the run follows the law that the other runs follow
    page = (sweep.folder / "report" / "report.html").read_text()
    assert page.count(ending[at].removeprefix(f"{OBJECTIVE}: ")) == 2  # in the answer and in its own section
    assert "the proof run has seed 1" in said and "straight log-log line" in page
    runs = pd.read_csv(sweep.folder / "runs.csv")
    assert list(runs["role"].dropna()) == ["proof"] and runs["role"].iloc[-1] == "proof"
    assert json.loads((sweep.folder / "fits.json").read_text())[f"{OBJECTIVE}/combined"]["n"] == len(runs) - 1


def test_a_report_before_the_forecast_does_not_hinder_the_proof_run(trained):
    sweep = settled_sweep()
    gather.report(sweep)
    started, _, _ = start(sweep.folder)
    assert trained == [started.plan.cells[-1].cell_id] and started.plan.cells[-1].is_proof


def test_started_cells_of_a_grown_sweep_come_before_the_proof_run(trained):
    sweep = settled_sweep()
    grown = planned(StartOptions(target=str(sweep.folder), settings=["seeds=[0,1]"]))
    begun = next(cell for cell in grown.plan.cells if cell.seed == 1)
    write_plan(sweep.folder, grown.plan)
    write_status(run_directory(sweep.folder, begun.cell_id), status(State.LOST, step=3, steps=begun.steps))
    estimates = (sweep.folder / "estimate.json").read_bytes()
    with pytest.raises(UserError, match="max_local_hours"):  # a refused start changes no file
        start(sweep.folder, settings=["seeds=[0]", "max_local_hours=1e-9"])
    assert (sweep.folder / "estimate.json").read_bytes() == estimates and not (sweep.folder / "proof.json").exists()
    start(sweep.folder, settings=["seeds=[0]"])
    assert trained[0] == begun.cell_id and len(trained) == 2


def test_a_forecast_is_frozen_once_and_what_has_changed_since_is_said(trained, capsys):
    sweep = settled_sweep()
    start(sweep.folder)
    before = (sweep.folder / "proof.json").read_bytes()
    started, _, _ = start(sweep.folder, settings=["proof.factor=2"])
    cell = started.plan.grid[0]
    finish(sweep.folder, cell, true_loss(cell.num_params, cell.tokens) * 1.01)
    gather.report(started)
    said = capsys.readouterr().out
    assert (sweep.folder / "proof.json").read_bytes() == before and len(trained) == 1
    assert "the definition now asks for a proof run at 8e10 FLOPs; the forecast of" in said
    assert "the runs that the law is fitted to have changed; the forecast of" in said
    path = sweep.folder / "proof.json"
    path.write_text(path.read_text().replace('"made": "20', '"made": "19', 1))
    gather.report(started)  # the laws do not depend on it
    assert "has been changed since it was written" in capsys.readouterr().out


def test_a_proof_of_an_earlier_format_is_scored_and_its_runs_are_the_same(trained, capsys):
    sweep = settled_sweep()
    started, _, _ = start(sweep.folder)
    assert proof_of(sweep.folder)["runs"]["table"].keys() >= {"objective", "params", "tokens", "seed", "loss"}
    content = as_format_1(proof_of(sweep.folder))
    for forecast in (proof_of(sweep.folder), content):
        (sweep.folder / "proof.json").write_text(json.dumps({"forecasts": [forecast]}))
        capsys.readouterr()
        gather.report(started)
        said = capsys.readouterr().out
        assert re.search(r"measured \S+, z = ", said) and "have changed" not in said
    cell = started.plan.grid[0]
    finish(sweep.folder, cell, true_loss(cell.num_params, cell.tokens) * 1.01)
    gather.report(started)
    assert "the runs that the law is fitted to have changed" in capsys.readouterr().out


def test_a_run_that_was_killed_after_the_freezing_tests_the_same_forecast(trained, monkeypatch):
    sweep = settled_sweep()

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cells, "submit_jobs", killed)
        start(sweep.folder)
    before = (sweep.folder / "proof.json").read_bytes()
    assert trained == []
    started, _, _ = start(sweep.folder)
    assert (sweep.folder / "proof.json").read_bytes() == before
    assert trained == [started.plan.cells[-1].cell_id] and started.plan.cells[-1].is_proof


def fail(folder, cell, state, **values):
    run_dir = run_directory(folder, cell.cell_id)
    (run_dir / "result.json").unlink()
    write_status(run_dir, status(state, step=3, steps=cell.steps, **values))


@pytest.mark.parametrize(("state", "retry_failed"), [(State.LOST, False), (State.DIVERGED, True)])
def test_a_cell_that_is_tried_again_comes_before_the_proof_run(trained, state, retry_failed):
    sweep = settled_sweep()
    fail(sweep.folder, sweep.plan.cells[2], state, exit_code=None if state is State.LOST else 3)
    start(sweep.folder, retry_failed=retry_failed)
    assert trained[0] == sweep.plan.cells[2].cell_id and len(trained) == 2


def test_a_cell_that_fails_again_is_tried_once_in_one_command(monkeypatch, trained):
    sweep = settled_sweep()
    failing = sweep.plan.cells[4]
    fail(sweep.folder, failing, State.DIVERGED, exit_code=3)
    end = cells.submit_jobs

    def submit_jobs(jobs, **kwargs):
        done = end([job for job in jobs if job.name != failing.cell_id], **kwargs)
        trained.extend(job.name for job in jobs if job.name == failing.cell_id)
        return done

    monkeypatch.setattr(cells, "submit_jobs", submit_jobs)
    start(sweep.folder, retry_failed=True)
    assert trained.count(failing.cell_id) == 1 and len(trained) == 2  # it, and the proof run


def test_a_forecast_is_scored_only_by_a_run_that_was_started_under_it(trained, capsys):
    sweep = settled_sweep()
    started, _, _ = start(sweep.folder)
    (proof,) = [cell for cell in started.plan.cells if cell.is_proof]
    config = run_directory(sweep.folder, proof.cell_id) / "config.yaml"
    config.write_text(f"forecast: {proof.forecast}\n")
    gather.report(started)
    assert "z = " in capsys.readouterr().out
    config.write_text("forecast: 0123456789abcdef\n")
    gather.report(started)
    said = capsys.readouterr().out
    assert "was started under another forecast (SHA-256 0123456789ab)" in said and "z = " not in said
    (sweep.folder / "proof.json").unlink()  # a forecast that is made after the run is none
    start(sweep.folder)
    assert "was trained before there was a forecast of it" in capsys.readouterr().out
    assert not (sweep.folder / "proof.json").exists()


def test_cells_that_failed_for_good_do_not_hinder_unless_a_budget_lacks_its_minimum(trained, capsys):
    sweep = settled_sweep()
    diverged = {"exit_code": 3, "reason": "the loss is nan"}
    fail(sweep.folder, sweep.plan.cells[4], State.DIVERGED, **diverged)  # the largest size at the lowest budget
    others = [cell for cell in sweep.plan.cells if cell.budget_flops == 4e10]
    for cell in others[2:]:
        fail(sweep.folder, cell, State.DIVERGED, **diverged)
    started, _, _ = start(sweep.folder)
    said = capsys.readouterr().out
    assert f"no proof run of {OBJECTIVE}: 4 of the cells have no result" in said and "budget 4e10: 2 sizes" in said
    assert trained == [] and not (sweep.folder / "proof.json").exists()
    gather.report(started)
    assert f"{OBJECTIVE}: No proof run: 4 of the cells have no result" in capsys.readouterr().out
    for cell in others[2:]:
        finish(sweep.folder, cell, true_loss(cell.num_params, cell.tokens))
    start(sweep.folder)
    assert len(trained) == 1 and proof_of(sweep.folder)["runs"]["n"] == len(sweep.plan.cells) - 1


def test_fits_that_determine_no_best_size_give_no_proof_run_but_the_command_that_would(trained, capsys):
    sweep = settled_sweep("models=[8k,19k,33k,49k,74k]", "budgets=[2e10]", "tokens_per_param=[0.4,6]")
    started, _, code = start(sweep.folder)
    assert code == 0 and trained == []
    gather.report(started)
    said = capsys.readouterr().out
    assert f"no proof run of {OBJECTIVE}: there is no law to predict from" in said
    assert f"{OBJECTIVE}: No proof run: there is no law" in said
    lines = said.splitlines()
    settle = next(line for line in lines if line.startswith("what would settle it: 2e10 FLOPs"))
    to_copy = lines[lines.index(settle) + 1].strip()
    assert (
        "the lowest loss is at the smallest size tried" in settle and "8k would show where the minimum lies" in settle
    )
    command = shlex.split(to_copy)[1:]
    settings = [*command[3::2]]
    assert command[:3] == ["sweep", str(sweep.folder), "--set"] and settings[0] == "models=[8k,19k,33k,49k,74k]"
    window = re.fullmatch(r"tokens_per_param=\[0.4,(.*)\]", settings[1])  # it dropped the size that is wanted
    assert window is not None and 20 < float(window[1]) < 23
    assert "1 more run, 2e10 FLOPs, about" in settle
    assert (
        "One budget gives no law. A lower one would give a line: 2 more runs" in said
        and "--set 'budgets=[6666666666.67,20000000000]'" in said
    )
    page = html.unescape((sweep.folder / "report" / "report.html").read_text())
    assert "What would settle it" in page and f"<code>{to_copy}</code>" in page
    assert "Untuned: these exponents describe this recipe" in page
    done = CliRunner().invoke(app, [*command, "--launcher", "submitit_local", "--yes"])
    assert done.exit_code == 0, done.output
    assert {cell.model for cell in existing(str(sweep.folder)).plan.grid} == {"8k", "19k", "33k", "49k", "74k"}
    assert len(trained) == 1 and "-8k-" in trained[0]


def test_the_price_names_the_proof_run_and_refuses_what_cannot_be_paid(capsys):
    sweep = settled_sweep("max_local_hours=0.01")
    left = [cell.cell_id for cell in sweep.plan.cells]
    price.price_here(sweep.plan, left=left)
    assert "then the proof run: 5e10 FLOPs, about 5 s; the law decides its size (expected: 21k parameters)" in (
        capsys.readouterr().out
    )
    dear = planned(StartOptions(target=str(sweep.folder), settings=["proof.factor=100"]))
    with pytest.raises(UserError, match=r"the proof run of about 4e12 FLOPs would take about .*--set proof=null"):
        price.price_here(dear.plan, left=left)


def test_gpu_hours_of_the_proof_run_count_against_the_limit():
    hardware = ["hardware={device: H100, gpus_per_node: 8}"]
    totals = {}
    for proof in ("null", "{factor: 2}"):
        settings = [*hardware, "budgets=[1e17]", "models=[885k]", "max_epochs=1e9", f"proof={proof}"]
        sweep = planned(StartOptions(target="smoke", settings=[*settings, "tokens_per_param=null"]))
        plan = cost.with_estimates(sweep.plan)
        options = StartOptions(target="smoke", max_gpu_hours=0.0)
        now = start_module.look(Sweep(Path("none"), plan))
        with pytest.raises(UserError, match="GPU-hours to go") as error:
            price.agree_on_cost(plan, sweep.folder, options, left=now)
        totals[proof] = float(str(error.value).split()[0])
    assert totals["{factor: 2}"] == pytest.approx(3 * totals["null"], rel=0.02)
    assert "with the proof run" in str(error.value)


def test_slurm_submits_the_proof_run_when_the_other_cells_are_done(tmp_path, monkeypatch, capsys):
    prepend_to_path(tmp_path / "bin", monkeypatch)
    slurm_stand_in.install(tmp_path / "bin", tmp_path / "db")
    monkeypatch.setattr(submission, "code_origin", lambda: None)
    sweep = settled_sweep()
    cell = sweep.plan.cells[0]
    (run_directory(sweep.folder, cell.cell_id) / "result.json").unlink()
    (run_directory(sweep.folder, cell.cell_id) / "status.json").unlink()
    _, ran_here, _ = start(sweep.folder, "submitit_slurm")
    assert not ran_here and "the proof run follows: run the same command again" in capsys.readouterr().out
    start(sweep.folder, "submitit_slurm")  # its cell still waits in the queue
    assert not (sweep.folder / "proof.json").exists() and len(list((tmp_path / "db").glob("*.script"))) == 1
    slurm_stand_in.end(tmp_path / "db", "1001_0", "COMPLETED|0:0")
    finish(sweep.folder, cell, true_loss(cell.num_params, cell.tokens))
    started, _, _ = start(sweep.folder, "submitit_slurm")
    proof = started.plan.cells[-1]
    assert proof.is_proof and proof.forecast == proof_of(sweep.folder)["sha256"]
    jobs = sorted((sweep.folder / "ledger").glob("*.jobs"), key=lambda path: path.stat().st_mtime_ns)[-1].read_text()
    assert f"+cell={proof.cell_id} " in jobs and len(jobs.splitlines()) == 1
    shown = CliRunner().invoke(app, ["status", str(sweep.folder), "--json"])
    assert json.loads(shown.output)[-1]["state"] == "submitted"
    slurm_stand_in.end(tmp_path / "db", "1002_0", "FAILED|4:0")  # out of memory: half the micro-batch
    start(sweep.folder, "submitit_slurm")
    jobs = sorted((sweep.folder / "ledger").glob("*.jobs"), key=lambda path: path.stat().st_mtime_ns)[-1].read_text()
    assert f"+cell={proof.cell_id} " in jobs and "data.micro_batch_size=4" in jobs
    cancelled = CliRunner().invoke(app, ["cancel", str(sweep.folder), "--cell", proof.cell_id, "--yes"])
    assert "cancelled job 1003_0" in cancelled.output
