"""The table of allowed names, which is read without torch, holds exactly the names that the training code takes."""

import lightning as L
import pytest
import torch

from dlm.core.checks import NAMES
from dlm.core.errors import UserError
from dlm.train.models import attention
from dlm.train.trainer import _strategy, resolved_precision


def names_of(key):
    return [name for name in NAMES[key] if name != "auto"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_back_ends_of_attention_are_those_in_the_table(device):
    assert {"auto", *attention.SDPA, "flash_attn", *attention.REGISTERED} == set(NAMES["trainer.attention"])
    for name in NAMES["trainer.attention"]:
        try:
            attention.kernels(name, torch.device(device))
        except UserError as error:  # it needs a device or a package that is not here
            assert f"trainer.attention {name} needs" in str(error)


@pytest.mark.parametrize(
    ("key", "argument"),
    [
        ("trainer.precision", "precision"),
        ("trainer.gradient_clip_algorithm", "gradient_clip_algorithm"),
        ("profiler", "profiler"),
    ],
)
def test_lightning_takes_every_name_in_the_table(key, argument, tmp_path):
    for name in names_of(key):
        value = resolved_precision(name, "cpu") if key == "trainer.precision" else name
        L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, **{argument: value})


def test_every_strategy_in_the_table_is_made():
    for name in names_of("trainer.strategy"):
        assert not isinstance(_strategy({"strategy": name}, devices=2, num_nodes=1), str), name


def test_every_accelerator_in_the_table_is_known_to_lightning():
    from lightning.pytorch.accelerators import AcceleratorRegistry

    assert set(names_of("trainer.accelerator")) - {"gpu"} <= set(AcceleratorRegistry.available_accelerators())
