"""A misspelt key is refused in every group of the config: in a file, on the command line and in a sweep definition."""

import inspect
import shutil

import hydra
import lightning
import pytest
import wandb
import yaml
from hydra.utils import get_class
from lightning.pytorch.loggers import WandbLogger
from omegaconf.errors import OmegaConfBaseException

from dlm import launch as launching
from dlm.core.checks import ARGUMENTS, KEYS, TOP_LEVEL, check_keys, check_values
from dlm.core.configs import choices, load_base, load_choice, merge, nest
from dlm.core.errors import UserError
from dlm.core.paths import configs_dir
from dlm.core.replaced_keys import INSTEAD
from dlm.plan.definition import parse_sweep
from dlm.plan.grid import make_plan

# For each group: the file that is spoilt, the misspelt key and the key that was meant.
MISSPELT = {
    "model": ("model/8k.yaml", "n_layers", "n_layer"),
    "data": ("data/stdlib.yaml", "block_siz", "block_size"),
    "objective": ("objective/masked_diffusion.yaml", "wieght", "weight"),
    "optimizer": ("optimizer/adamw.yaml", "weight_decy", "weight_decay"),
    "scheduler": ("scheduler/wsd.yaml", "decay_fracton", "decay_fraction"),
    "trainer": ("trainer/cpu.yaml", "thread", "threads"),
    "callbacks.checkpoint": ("callbacks/default.yaml", "tims", "times"),
    "callbacks.record": ("callbacks/default.yaml", "spikes", "spike"),
    "callbacks.lr_monitor": ("callbacks/default.yaml", "loging_interval", "logging_interval"),
    "logger": ("logger/wandb.yaml", "projct", "project"),
    "training": ("config.yaml", "budgt", "budget"),
    "validation": ("config.yaml", "draw", "draws"),
}


def definition(**changes):
    content = {"name": "tiny", "budgets": [1e10], "models": ["8k"], "groups": {"scheduler": "wsd"}, **changes}
    return parse_sweep(content, "tiny.yaml")


def check_complaint(line, group):
    _, key, meant = MISSPELT[group]
    assert f"unknown key of {group} '{key}': did you mean {meant}" in line and "\n" not in line, line


@pytest.fixture
def spoilt(tmp_path, monkeypatch):
    """A copy of configs/ in which one group has a misspelt key."""

    def spoil(group):
        file, key, _ = MISSPELT[group]
        shutil.copytree(configs_dir(), tmp_path / "configs")
        path = tmp_path / "configs" / file
        content = yaml.safe_load(path.read_text())
        nodes = [] if file.startswith(group) else group.split(".")[-1:]
        node = content[nodes[0]] if nodes else content
        node[key] = 1
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        monkeypatch.setenv("DLM_CONFIGS", str(tmp_path / "configs"))

    return spoil


@pytest.mark.parametrize("group", MISSPELT)
def test_planning_refuses_a_misspelt_key_in_a_group_file(group, spoilt, stdlib_data):
    make_plan(definition())
    spoilt(group)
    with pytest.raises(UserError) as error:
        make_plan(definition())
    check_complaint(str(error.value), group)


@pytest.mark.parametrize("how", ["set", "vary"])
@pytest.mark.parametrize("group", MISSPELT)
def test_planning_refuses_a_misspelt_key_of_a_definition(group, how, stdlib_data):
    key = f"{group}.{MISSPELT[group][1]}"
    with pytest.raises(UserError) as error:
        make_plan(definition(**{how: {key: 1 if how == "set" else [1]}}))
    check_complaint(str(error.value), group)


def test_planning_refuses_a_key_below_a_value(stdlib_data):
    with pytest.raises(UserError, match=r"'optimizer.betas.x'.* did you mean optimizer.betas"):
        make_plan(definition(set={"optimizer.betas.x": 3}))


@pytest.fixture
def compose(stdlib_data):
    """The line that a launch ends with when it composes the config of a run."""
    launching.register()

    def complaint(*overrides):
        with (
            hydra.initialize_config_dir(str(configs_dir()), version_base=None),
            pytest.raises(OmegaConfBaseException) as error,
        ):
            _ = hydra.compose("config", ["experiment=debug", "scheduler=wsd", *overrides]).paths.run_dir
        return launching.explain(error.value)

    return complaint


@pytest.mark.parametrize("group", MISSPELT)
def test_a_launch_refuses_a_misspelt_key_in_a_group_file(group, spoilt, compose):
    spoilt(group)
    check_complaint(compose(), group)


@pytest.mark.parametrize("group", MISSPELT)
def test_a_launch_refuses_a_misspelt_key_of_an_override(group, compose):
    check_complaint(compose(f"+{group}.{MISSPELT[group][1]}=1"), group)


