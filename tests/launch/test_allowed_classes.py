"""A run makes only the callbacks and loggers on dlm's list, and those that whoever starts it allows."""

import pickle
import sys

import pytest
from support.runs import TINY, only_run

from dlm.core import classes
from dlm.core.paths import configs_dir
from dlm.plan.definition import parse_sweep
from dlm.plan.grid import make_plan
from dlm.plan.store import write_plan

RUN = (*TINY, "training.steps=20")
ALLOWED = "allowed are dlm's own callbacks and logger"
MINE = """
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities import rank_zero_only
import os
{import_code}

class Mine(Callback):
    def __init__(self, marker):
        self.marker = marker

    def on_fit_start(self, trainer, module):
        open(self.marker, "a").write("run\\n")

class Part:
    def __init__(self, command=None):
        pass
"""


class Touch:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(autouse=True)
def nothing_is_allowed(monkeypatch):
    monkeypatch.setenv(classes.VARIABLE, "")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def mylab(tmp_path, marker, monkeypatch):
    """The package of a lab on the path, whose import writes to the marker."""
    (tmp_path / "lab").mkdir()
    code = MINE.replace("{import_code}", f"open({str(marker)!r}, 'a').write('imported\\n')")
    (tmp_path / "lab/mylab.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "lab")
    monkeypatch.delitem(sys.modules, "mylab", raising=False)
    yield
    sys.modules.pop("mylab", None)


@pytest.mark.parametrize(
    ("where", "attack"),
    [
        ("++callbacks.progress_bar=NODE", "command"),
        ("++callbacks.progress_bar=NODE", "pickle"),
        ("+callbacks.x=NODE", "hub"),
        ("+callbacks.x={_target_: lightning.pytorch.callbacks.LambdaCallback, on_fit_start: NODE}", "command"),
        ("+callbacks.x={_target_: lightning.pytorch.callbacks.LambdaCallback, on_fit_start: [NODE]}", "pickle"),
        ("++logger=NODE", "command"),
    ],
)
def test_another_class_is_refused_and_does_nothing(where, attack, launch, tmp_path, marker):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Touch(marker)))
    (tmp_path / "hubconf.py").write_text(f"def touch():\n    open({str(marker)!r}, 'w')\n")
    node = {
        "command": f"{{_target_: dlm.submit.slurm_commands.run, command: [touch, {marker}]}}",
        "pickle": f"{{_target_: pandas.read_pickle, filepath_or_buffer: {tmp_path}/x.pkl}}",
        "hub": f"{{_target_: torch.hub.load, repo_or_dir: {tmp_path}, model: touch, source: local}}",
    }[attack]
    said = launch(*RUN, where.replace("NODE", node)).complaint
    assert "_target_ is '" in said and ALLOWED in said and "--allow-target" in said
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["lightning.pytorch.callbacks.lr_monitor.defaultdict", "lightning.pytorch.callbacks.model_checkpoint.os.system",
     "lightning.pytorch.callbacks.timer.Timer.on_fit_start", "lightning.pytorch.loggers.csv_logs.os.mkdir"],
)  # fmt: skip
def test_a_name_that_leads_out_of_an_allowed_module_is_refused(name, launch, marker):
    """Hydra itself refuses os.system under each of its names; it does not know the others."""
    said = launch(*RUN, f"+callbacks.x={{_target_: {name}, _args_: ['{marker}']}}").complaint
    assert f"callbacks.x._target_ is '{name}'" in said and not marker.exists()


def test_the_class_of_a_lab_needs_the_flag(launch, workdir, mylab, marker, monkeypatch):
    words = (*RUN, f"+callbacks.mine={{_target_: mylab.Mine, marker: {marker}}}")
    said = launch(*words).complaint
    assert "callbacks.mine._target_ is 'mylab.Mine'" in said and "--allow-target" in said
    assert not marker.exists()  # it is not even imported
    assert not list(workdir.rglob("status.json"))  # the run does not even begin
    assert "is 'mylab.Mine'" in launch("--allow-target", "mylab.Part", *words).complaint and not marker.exists()
    monkeypatch.setenv(classes.VARIABLE, "")
    assert launch("--allow-target", "mylab", *words).code == 0
    assert marker.read_text().splitlines() == ["imported", "run"]
    assert (only_run(workdir) / "result.json").is_file()


