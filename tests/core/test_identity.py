"""What decides a result is in the id, nothing else is, and its spelling does not matter."""

import copy
import json
import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dlm.core import text
from dlm.core.configs import load_base
from dlm.core.identity import canonical_json, cell_id, content_hash
from dlm.plan.grid import cell_config

GROUPS = {"model": "8k", "data": "stdlib", "objective": "masked_diffusion", "optimizer": "adamw", "scheduler": "cosine"}
CONFIG = {**cell_config(GROUPS, {"training.budget": 1e10}), "ckpt_path": None}

leaves = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-1e9, 1e9) | st.text(max_size=5)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


def other_spelling(value, with_nulls):
    """The same content: keys the other way round, whole numbers as floats, lists as tuples, null keys added."""
    if isinstance(value, dict):
        turned = {key: other_spelling(item, with_nulls) for key, item in reversed(value.items())}
        return {**turned, **({"no such key": None} if with_nulls else {})}
    if isinstance(value, list):
        return tuple(other_spelling(item, with_nulls) for item in value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@given(trees, st.booleans())
def test_the_spelling_of_a_value_does_not_change_the_id(value, with_nulls):
    assert content_hash(other_spelling(value, with_nulls)) == content_hash(value)


def meaning(value):
    """What a value says, in a form that Python compares: numbers as exact fractions, no null keys, no order."""
    if isinstance(value, dict):
        return frozenset((key, meaning(item)) for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return tuple(meaning(item) for item in value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (type(value).__name__, value) if not is_number else ("number", Fraction(value))


@given(trees, trees)
def test_the_content_of_a_value_changes_the_id(left, right):
    assert (canonical_json(left) == canonical_json(right)) == (meaning(left) == meaning(right))


def test_nan_has_no_id():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="Out of range"):
            canonical_json({"lr": value})


def changed(config, *path, to):
    result = copy.deepcopy(config)
    node = result
    for key in path[:-1]:
        node = node[key]
    assert node.get(path[-1]) != to
    node[path[-1]] = to
    return result


def the_id(config, steps=100, data_hash="abc"):
    return cell_id(config, steps=steps, data_hash=data_hash)


DECIDING = [
    ("model", "n_layer"), ("model", "norm_eps"), ("model", "rotary_percentage"), ("objective", "eps"),
    ("model", "n_query_groups"), ("model", "qk_norm"), ("model", "parametrisation"), ("model", "base_n_embd"),
    ("model", "base_n_layer"),
    ("objective", "weight"),
    ("optimizer", "lr"), ("optimizer", "weight_decay"), ("optimizer", "betas"), ("optimizer", "gradient_clip_val"),
    ("optimizer", "decay"),
    ("scheduler", "warmup_fraction"), ("scheduler", "warmup_tokens_per_param"), ("scheduler", "min_ratio"),
    ("data", "batch_size"), ("data", "block_size"), ("data", "unique_tokens"),
    ("data", "stride"), ("validation", "seed"), ("validation", "draws"), ("validation", "num_sequences"),
    ("validation", "estimator"),
    ("training", "budget"), ("training", "convention"), ("trainer", "precision"), ("seed",), ("ckpt_path",),
]  # fmt: skip


@pytest.mark.parametrize("path", DECIDING, ids=".".join)
@given(value=st.floats(0.001, 1e6) | st.text(min_size=1, max_size=3))
def test_a_value_that_decides_the_result_changes_the_id(path, value):
    assume(value != CONFIG.get(path[0]) and (len(path) == 1 or value != CONFIG[path[0]][path[1]]))
    if path == ("training", "budget") and isinstance(value, str):
        value = 7.5
    assert the_id(changed(CONFIG, *path, to=value)) != the_id(CONFIG)


def test_every_key_of_the_deciding_groups_is_known_to_decide_or_not():
    known = {*DECIDING, *OTHER, ("model", "name"), ("objective", "name"), ("optimizer", "name"), ("scheduler", "name"),
             ("training", "steps")}  # fmt: skip
    unchecked = {"model": {"n_head", "n_embd", "intermediate_size", "vocab_size", "block_size"}, "optimizer": {"eps"},
                 "scheduler": {"warmup_min_steps"}}  # fmt: skip
    for node, values in CONFIG.items():
        if isinstance(values, dict):
            for key in set(values) - unchecked.get(node, set()):
                assert (node, key) in known, f"{node}.{key} is neither in the id nor known not to matter"
    assert set(load_base()) == {"recipe", "training", "validation", "seed"}


def test_the_id_knows_the_warm_up_that_counts():
    without = {key: value for key, value in CONFIG["scheduler"].items() if key != "warmup_tokens_per_param"}
    assert the_id({**CONFIG, "scheduler": without}) == the_id(CONFIG)  # null, as in configs of earlier versions
    own = changed(CONFIG, "scheduler", "warmup_tokens_per_param", to=3)
    assert the_id(changed(own, "scheduler", "warmup_fraction", to=0.5)) == the_id(own) != the_id(CONFIG)
    assert the_id(changed(own, "scheduler", "warmup_min_steps", to=7)) == the_id(own)


def test_steps_and_data_change_the_id():
    assert len({the_id(CONFIG), the_id(CONFIG, steps=101), the_id(CONFIG, data_hash="abd"),
                the_id(CONFIG, data_hash=None)}) == 4  # fmt: skip


OTHER = [
    ("data", "micro_batch_size"), ("data", "num_workers"), ("data", "data_dir"), ("data", "prepare"), ("data", "name"),
    ("validation", "times"), ("recipe",),
]  # fmt: skip


@pytest.mark.parametrize("path", OTHER, ids=".".join)
def test_a_value_that_does_not_decide_the_result_keeps_the_id(path):
    assert the_id(changed(CONFIG, *path, to=17)) == the_id(CONFIG)
    elsewhere = {
        **CONFIG,
        "trainer": {**CONFIG["trainer"], "devices": 8},
        "paths": {"run_dir": "/x"},
        "logger": {},
        "sweep": "x",
    }
    assert the_id(elsewhere) == the_id(CONFIG)


def test_the_head_of_an_id_says_objective_model_and_budget():
    assert the_id(CONFIG).startswith("mdm-8k-1e10-") and len(the_id(CONFIG)) == len("mdm-8k-1e10-") + 8
    steps_given = changed(changed(CONFIG, "training", "budget", to=None), "objective", "name", to="autoregressive")
    assert the_id(steps_given).startswith("ar-8k-100steps-")
    named = [text.flops(value) for value in (1e19, 6e18, 1e19 / 3, 1.5e11, 1e20)]
    assert named == ["1e19", "6e18", "3.33e18", "1.5e11", "1e20"]


def test_a_known_id_stays_the_same():
    """Ids are on disk and in W&B: whoever changes this changes every run's name, and raises identity.VERSION."""
    fixed = {"model": {"d": 1}, "objective": {"name": "masked_diffusion"}, "optimizer": {"lr": 1e-3}, "scheduler": {},
             "validation": {"times": 2}, "data": {"block_size": 128, "stride": 128, "batch_size": 8},
             "training": {"budget": 1e10, "convention": "6n"}, "seed": 0}  # fmt: skip
    text = (
        '{"data":{"batch_size":8,"block_size":128,"hash":"abc","stride":128},"model":{"d":1},'
        '"objective":{"name":"masked_diffusion"},"optimizer":{"lr":0.001},"scheduler":{},"seed":0,'
        '"training":{"budget":10000000000,"convention":"6n","steps":100},"validation":{},"version":1}'
    )
    assert the_id(fixed).endswith(content_hash(json.loads(text))[:8])
    assert canonical_json(json.loads(text)) == text