@pytest.mark.parametrize("group", ["scheduler", "callbacks.checkpoint"])
def test_a_refused_launch_names_the_key_that_was_meant_and_leaves_no_folder(group, launch, spoilt, workdir):
    _, key, meant = MISSPELT[group]
    assert meant in launch("experiment=debug", "scheduler=wsd", f"{group}.{key}=1").complaint
    spoilt(group)
    check_complaint(launch("experiment=debug", "scheduler=wsd").complaint, group)
    assert list(workdir.iterdir()) == []


def test_a_launch_refuses_a_misspelt_key_at_the_top_level(launch):
    assert "unknown key 'sed': did you mean seed" in launch("experiment=debug", "+sed=1").complaint


def test_a_key_that_the_chosen_shape_does_not_read_is_refused(stdlib_data, launch):
    with pytest.raises(UserError, match=r"unknown key of scheduler 'decay_fraction': .*allowed: name, warmup_fraction"):
        make_plan(definition(groups={"scheduler": "cosine"}, set={"scheduler.decay_fraction": 0.5}))
    assert "unknown key of optimizer 'momentum'" in launch("experiment=debug", "+optimizer.momentum=.9").complaint


def test_a_value_where_a_group_belongs_is_refused(stdlib_data):
    with pytest.raises(UserError, match="optimizer is 3: it must hold the keys name, lr"):
        check_keys({"optimizer": 3})
    with pytest.raises(UserError, match="trainer is a group: choose it under groups:"):
        make_plan(definition(set={"trainer": "cpu"}))


@pytest.mark.parametrize("group", ["objective", "optimizer", "scheduler", "data", "trainer", "callbacks", "logger"])
def test_every_shipped_choice_has_known_keys_only(group):
    for choice in choices(group):
        check_keys({group: load_choice(group, choice)})
    check_keys(load_base())


def test_the_keys_of_the_trainer_are_the_arguments_of_lightning():
    arguments = inspect.signature(lightning.Trainer.__init__).parameters.keys() - {"self"}
    replaced = {key.removeprefix("trainer.") for key in INSTEAD}
    assert arguments <= {*KEYS["trainer"], *replaced}


@pytest.mark.parametrize("target", ARGUMENTS)
def test_the_arguments_of_a_callback_or_logger_are_those_of_its_class(target):
    parameters = inspect.signature(get_class(target).__init__).parameters.keys() - {"self", "args", "kwargs"}
    if target.endswith("WandbLogger"):
        parameters = {*inspect.signature(WandbLogger.__init__).parameters, *inspect.signature(wandb.init).parameters}
        parameters -= {"self", "kwargs"}
    assert set(ARGUMENTS[target]) == parameters


def test_the_top_level_is_that_of_the_config():
    content = yaml.safe_load((configs_dir() / "config.yaml").read_text())
    groups = [next(iter(item)) for item in content.pop("defaults") if isinstance(item, dict)]
    groups = [group for group in groups if group != "experiment" and not group.startswith("override")]
    assert set(TOP_LEVEL) == {*content, *groups}


def test_a_choice_stands_over_those_of_its_defaults_list(tmp_path, monkeypatch):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "first.yaml").write_text("a: 1\nnode: {x: 1, y: 2}\n")
    (tmp_path / "trainer" / "second.yaml").write_text("defaults: [first, _self_]\na: 2\nnode: {y: 3}\n")
    monkeypatch.setenv("DLM_CONFIGS", str(tmp_path))
    assert load_choice("trainer", "second") == {"a": 2, "node": {"x": 1, "y": 3}}
    assert load_choice("trainer", "first") == {"a": 1, "node": {"x": 1, "y": 2}}


def test_dotted_keys_nest_and_merge():
    base = nest({"a.b": 1, "a.c.d": 2, "e": 3})
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge(base, nest({"a.c.d": 4, "a.f": 5})) == {"a": {"b": 1, "c": {"d": 4}, "f": 5}, "e": 3}
    assert base["a"]["c"] == {"d": 2}


@pytest.mark.parametrize("value", ["no", 1])
def test_a_switch_is_true_or_false(value):
    with pytest.raises(UserError, match=r"trainer\.compile is .*allowed are true and false"):
        check_values({"trainer": {"compile": value}})


@pytest.mark.parametrize("name", ["../../x", "/x", "", "..", "a b", "x\n", "\x1b[31m"])
def test_a_name_that_becomes_part_of_a_path_leads_nowhere_else(name):
    with pytest.raises(UserError, match=r"model\.name is .*allowed are letters, digits"):
        check_values({"model": {"name": name}})
