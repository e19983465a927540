"""Which classes a config may name, and who may allow more; and the version of Hydra that helps with it."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support import ROOT

from dlm.core import classes
from dlm.core.configs import choices, load_base, load_choice
from dlm.core.data_only import GROUPS, SETTABLE
from dlm.core.errors import UserError
from dlm.plan.grid import DECIDING, OTHER_GROUPS


@pytest.fixture(autouse=True)
def nothing_is_allowed(monkeypatch):
    monkeypatch.setenv(classes.VARIABLE, "")  # restored after the test, also if the test allows something
    return monkeypatch


@pytest.mark.parametrize(
    "name",
    ["os.system", "dlm.submit.slurm_commands.run", "pandas.read_pickle", "torch.hub.load", "lightning.pytorch.Trainer",
     "lightning.pytorch.callbacksX.A", "dlm.train.callbacks.monitors", "${oc.env:NAME}", "mylab.Mine", "", 3],
)  # fmt: skip
def test_a_class_that_is_not_listed_is_refused_in_one_line(name):
    with pytest.raises(UserError) as error:
        classes.check_classes({"x": [{"y": {"_target_": name}}]}, where="callbacks")
    said = str(error.value)
    assert said.startswith("callbacks.x.y._target_ is ") and "--allow-target" in said and "\n" not in said
    assert "dlm.train.callbacks" in said and "lightning.pytorch.callbacks" in said


@pytest.mark.parametrize("group", ["callbacks", "logger"])
def test_all_that_dlm_ships_is_listed(group):
    for choice in choices(group):
        classes.check_classes(load_choice(group, choice))


def test_a_flag_allows_a_package_and_leaves_the_other_words_to_hydra():
    words = ["-m", "--allow-target", "mylab", "seed=1", "--allow-target=other.place.Mine", "--allow-target=mylab"]
    assert classes.take_flags(words) == ["-m", "seed=1"]
    assert classes.allowed() == ["mylab", "other.place.Mine"]
    assert classes.environment() == {"DLM_ALLOW_TARGET": "mylab,other.place.Mine"}
    assert classes.is_listed("mylab.a.B") and classes.is_listed("other.place.Mine")
    assert not classes.is_listed("mylaboratory.B") and not classes.is_listed("other.place.Yours")


@pytest.mark.parametrize("words", [["--allow-target"], ["--allow-target="], ["--allow-target", "my lab"]])
def test_a_flag_without_a_name_is_refused(words):
    with pytest.raises(UserError, match="give a package or a class, such as mylab"):
        classes.take_flags(words)
    assert classes.environment() == {}


@pytest.mark.parametrize(
    "word",
    ["callbacks.x._target_=os.system", "+callbacks.x={_target_: os.system}", "++callbacks.x={'_target_':'os.system'}"],
)
def test_an_override_that_names_another_class_is_refused_before_a_job_is_queued(word):
    with pytest.raises(UserError, match=r"^--override \+*callbacks\.x.*: _target_ is 'os\.system'"):
        classes.check_override_classes(["seed=1", word])
    classes.check_override_classes(["logger._target_=null", "callbacks.x._target_=lightning.pytorch.callbacks.Timer"])


def test_a_planned_cell_may_set_what_a_definition_can_set():
    assert set(GROUPS) == {*DECIDING, *OTHER_GROUPS}
    assert set(SETTABLE) == {*GROUPS, *load_base()}


def test_hydra_is_recent_enough_to_refuse_what_runs_commands_by_itself():
    """The list came with 1.3.4, aliases passed it until 1.3.6, and the loaders of PyYAML that run code until 1.3.8."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (hydra,) = (need for need in map(Requirement, needs) if need.name == "hydra-core")
    (floor,) = (Version(limit.version) for limit in hydra.specifier if limit.operator == ">=")
    assert floor >= Version("1.3.8")