def test_a_flag_allows_what_is_in_the_package_and_not_what_the_package_imports(launch, mylab, marker):
    for name in ("mylab.os.mkdir", "mylab.rank_zero_only"):
        said = launch(
            "--allow-target=mylab", *RUN, f"+callbacks.x={{_target_: {name}, _args_: [{marker}.d]}}"
        ).complaint
        assert f"callbacks.x._target_ is '{name}', which is " in said
    assert not marker.with_suffix(".d").exists()


def test_an_interpolation_that_is_left_after_resolving_is_refused(launch, marker):
    escaped = r"+callbacks.x={_target_: lightning.pytorch.callbacks.Timer, duration: '\${oc.env:HOME}'}"
    assert "callbacks.x.duration is '${oc.env:HOME}'" in launch(*RUN, escaped).complaint


def test_a_class_in_a_config_file_is_refused_when_the_file_is_read(launch, tmp_path):
    (tmp_path / "mine/callbacks").mkdir(parents=True)
    path = tmp_path / "mine/callbacks/own.yaml"
    path.write_text("x:\n  _target_: mylab.Mine\n")
    said = launch("--config-dir", str(tmp_path / "mine"), *RUN, "callbacks=own").complaint
    assert f"{path}: x._target_ is 'mylab.Mine'" in said


@pytest.fixture
def planned_cell(tmp_path, stdlib_data):
    """The folder of a sweep, the file of its only cell, and the words that launch the cell."""
    folder = tmp_path / "tiny"
    content = {"name": "tiny", "budgets": [1e9], "convention": "full_masked_head", "models": ["4k"]}
    plan = make_plan(parse_sweep({**content, "set": {"data.block_size": 32}, "hardware": {"device": "cpu"}}, "x"))
    name = write_plan(folder, plan).cells[0].cell_id
    return folder, folder / "cell" / f"{name}.yaml", (f"+cell={name}", f"hydra.searchpath=[file://{folder}]")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("callbacks: {x: {_target_: dlm.submit.slurm_commands.run, command: [touch, MARKER]}}", "x._target_ is 'dlm."),
        ("callbacks: {x: {_target_: lightning.pytorch.callbacks.Timer}}", "x._target_ has _target_, which runs code"),
        ("logger: {project: '${oc.env:HOME}'}", "logger.project has '${oc.env:HOME}'"),
        ("hydra: {job: {env_set: {DLM_ALLOW_TARGET: os}}}", "hydra can name programs"),
        ("logger: {settings: {base_url: x}}", "logger.settings can name programs"),
        ("ckpt_path: /x", "no cell sets ckpt_path"),
        ("paths: {run_dir: /x}", "no cell sets paths"),
    ],
)
def test_the_file_of_a_planned_cell_is_data(more, said, launch, planned_cell, marker):
    _, path, words = planned_cell
    path.write_text(f"{path.read_text()}{more.replace('MARKER', str(marker))}\n")
    complaint = launch(*words).complaint
    assert f"{path}: " in complaint and said in complaint and not marker.exists()


@pytest.mark.parametrize("defaults", ["5", "text", "{model: 4k}"])
def test_a_file_whose_defaults_are_no_list_is_refused_in_one_line(defaults, launch, planned_cell):
    _, path, words = planned_cell
    path.write_text(f"# @package _global_\ndefaults: {defaults}\n")
    assert f"{path}: defaults is " in launch(*words).complaint


def test_the_folder_of_a_sweep_offers_no_other_configs(launch, planned_cell):
    """A plan that chooses `callbacks: evil` must not find evil.yaml beside itself."""
    folder, path, words = planned_cell
    (folder / "callbacks").mkdir()
    (folder / "callbacks/evil.yaml").write_text((configs_dir() / "callbacks/default.yaml").read_text())
    said = launch(*words, "callbacks=evil").complaint
    assert "callbacks/evil.yaml lies in the folder of a sweep, which holds plans and no configs" in said
    path.write_text(path.read_text().replace("defaults:\n", "defaults:\n- override /hydra/job_logging: default\n"))
    assert "no cell chooses hydra/job_logging: 'default'" in launch(*words).complaint
