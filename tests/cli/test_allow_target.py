"""`dlm plan` and `dlm sweep` refuse classes that nobody has allowed, and hand --allow-target on to the jobs."""

import json
import os
import shutil

import pytest
import yaml
from support import ROOT
from support.slurm_stand_in import install
from support.submissions import prepend_to_path
from typer.testing import CliRunner

from dlm.cli import follow
from dlm.cli.verbs import app
from dlm.core import classes
from dlm.core.paths import configs_dir
from dlm.plan import cost
from dlm.plan.store import read_plan
from dlm.submit import submission

LOCAL = ("--launcher", "submitit_local", "--yes")
ATTACK = "dlm.submit.slurm_commands.run"


@pytest.fixture(autouse=True)
def nothing_is_allowed(monkeypatch):
    monkeypatch.setenv(classes.VARIABLE, "")


@pytest.fixture
def definition(tmp_path, workdir, stdlib_data):
    """Write a sweep of one cell that trains in seconds."""

    def write(**changes):
        content = yaml.safe_load((ROOT / "sweeps/smoke.yaml").read_text())
        content |= {"name": "one", "budgets": [2e9], "models": ["4k"], "proof": None}
        content["set"] |= {"data.block_size": 32, "data.stride": 32, "validation.num_sequences": 16}
        content["groups"] |= {"logger": "none"}
        for key, value in changes.items():
            content[key] = {**content.get(key, {}), **value}
        path = tmp_path / "one.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def dlm(*words):
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=True)


@pytest.mark.parametrize("block", ["set", "vary", "plan.json"])
def test_a_sweep_that_someone_else_wrote_runs_no_command(block, definition, tmp_path, workdir):
    marker = tmp_path / "marker"
    keys = {"callbacks.progress_bar._target_": ATTACK, "callbacks.progress_bar.command": ["touch", str(marker)]}
    if block == "plan.json":
        assert dlm("plan", definition()).exit_code == 0
        path = workdir / "one" / "plan.json"
        content = json.loads(path.read_text())
        content["cells"][0]["overrides"] |= keys
        path.write_text(json.dumps(content))
        target = workdir / "one"
    else:
        target = definition(**{block: keys if block == "set" else {key: [value] for key, value in keys.items()}})
    for words in (("plan", target), ("sweep", target, *LOCAL), ("submit", target, *LOCAL, "--allow-target", "dlm")):
        said = str(dlm(*words).exception)
        assert "callbacks.progress_bar._target_ has _target_, which runs code" in said
        assert str(target) in said
    assert not marker.exists()


def test_a_plan_shows_what_it_sets_and_varies(definition):
    path = definition(
        groups={"logger": "wandb"}, set={"logger.notes": "\x1b[31mtheirs"}, vary={"scheduler.min_ratio": [0.1, 0.2]}
    )
    said = dlm("plan", path, "--set", "launcher={set: {partition: cpu}}").stdout
    assert 'logger.notes="\\u001b[31mtheirs"' in said and "\x1b" not in said
    assert "sets: " in said and "validation.num_sequences=16" in said
    assert "varies: scheduler.min_ratio=[0.1, 0.2]" in said and 'launcher: partition="cpu"' in said


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A callback of a lab on PYTHONPATH that writes to a file, and the file."""
    marker, package = tmp_path / "marker", tmp_path / "lab" / "mylab.py"
    package.parent.mkdir()
    package.write_text(
        "from lightning.pytorch.callbacks import Callback\n\n\nclass Mine(Callback):\n"
        f"    def on_fit_start(self, trainer, module):\n        open({str(marker)!r}, 'a').write('run\\n')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(package.parent)]))
    return marker


@pytest.mark.slow
def test_a_lab_runs_a_callback_of_its_own_in_a_submitted_job_if_it_says_so(definition, lab, workdir, monkeypatch):
    monkeypatch.setattr(cost, "measure_flops_per_sec", lambda models, **_: dict.fromkeys(models, 1e10))
    words = ("submit", definition(), *LOCAL, "--override", "+callbacks.mine._target_=mylab.Mine")
    said = str(dlm(*words).exception)
    assert "_target_ is 'mylab.Mine'" in said and "start with --allow-target" in said
    assert not (workdir / "one" / "runs").exists() and not lab.exists()
    done = dlm(*words, "--allow-target", "mylab")
    assert done.exit_code == 0, done.output
    assert lab.read_text() == "run\n"
    assert "mylab" not in (workdir / "one" / "plan.json").read_text()


def test_a_choice_of_configs_with_a_class_of_a_lab_is_refused_when_it_is_planned(
    definition, tmp_path, monkeypatch, workdir
):
    shutil.copytree(configs_dir(), tmp_path / "configs")
    (tmp_path / "configs/callbacks/mylab.yaml").write_text("defaults: [default]\nmine: {_target_: mylab.Mine}\n")
    monkeypatch.setenv("DLM_CONFIGS", str(tmp_path / "configs"))
    path = definition(groups={"callbacks": "mylab"})
    said = str(dlm("plan", path).exception)
    assert "configs/callbacks/mylab.yaml: callbacks.mine._target_ is 'mylab.Mine'" in said
    assert not (workdir / "one").exists()
    assert dlm("plan", path, "--allow-target", "mylab").exit_code == 0
    assert read_plan(workdir / "one").cells[0].groups["callbacks"] == "mylab"


def test_the_batch_script_of_a_job_names_what_its_submitter_allows(definition, tmp_path, monkeypatch, workdir):
    prepend_to_path(tmp_path / "bin", monkeypatch)
    install(tmp_path / "bin", tmp_path / "db")
    monkeypatch.setattr(submission, "code_origin", lambda: None)  # this checkout may hold changes
    monkeypatch.setattr(submission, "running_code", lambda: None)
    monkeypatch.setattr(follow, "code_origin", lambda: None)
    words = ("submit", definition(), "--launcher", "submitit_slurm", "--yes")
    assert dlm(*words).exit_code == 0
    (script,) = (tmp_path / "db").glob("*.script")
    assert classes.VARIABLE not in script.read_text()
    script.unlink()
    assert dlm("cancel", workdir / "one").exit_code == 0
    done = dlm(*words, "--allow-target", "mylab.callbacks", "--then", "report")
    scripts = [path.read_text() for path in (tmp_path / "db").glob("*.script")]
    kinds = {word for script in scripts for word in ("dlm.cli follow", "dlm.launch") if word in script}
    assert len(kinds) == 2, done.output  # of the cell, and of the job that looks after the sweep
    assert all(f"export {classes.VARIABLE}=mylab.callbacks\n" in script for script in scripts)
