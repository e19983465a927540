"""The proof runs of a plan: what a definition may ask for, the cells that are built, and where they are stored."""

import json
import math

import pytest
import yaml
from support.settled_sweep import SETTINGS

from dlm.core.errors import UserError
from dlm.core.paths import sweeps_dir
from dlm.core.recipe import derive
from dlm.plan.cost import estimated, shape_of, with_estimates
from dlm.plan.definition import load_sweep, with_settings
from dlm.plan.grid import cell_config, make_plan
from dlm.plan.proof import build_proof, expected_proof, proof_cells, read_forecasts, write_forecasts
from dlm.plan.store import read_plan, write_plan

OBJECTIVE = "masked_diffusion"


def plan(*settings):
    return make_plan(load_sweep(sweeps_dir() / "smoke.yaml", [*SETTINGS, *settings]))


def built(plan, best=14_000.0, varied=None):
    return build_proof(plan, objective=OBJECTIVE, best=best, varied=varied or {})


def frozen(folder, plan, **kwargs):
    """Write a plan and a forecast with its proof runs, as the flow does; return the plan as it is then read."""
    cells, _ = built(plan, **kwargs)
    write_plan(folder, plan)
    rows = json.loads(json.dumps([cell.decisions() for cell in cells]))
    write_forecasts(folder, [{"label": OBJECTIVE, "sha256": "abc", "proof": {"cells": rows}}], before=0)
    return write_plan(folder, plan)


@pytest.mark.parametrize(
    ("proof", "words"),
    [
        ("{factor: 0.5}", "proof.factor is 0.5"),
        ("{factor: .inf}", "proof.factor is inf"),
        ("{sizes: 2}", "proof.sizes is 2"),
        ("{size: 3}", "unknown key of proof 'size': did you mean sizes"),
        ("3", "proof is 3"),
    ],
)
def test_a_proof_that_cannot_be_is_refused_in_one_line(proof, words):
    with pytest.raises(UserError, match=words) as error:
        load_sweep(sweeps_dir() / "smoke.yaml", [f"proof={proof}"])
    assert "\n" not in str(error.value)


def test_a_definition_without_a_proof_has_no_such_key_and_a_proof_may_be_added(stdlib_data, tmp_path):
    without, of_it = plan("proof=null"), plan("proof.factor=3")
    assert "proof" not in without.to_json(estimates=False)["spec"]
    assert of_it.to_json(estimates=False)["spec"]["proof"] == {"factor": 3.0, "sizes": 1}
    assert [cell.cell_id for cell in without.cells] == [cell.cell_id for cell in of_it.cells]
    write_plan(tmp_path, without)
    assert write_plan(tmp_path, of_it).spec.proof.factor == 3  # no other definition
    assert read_plan(tmp_path).spec.proof.factor == 3


def test_the_proof_run_is_a_cell_of_the_definition_at_its_budget_and_exact_size(stdlib_data):
    of = plan("proof.factor=3", "seeds=[4,7]", "optimizer.weight_decay=0.2")
    (cell,), notes = built(of)
    assert notes == [] and abs(cell.num_params / 14_000 - 1) < 0.01
    assert (cell.budget_flops, cell.seed) == (1.2e11, 8)  # no run of the sweep has this seed
    config = cell_config(cell.groups, cell.overrides)
    assert config["optimizer"]["weight_decay"] == 0.2 and config["scheduler"]["warmup_min_steps"] == 5
    assert cell.model.startswith("proof-14k") and cell.cell_id.startswith("mdm-proof-14k-1.2e11-")
    assert derive(config).shape == shape_of(cell) and shape_of(cell).num_params == cell.num_params
    assert cell.steps > 20 and abs(cell.budget_error_pct) < 2


def test_three_sizes_are_half_and_twice_the_best(stdlib_data):
    cells, _ = built(plan("proof.sizes=3"))
    assert [round(cell.num_params / 14_000, 1) for cell in cells] == [0.5, 1.0, 2.0]


def test_the_proof_run_is_built_in_the_manner_of_the_models_of_the_sweep(stdlib_data):
    demo = make_plan(load_sweep(sweeps_dir() / "demo.yaml"))  # its models have one layer and one head, others more
    (cell,), notes = build_proof(demo, objective="masked_diffusion", best=24_000, varied={})
    shape = shape_of(cell)
    assert (shape.n_layer, shape.n_head) == (1, 1) and not notes
    assert abs(cell.num_params / 24_000 - 1) < 0.01
    beyond, _ = build_proof(demo, objective="masked_diffusion", best=350_000, varied={})
    assert abs(beyond[0].num_params / 350_000 - 1) < 0.01


