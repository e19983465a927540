"""A wrong sweep definition: one line with the key, its value and what is allowed, in the words of the file."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm.core.checks import RANGES, SWITCHES, TEXTS, WHOLE
from dlm.core.errors import UserError
from dlm.core.flops import PEAK_FLOPS
from dlm.plan.cost import with_estimates
from dlm.plan.definition import Hardware, LauncherRule, Proof, Replicates, SweepSpec, load_sweep, parse_sweep
from dlm.plan.grid import make_plan
from dlm.plan.store import read_plan, write_plan

TINY = {
    "name": "tiny",
    "budgets": [1e10, 3e10],
    "convention": "full_masked_head",
    "models": ["4k"],
    "hardware": {"device": "cpu", "gpus_per_node": 0},
}
RAW = (
    "Input should",
    "Value error",
    "pydantic",
    "after validation",
    "tuple",
    "Dictionary",
    "valid string",
    "[A-Za",
    "\n",
)


def refused(without=(), **changes) -> str:
    content = {key: value for key, value in {**TINY, **changes}.items() if key not in without}
    with pytest.raises(UserError) as error:
        make_plan(parse_sweep(content, "tiny.yaml"))
    said = str(error.value)
    assert not any(raw in said for raw in RAW), said
    return said.removeprefix("tiny.yaml: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "a/b"}, "name is 'a/b': allowed are letters, digits, '_', '.' and '-', a letter or digit first"),
        ({"name": False}, "name is false: it must be text, in quotes"),  # name: no
        ({"name": None}, "name is null: it must be text"),
        ({"budgets": 1e19}, "budgets is 1e+19: it must be a list of numbers, such as [1e+19]"),
        ({"budgets": 10**400}, f"budgets is 1{'0' * 56}...: it must be a list of numbers"),
        (
            {"replicates": 10**400},
            f"replicates is 1{'0' * 56}...: give a rule, {{KEY: VALUE, ...}}, or",
        ),
        ({"budgets": ["lots"]}, "entry 1 of budgets is 'lots': it must be a number"),
        ({"budgets": [1e10, True]}, "entry 2 of budgets is true: it must be a number"),
        ({"models": "8k"}, "models is '8k': it must be a list of names, such as [8k]"),
        ({"models": ["4k", 8]}, "entry 2 of models is 8: it must be text, in quotes"),
        (
            {"convention": "6m"},
            "convention is '6m': it must be 6n, 6n_total, full or full_masked_head; did you mean 6n?",
        ),
        ({"tokens_per_param": [2]}, "tokens_per_param is [2]: it must be a list of two numbers"),
        ({"seeds": 3}, "seeds is 3: it must be a list of whole numbers, such as [3]"),
        ({"seeds": [0, 1.5]}, "entry 2 of seeds is 1.5: it must be a whole number of at least 0"),
        ({"set": ["optimizer.lr"]}, """set is ["optimizer.lr"]: it must hold keys and values, such as {KEY: VALUE}"""),
        ({"set": {1: 2}}, "the key 1 of set is not text: put it in quotes"),
        ({"set": {"optimizer.lr": math.inf}}, "set.optimizer.lr is inf: it must be text, a finite number, true, false"),
        ({"set": {"optimizer": {"lr": 1}}}, "optimizer is a group: set each of its keys by its full name, such as opt"),
        ({"set": {"seed": 3}}, "seed cannot be set in a sweep: it follows from seeds of the definition"),
        ({"vary": {"training.budget": [1e9]}}, "training.budget cannot be set in a sweep: it follows from budgets"),
        ({"vary": {"optimizer.lr": 1e-3}}, "vary.optimizer.lr is 0.001: it must be a list of values, such as [0.001]"),
        (
            {"vary": {"optimizer.lr": []}},
            "vary.optimizer.lr is []: it must be a list of values with at least one entry",
        ),
        ({"vary": {"optimizer": ["adamw", ["muon"]]}}, """unknown optimizer ["muon"]: allowed: adamw, muon"""),
        ({"groups": {"data": 3}}, "groups.data is 3: it must be text, in quotes"),
        ({"branches": "maybe"}, "branches is 'maybe': it must be true or false"),
        ({"max_epochs": True}, "max_epochs is true: it must be a number above 0"),  # max_epochs: yes
        ({"max_gpu_hours": math.inf}, "max_gpu_hours is inf: it must be a finite number above 0"),
        ({"hardware": "cpu"}, "hardware is 'cpu': it must hold keys of these, with their values: device, nodes, gpus"),
        ({"proof": {"sizes": True}}, "proof.sizes is true: it must be 1 or 3"),
        ({"launcher": {"set": {}}}, "launcher.set is {}: it must hold keys and values"),
        ({"launcher": [{"set": {"qos": "x"}}, {"set": 3}]}, "set in entry 2 of launcher is 3: it must hold keys and"),
        (
            {"optimizer.lr": 1e-3},
            "unknown key 'optimizer.lr': a definition has no dotted keys at the top; write set: {",
        ),
        (
            {"hardware.mfu": 0.3},
            "unknown key 'hardware.mfu': a definition has no dotted keys at the top; write hardware",
        ),
    ],
)
def test_a_wrong_value_is_one_line_with_what_is_allowed(changes, said, stdlib_data):
    assert refused(**changes).startswith(said), refused(**changes)
    assert len(refused(**changes)) < 300


@pytest.mark.parametrize(
    ("changes", "without", "said"),
    [
        ({"modles": ["4k"]}, ["models"], "unknown key 'modles': did you mean models?"),
        ({"hardwear": {"device": "x"}}, ["models", "budgets"], "unknown key 'hardwear': did you mean hardware?"),
        ({"replicates": {"belov": 1, "runs": 2}}, (), "unknown key of replicates 'belov': did you mean below?"),
        ({"launcher": [{"sett": {"qos": "x"}}]}, (), "unknown key of entry 1 of launcher 'sett': did you mean set?"),
    ],
)
def test_a_typo_is_named_before_the_key_that_is_missing_for_it(changes, without, said):
    assert refused(without, **changes).startswith(said)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(alphabet="a1/.\n '", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text("ab.", max_size=2) | st.integers(), inner, max_size=2)
    ),
    max_leaves=4,
)  # fmt: skip
PARTS = {"hardware": Hardware, "proof": Proof, "replicates": Replicates, "launcher": LauncherRule}
KEYS = [[key] for key in SweepSpec.model_fields] + [
    [top, key] for top, kind in PARTS.items() for key in kind.model_fields
]
LIMITS = [["set", key] for key in (*RANGES, *WHOLE, *TEXTS, *SWITCHES) if key not in ("seed", "optimizer.momentum")]
GIVEN = {"replicates": {"below": 0.5, "runs": 2}, "launcher": {"set": {"qos": "x"}}, "set": {"data.batch_size": 8}}


@given(st.sampled_from(KEYS + LIMITS), ODD, st.booleans())
@settings(max_examples=250)
def test_any_definition_is_planned_or_refused_in_words(stdlib_data, where, value, as_list):
    content = {**TINY, "models": ["4k"], "max_epochs": 1e9}
    if len(where) == 1:
        content[where[0]] = value
    else:
        top, key = where
        node = {**content.get(top, GIVEN.get(top, {})), key: value}
        content[top] = [GIVEN[top], node] if as_list and top in ("replicates", "launcher") else node
    try:
        plan = make_plan(parse_sweep(content, "tiny.yaml"))
    except UserError as error:
        said = str(error)
        assert not any(raw in said for raw in RAW), said
        return
    json.dumps(plan.spec.plain(), allow_nan=False)  # plan.json can hold it
    assert parse_sweep(plan.spec.plain(), "plan.json") == plan.spec


def test_a_gpu_that_dlm_does_not_know_is_planned_with_its_peak(stdlib_data, tmp_path):
    said = refused(hardware={"device": "RTX4090"})
    assert "hardware.device is 'RTX4090'" in said and "add hardware.peak_flops" in said and "H100 NVL" in said
    assert "did you mean H100" in refused(hardware={"device": "H101"})
    assert "leave it out" in refused(hardware={"device": "cpu", "peak_flops": 1e12})
    own = {"device": "RTX4090", "peak_flops": 165e12, "gpus_per_node": 1}
    plan = write_plan(tmp_path, make_plan(parse_sweep({**TINY, "hardware": own}, "tiny.yaml")))
    assert read_plan(tmp_path).spec.hardware.peak == 165e12
    known = make_plan(parse_sweep({**TINY, "hardware": {"device": "H100", "gpus_per_node": 1}}, "tiny.yaml"))
    ours, theirs = with_estimates(plan).cells[0].estimate, with_estimates(known).cells[0].estimate
    assert ours.hours / theirs.hours == pytest.approx(PEAK_FLOPS["H100"] / 165e12)
    assert "RTX4090" in ours.basis and "peak_flops" not in known.spec.plain()["hardware"]


def test_a_key_that_would_not_count_is_refused(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("name: tiny\nbudgets: [1e10]\nmodels: [4k]\nvary: {optimizer.lr: [1e-3]}\n")
    with pytest.raises(UserError, match=r"the definition varies optimizer.lr: use --set vary.optimizer.lr=\[0.003\]"):
        load_sweep(path, ["optimizer.lr=3e-3"])
    assert load_sweep(path, ["vary.optimizer.lr=[3e-3]"]).vary == {"optimizer.lr": (3e-3,)}
    path.write_text(path.read_text() + "set: {optimizer.lr: 3e-3}\n")
    with pytest.raises(UserError, match=r"set and vary both have optimizer\.lr, and only vary counts"):
        load_sweep(path)
