"""Hydra's YAML files: configs/, --config-dir and hydra.searchpath are checked like all YAML that dlm reads."""

import shutil

import pytest

from dlm.core.paths import configs_dir

HEAD = "# @package _global_\n"


@pytest.fixture
def own_experiment(tmp_path, launch):
    """Launch with an experiment of this text in a --config-dir, and return the error message."""

    def complaint(text, *overrides):
        (tmp_path / "mine/experiment").mkdir(parents=True)
        path = tmp_path / "mine/experiment/own.yaml"
        path.write_text(text)
        return launch("--config-dir", str(tmp_path / "mine"), "experiment=own", *overrides).complaint, path

    return complaint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + "optimizer:\n  lr: 1e-3\n  lr: 2e-3\n", "own.yaml has the key 'lr' in lines 3 and 4: keep one of them"),
        (HEAD + "optimizer:\n\tlr: 1e-3\n", "own.yaml, line 3, column 1, is not valid YAML"),
        (HEAD + "- seed\n", "own.yaml holds a list: it must hold keys and values"),
        (HEAD + "seed: 010\n", "own.yaml, line 2: YAML reads 010 as 8"),
        (HEAD + "seed: 1\n---\nseed: 2\n", "own.yaml, line 3, column 1, is not valid YAML: found another document"),
        (HEAD + "a: &a {x: 1}\nb: {c: &c {<<: *a, x: 2}}\nd: {<<: *c}\n", "OmegaConf cannot merge"),
        (HEAD + "defaults:\n  - override /model: 8k\n  - override /model: 4k\n", "has 'override /model' 2 times"),
        (HEAD + "optimizer:\n  lr: ${nosuch}\n", "dlm: optimizer.lr: Interpolation key 'nosuch' not found"),
        (HEAD + "optimizer.lr: 1e-3\n", "unknown key 'optimizer.lr': did you mean optimizer?"),
        (HEAD + "seed:\n", "seed is null: it must be a whole number of at least 0"),
        ("seed: 3\n", "the experiment's file does not begin with '# @package _global_'"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(text, said, own_experiment):
    complaint, _ = own_experiment(text)
    assert said in complaint and "object_type" not in complaint, complaint


def test_a_key_twice_in_a_file_of_configs_is_refused(launch, tmp_path, monkeypatch):
    shutil.copytree(configs_dir(), tmp_path / "configs")
    monkeypatch.setenv("DLM_CONFIGS", str(tmp_path / "configs"))
    for name, text in {"scheduler/cosine.yaml": "min_ratio: 0.2\n", "trainer/cpu.yaml": "threads: 2\n"}.items():
        path = tmp_path / "configs" / name
        before = path.read_text()
        path.write_text(before + text)
        key = text.partition(":")[0]
        assert f"{name} has the key '{key}' in lines" in launch("experiment=debug").complaint
        path.write_text(before)


def test_a_key_twice_in_the_file_of_a_planned_cell_is_refused(launch, tmp_path):
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell/x.yaml").write_text(HEAD + "seed: 1\nplanned_cell_id: x\nseed: 2\n")
    said = launch("+cell=x", f"hydra.searchpath=[file://{tmp_path}]").complaint
    assert "x.yaml has the key 'seed' in lines 2 and 4" in said
