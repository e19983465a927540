"""A definition and a plan are data: what Hydra would carry out is refused in one line, and nothing is run."""

import json
import os

import pytest

from dlm.core.data_only import RULE_KEYS
from dlm.core.errors import UserError
from dlm.core.paths import configs_dir
from dlm.plan.definition import load_sweep, parse_sweep
from dlm.plan.grid import make_plan
from dlm.plan.proof import read_forecasts
from dlm.plan.store import read_plan, write_plan
from dlm.submit.job import SETTING_NAMES, SlurmSettings, with_changes

TINY = {
    "name": "tiny",
    "budgets": [1e10],
    "convention": "full_masked_head",
    "models": ["4k"],
    "hardware": {"device": "cpu", "gpus_per_node": 0},
}
BAR = "callbacks.progress_bar"


def refused(**changes) -> str:
    with pytest.raises(UserError) as error:
        make_plan(parse_sweep({**TINY, **changes}, "tiny.yaml"))
    said = str(error.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("key", ["_target_", "_args_", "_partial_", "_recursive_", "_convert_"])
def test_a_key_that_makes_objects_is_refused_wherever_it_stands(key, stdlib_data):
    for changes in (
        {"set": {f"{BAR}.{key}": "os.system"}},
        {"set": {BAR: {key: "os.system"}}},
        {"set": {BAR: [1, {"deep": {key: "os.system"}}]}},
        {"set": {BAR: "{" + key + ": os.system}"}},
        {"set": {f"{BAR}[{key}]": 1}},
        {"vary": {f"{BAR}.{key}": ["os.system"]}},
        {"vary": {BAR: [{key: "os.system"}]}},
        {"groups": {"callbacks": "{" + key + ": os.system}"}},
        {"launcher": {"set": {"comment": {key: "os.system"}}}},
    ):
        said = refused(**changes)
        assert said.startswith("tiny.yaml: ") and f" has {key}, which runs code" in said, said
        assert "--override" in said and "--allow-target" in said
    assert f"set.{BAR}.{key} " in refused(set={f"{BAR}.{key}": "os.system"})


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a-${seed}", r"\${oc.env:HOME}", "${oc.env:${x}}", "${dlm.x:}"])
def test_an_interpolation_is_refused_wherever_it_stands(text, stdlib_data):
    for changes in (
        {"set": {"logger.project": text}},
        {"set": {"logger.tags": ["a", text]}},
        {"set": {f"logger.{text}": 1}},
        {"vary": {"logger.project": ["a", text]}},
        {"groups": {"logger": text}},
        {"launcher": {"set": {"comment": text}}},
    ):
        said = refused(**changes)
        assert said.startswith("tiny.yaml: ") and "write the value itself" in said and "--override" in said


def test_a_description_may_hold_any_words(stdlib_data):
    make_plan(parse_sweep({**TINY, "description": "what ${x} and _target_ are"}, "tiny.yaml"))


@pytest.mark.parametrize(
    "key",
    ["hydra.searchpath", "hydra.run.dir", "hydra.job.env_set.A", "hydra.callbacks.x", "hydra.launcher.setup", "hydra",
     "hydra/launcher", "+hydra.run.dir", "logger.settings.base_url", "logger.settings"],
)  # fmt: skip
def test_keys_that_name_programs_files_and_servers_are_refused(key, stdlib_data):
    for changes in ({"set": {key: "x"}}, {"vary": {key: ["x"]}}, {"groups": {key: "x"}}):
        said = refused(**changes)
        assert f"tiny.yaml: {key} can name programs" in said and "command line" in said


@pytest.mark.parametrize(
    "key", ["setup", "teardown", "srun_args", "additional_parameters", "follower", "submitit_folder", "use_srun"]
)
def test_a_rule_for_the_launcher_sets_what_a_job_requests_and_no_commands(key, stdlib_data):
    said = refused(launcher={"set": {key: ["touch marker"]}})
    assert said.startswith(f"launcher.set.{key}: ") and "a definition may set what a job requests (" in said
    assert f"--override hydra.launcher.{key}=" in said
    with pytest.raises(UserError, match=f"launcher.set.{key}"):  # also at the start of a plan that was made before
        with_changes(SlurmSettings(), {key: ["touch marker"]})
    assert set(RULE_KEYS) <= set(SETTING_NAMES)


@pytest.fixture
def edited(tmp_path, stdlib_data):
    """Change the first cell of a plan by hand, and return the file and what reading it says."""
    path = tmp_path / "plan.json"
    write_plan(tmp_path, make_plan(parse_sweep(TINY, "tiny.yaml")))
    whole = path.read_text()

    def complaint(**changes):
        content = json.loads(whole)
        cell = content["cells"][0]
        cell |= {key: cell[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
        path.write_text(json.dumps(content))
        with pytest.raises(UserError) as error:
            read_plan(tmp_path)
        said = str(error.value)
        assert said.startswith(f"{path}, cell ") and "\n" not in said
        return said

    return complaint


def test_a_plan_that_was_edited_by_hand_is_refused(edited):
    for changes, said in (
        ({"overrides": {f"{BAR}._target_": "os.system"}}, f"{BAR}._target_ has _target_, which runs code"),
        ({"overrides": {BAR: {"_target_": "os.system"}}}, f"{BAR}._target_ has _target_, which runs code"),
        ({"overrides": {"logger.project": "${oc.env:HOME}"}}, "logger.project has '${oc.env:HOME}'"),
        ({"overrides": {"hydra.callbacks": {"a": 1}}}, "hydra.callbacks can name programs"),
        ({"overrides": {"logger": {"settings": {"base_url": "x"}}}}, "logger.settings can name programs"),
        ({"overrides": {"paths.run_dir": "/x"}}, "no cell sets paths.run_dir: allowed are model,"),
        ({"overrides": {"ckpt_path": "/x"}}, "no cell sets ckpt_path: allowed are model,"),
        ({"groups": {"callbacks": "../../x/evil"}}, "no cell chooses callbacks: '../../x/evil'"),
        ({"groups": {"hydra/job_logging": "evil"}}, "no cell chooses hydra/job_logging: 'evil'"),
    ):
        assert said in edited(**changes), said


@pytest.mark.parametrize("name", ["${oc.env:HOME}", "[a,b]", "a@hydra.job_logging", "../x", "a=b", "a\nb", "", "-x"])
def test_names_in_a_plan_that_hydra_would_carry_out_are_refused(edited, name):
    for key in ("cell_id", "model", "parent"):
        assert "is no name of a cell, a model or a run" in edited(**{key: name})


@pytest.mark.parametrize("key", ["num_params", "budget_flops", "tokens", "steps", "global_batch_size", "block_size"])
def test_numbers_in_a_plan_that_nothing_can_have_are_refused(edited, key):
    assert f"{key} is 0, and must be above 0" in edited(**{key: 0})


def test_a_choice_of_another_folder_is_unknown(tmp_path, stdlib_data):
    (tmp_path / "evil.yaml").write_text((configs_dir() / "model/4k.yaml").read_text())
    for name in (os.path.relpath(tmp_path / "evil", configs_dir() / "model"), str(tmp_path / "evil"), "../model/4k"):
        assert "unknown model '" in refused(models=[name])


def test_the_definition_in_a_plan_is_checked_too(tmp_path, stdlib_data):
    write_plan(tmp_path, make_plan(parse_sweep(TINY, "tiny.yaml")))
    content = json.loads((tmp_path / "plan.json").read_text())
    content["spec"]["vary"] = {f"{BAR}._target_": ["os.system"]}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"plan\.json: vary\.{BAR}\._target_ has _target_, which runs code"):
        read_plan(tmp_path)


def test_the_cells_of_a_frozen_forecast_are_checked_too(tmp_path, stdlib_data):
    (planned,) = make_plan(parse_sweep(TINY, "tiny.yaml")).cells
    cell = planned.decisions() | {"cell_id": "c", "overrides": {f"{BAR}._target_": "os.system"}}
    forecasts = [{"label": "x", "sha256": "y", "proof": {"cells": [cell]}}]
    (tmp_path / "proof.json").write_text(json.dumps({"forecasts": forecasts}))
    with pytest.raises(UserError, match=r"proof\.json, cell c: .*_target_, which runs code"):
        read_forecasts(tmp_path)


def test_a_setting_of_the_command_line_is_stored_and_so_it_is_data_too(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(TINY))
    with pytest.raises(UserError, match="has _target_, which runs code"):
        load_sweep(path, [f"{BAR}._target_=os.system"])
