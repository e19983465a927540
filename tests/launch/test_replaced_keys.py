"""A key that other projects have and dlm has not is refused with the key to write instead, with or without a plus."""

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from dlm import launch
from dlm.core.checks import check_keys
from dlm.core.replaced_keys import MODELS

HABITS = {
    "trainer.resume_from_checkpoint=last.ckpt": "set ckpt_path=PATH",
    "trainer.max_steps=5": "set training.budget or training.steps",
    "trainer.gradient_clip_val=1": "set optimizer.gradient_clip_val",
    "training.flops_budget=1e18": "set training.budget",
    "project_name=mine": "set logger.project",
    "data.global_batch_size=256": "set data.batch_size",
    "data.train_chunks=100": "set data.data_dir",
    "optimizer_config.lr=1e-3": "set optimizer.KEY",
    "strategy_config.auto_wrap_policy=x": "set trainer.",
    "callbacks.model_checkpoint.save_top_k=3": "set callbacks.checkpoint.KEY",
}
DEBUG = ("experiment=debug", "model=4k")


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("word", HABITS)
def test_a_key_of_another_project_names_the_key_to_write_instead(word, plus, launch):
    complaint = launch(*DEBUG, plus + word).complaint
    assert "is no key of dlm: " in complaint and HABITS[word] in complaint, complaint


@pytest.mark.parametrize(
    "key",
    [
        "trainer.detect_anomaly",
        "trainer.max_time",
        "callbacks.lr_monitor.log_momentum",
        "logger.notes",
    ],
)
def test_a_key_that_has_to_be_added_says_so(key, launch):
    said = f"{key} is not in the config yet: add it with a plus, +{key}=VALUE"
    assert said in launch(*DEBUG, f"{key}=true").complaint


def test_a_choice_of_another_project_names_the_choice_to_make(launch):
    for group in ("model", "data", "optimizer", "scheduler", "logger"):
        assert f"{group}=default is no choice of dlm: choose " in launch(*DEBUG, f"{group}=default").complaint


def test_a_model_has_its_name_of_another_project_too(compose):
    for theirs, ours in MODELS.items():
        config, same = compose(f"model={theirs}"), compose(f"model={ours}")
        assert config.model == same.model and config.cell_id == same.cell_id


def test_a_callback_of_the_user_may_have_any_name(compose):
    for name, kind in (("model_checkpoint", "ModelCheckpoint"), ("learning_rate_monitor", "LearningRateMonitor")):
        config = compose(*DEBUG, f"+callbacks.{name}._target_=lightning.pytorch.callbacks.{kind}")
        check_keys(OmegaConf.to_container(config, resolve=False))


def test_mixed_precision_of_16_bits_without_bfloat_is_refused(launch):
    assert (
        "unknown trainer.precision '16-mixed': did you mean bf16-mixed?"
        in launch(*DEBUG, "trainer.precision=16-mixed").complaint
    )


def examples_of_the_origin() -> list[str]:
    """The overrides of every command, and the keys of every YAML file, in the document that first described dlm."""
    document = Path(os.environ.get("DLM_REFERENCE_DATA", "nowhere")).parent / "origin.md"
    if not document.is_file():
        return []
    text = document.read_text()
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("python src/cli/train.py"):
                words = [word.partition("=") for word in shlex.split(line, comments=True)[2:] if "=" in word]
                found += [f"{key}={value.partition(',')[0]}" for key, _, value in words]
    for name, block in re.findall(r"`configs/(\S+?)\.yaml`）\n+```yaml\n(.*?)```", text, re.DOTALL):
        group = name.partition("/")[0]
        is_whole = group in ("data", "trainer")  # the other files stand at the top of the config
        found += [f"{group}.{word}" if is_whole else word for word in _leaves(yaml.safe_load(block))]
    return sorted(set(found))


def _leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif key not in ("_target_", "defaults"):
            yield f"{prefix}{key}=0"


EXAMPLES = examples_of_the_origin()


@pytest.mark.skipif(not EXAMPLES, reason="DLM_REFERENCE_DATA names no folder beside the origin document")
def test_every_example_of_the_origin_composes_or_names_what_replaces_it(compose):
    assert len(EXAMPLES) > 50
    refused = 0
    for word in EXAMPLES:
        try:
            check_keys(OmegaConf.to_container(compose(*DEBUG, word), resolve=False))
        except Exception as error:
            said = str(launch.explain(error))
            refused += 1
            assert "is no key of dlm: " in said or "add it with a plus" in said, (word, said)
    assert 10 < refused < len(EXAMPLES)
