"""A group without a choice, and a multirun of endless length, are one line each."""

import pytest
from support.runs import TINY

from dlm.core.errors import UserError
from dlm.launch import GROUPS
from dlm.submit.combinations import check_combinations


@pytest.mark.parametrize("word", ["GROUP=null", "+GROUP=null", "~GROUP"])
@pytest.mark.parametrize("group", ["callbacks", "logger", "data"])
def test_a_group_without_a_choice_is_refused(group, word, launch):
    assert group in GROUPS
    said = launch(*[one for one in TINY if not one.startswith(group)], word.replace("GROUP", group)).complaint
    assert said.startswith(f"dlm: unknown {group} null: allowed: ") or "add it with a plus" in said, said


@pytest.mark.parametrize("word", ["~callbacks.record", "callbacks.record=null"])
def test_a_run_without_its_record_is_refused(word, launch):
    assert "callbacks.record is missing" in launch(*TINY, "training.steps=20", word).complaint


def test_a_multirun_of_too_many_runs_is_refused_before_hydra_lists_them(launch):
    said = launch(*TINY, "-m", "seed=range(0,1e9)", "optimizer.lr=1e-3,2e-3").complaint
    assert "-m asks for 2,000,000,000 runs, and at most 10,000 are allowed: shorten seed=range(0,1e9)" in said


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["seed=range(0,10001)"], 10_001),
        (["seed=range(0,101)", "optimizer.lr=" + ",".join("1" * 100)], 10_100),
        (["seed=sort(range(0,5001,0.5))"], 10_002),
        (["seed=range(10001,0,-1)"], 10_001),
        (["seed=range(0,300)", "model=glob(*)"], None),
        (["seed=range(0,inf)"], 10_001),
    ],
)
def test_the_runs_of_a_multirun_are_counted_without_making_them(words, number):
    with pytest.raises(UserError, match="runs, and at most" if number is None else f"asks for {number:,} runs"):
        check_combinations(words)


def test_as_many_runs_as_a_plan_may_have_are_allowed():
    for words in (
        ["-m", "seed=range(0,100)", "optimizer.lr=" + ",".join("1" * 100)],
        ["seed=range(0,10000)", "hydra/launcher=basic", "x=interval(0,1)", "--config-dir", "/x", "a=[1,2,3]"],
    ):
        check_combinations(words)