def test_a_size_that_no_shape_reaches_is_the_nearest_and_said(stdlib_data):
    (cell,), notes = built(plan(), best=100.0)
    assert cell.num_params > 500 and "no shape between the sizes of configs/model has 100 parameters" in notes[0]


def test_a_proof_run_that_cannot_be_trained_is_refused_with_what_to_do(stdlib_data):
    with pytest.raises(UserError, match=r"the proof run of 5e13 FLOPs.*epochs.*proof.factor.*--set proof=null"):
        built(plan("proof.factor=1250", "max_epochs=0.5"))
    built(plan("tokens_per_param=[1, 2000]"), best=100_000.0)  # this limits the grid only


def test_the_values_that_a_definition_varies_are_those_asked_for(stdlib_data):
    of = plan("vary.optimizer.lr=[1e-3,3e-3]")
    (cell,), _ = built(of, varied={"optimizer.lr": 3e-3})
    assert cell.learning_rate == 3e-3


def test_the_expected_cost_is_that_of_a_run_at_the_proof_budget(stdlib_data):
    of = plan("proof={factor: 3, sizes: 3}")
    cells = expected_proof(of)
    assert {cell.budget_flops for cell in cells} == {1.2e11} and len(cells) == 3
    assert cells[1].num_params == pytest.approx(18_552 * math.sqrt(3), rel=0.01)
    assert all(cell.estimate.hours for cell in estimated(cells, of.spec.hardware, rates={"4k": 1e9}))
    assert expected_proof(plan("proof=null")) == []


def test_proof_runs_are_in_every_plan_that_is_read_and_not_in_plan_json(stdlib_data, tmp_path):
    of = plan()
    write_plan(tmp_path, of)
    before = (tmp_path / "plan.json").read_bytes()
    grown = frozen(tmp_path, with_estimates(of, rates={"4k": 1e9}))
    assert (tmp_path / "plan.json").read_bytes() == before
    assert grown.cells == read_plan(tmp_path).cells and grown.grid == grown.cells[:-1]
    proof = grown.cells[-1]
    assert proof.is_proof and proof.forecast == "abc" and proof.estimate.hours > 0
    assert proof_cells(tmp_path)[0].cell_id == proof.cell_id
    assert expected_proof(grown) == []  # it is among the cells now
    content = yaml.safe_load((tmp_path / "cell" / f"{proof.cell_id}.yaml").read_text())
    assert content["forecast"] == "abc" and content["planned_cell_id"] == proof.cell_id
    assert "forecast" not in (tmp_path / "cell" / f"{of.cells[0].cell_id}.yaml").read_text()


def test_a_sweep_grows_in_sizes_and_seeds_and_keeps_what_has_started(stdlib_data, tmp_path):
    of = plan()
    write_plan(tmp_path, of)
    for cell in of.cells:
        (tmp_path / "runs" / cell.cell_id).mkdir(parents=True)
    grown = write_plan(tmp_path, make_plan(with_settings(of.spec, ["models=[4k,8k,19k,33k,49k,74k]", "seeds=[0,1]"])))
    assert {cell.cell_id for cell in of.cells} < {cell.cell_id for cell in grown.cells}
    assert len(grown.cells) == 2 * (len(of.cells) + 2)  # the largest size has too few steps at the lowest budget
    back = write_plan(tmp_path, make_plan(of.spec))  # the definition as before: what has not started is dropped
    assert {cell.cell_id for cell in back.cells} == {cell.cell_id for cell in of.cells}
    narrow = write_plan(tmp_path, make_plan(with_settings(of.spec, ["tokens_per_param=[5, 20]"])))
    assert {cell.cell_id for cell in narrow.cells} == {cell.cell_id for cell in of.cells}
    assert narrow.spec.tokens_per_param is None and len(narrow.dropped) == 0


def test_a_damaged_proof_file_is_named(tmp_path):
    (tmp_path / "proof.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="is no file of forecasts"):
        read_forecasts(tmp_path)
