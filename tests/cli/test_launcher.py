"""The launcher that a command names: its file in configs/hydra/launcher, and the settings of the command line."""

import shutil

import pytest

from dlm.cli.launcher import chosen, is_local, pool_of, slurm_of
from dlm.cli.targets import existing
from dlm.core.errors import UserError
from dlm.core.paths import configs_dir
from dlm.submit.job import SlurmSettings
from dlm.submit.local import LocalPool

PLUGIN = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"


@pytest.fixture
def launchers(tmp_path, monkeypatch):
    """The folder of the launchers' files, in a copy of the configs."""
    shutil.copytree(configs_dir(), tmp_path / "configs")
    monkeypatch.setenv("DLM_CONFIGS", str(tmp_path / "configs"))
    return tmp_path / "configs/hydra/launcher"


def test_the_shipped_files_change_nothing(tmp_path):
    assert pool_of("submitit_local", tmp_path) == LocalPool()
    assert slurm_of([], allow_dirty=False, sweep=tmp_path).settings == SlurmSettings()


def test_a_file_for_the_plugin_is_read_with_its_interpolations_and_dlms_defaults(launchers, tmp_path, monkeypatch):
    (launchers / "lab.yaml").write_text(
        f"_target_: {PLUGIN}.SlurmLauncher\npartition: gpu\nname: ${{hydra.job.name}}\nsetup: null\n"
        "submitit_folder: ${hydra.sweep.dir}/.submitit/%j\naccount: ${oc.env:LAB_ACCOUNT}\n"
    )
    assert chosen("lab") == "lab" and not is_local("lab")
    folder = tmp_path / "it's 100%t (a,b)"
    with pytest.raises(UserError, match="LAB_ACCOUNT"):
        slurm_of([], allow_dirty=False, launcher="lab", sweep=folder)
    monkeypatch.setenv("LAB_ACCOUNT", "vision")
    words = ["hydra.launcher.partition=other", "+hydra.launcher.qos=high", "logger=none"]
    found = slurm_of(words, allow_dirty=True, launcher="lab", sweep=folder).settings
    expected = SlurmSettings(
        partition="other", qos="high", account="vision", name="launch", allow_dirty=True,
        submitit_folder=f"{folder}/runs/.submitit/%j",
    )  # fmt: skip
    assert found == expected


def test_a_file_may_stand_for_this_machine(launchers, tmp_path):
    (launchers / "few.yaml").write_text(f"_target_: {PLUGIN}.LocalLauncher\ntimeout_min: 5\ncores: 3\nmem_gb: 2\n")
    pool = pool_of("few", tmp_path)
    assert is_local("few") and (pool.cores, pool.timeout_min) == (3, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partition: gpu\n", "launcher lab has no _target_"),
        (f"_target_: {PLUGIN}.SlurmLauncher\npartitionn: x\n", "unknown key of hydra.launcher 'partitionn'"),
        ("defaults: [submitit_slurm]\npartitionn: x\n", "unknown key of hydra.launcher 'partitionn'"),
        ("defaults: [submitit_slurm]\nnodes: two\n", "hydra.launcher.nodes: Value 'two'"),
        (f"_target_: {PLUGIN}.LocalLauncher\nnodes: 2\n", "hydra.launcher.nodes is 2: this machine is one node"),
        ("defaults: [nosuch]\n", "nosuch"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(launchers, tmp_path, text, said):
    (launchers / "lab.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        if is_local("lab"):
            pool_of("lab", tmp_path)
        slurm_of([], allow_dirty=False, launcher="lab", sweep=tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_no_launcher_has_is_named_with_its_close_matches_only(launchers, tmp_path):
    shutil.copy(launchers / "submitit_slurm.yaml", launchers / "lab.yaml")
    for word in ("hydra.launcher.partitionn=x", "hydra.launcher.zzz=1"):
        with pytest.raises(UserError) as error:
            slurm_of([word], allow_dirty=False, launcher="lab", sweep=tmp_path)
        said = str(error.value)
        assert said.endswith("configs/hydra/launcher/submitit_slurm.yaml lists all") and "sbatch_per_min" not in said
    assert "zzz" in said and "did you mean" not in said
    assert slurm_of([], allow_dirty=False, launcher="lab", sweep=tmp_path).file == "configs/hydra/launcher/lab.yaml"


def test_a_key_twice_in_a_launchers_file_is_refused(launchers, tmp_path):
    (launchers / "lab.yaml").write_text("defaults: [submitit_slurm]\npartition: gpu\nqos: high\npartition: cpu\n")
    with pytest.raises(UserError, match=r"lab\.yaml has the key 'partition' in lines 2 and 4: keep one of them"):
        slurm_of([], allow_dirty=False, launcher="lab", sweep=tmp_path)
    (launchers / "lab.yaml").write_text("defaults: [submitit_slurm]\ntimeout_min: 24:00:00\n")
    with pytest.raises(UserError, match=r"lab\.yaml, line 2: YAML reads 24:00:00 as 86400"):
        slurm_of([], allow_dirty=False, launcher="lab", sweep=tmp_path)


def test_unknown_launchers_and_other_classes_are_refused():
    with pytest.raises(UserError, match="unknown launcher 'submitit_slrum': did you mean submitit_slurm"):
        chosen("submitit_slrum")
    with pytest.raises(UserError, match="can use another class"):
        slurm_of([f"hydra.launcher._target_={PLUGIN}.SlurmLauncher"], allow_dirty=False)


def test_the_folder_of_a_launchers_logs_is_no_run(workdir):
    for name in ("mdm-4k-a", ".submitit"):
        (workdir / "adhoc/runs" / name).mkdir(parents=True)
    assert [cell.cell_id for cell in existing("adhoc").plan.cells] == ["mdm-4k-a"]
