"""The published sizes as exact integers, from the formula and from the model itself."""

import dataclasses

import pytest
import torch
from support.smdm_table import SMDM

from dlm.core.configs import choices
from dlm.core.errors import UserError
from dlm.core.shape import ModelShape, ladder, load_shape, shape_from_config
from dlm.train.models.encoder import TransEncoder


@pytest.mark.parametrize("size", SMDM, ids=lambda size: size.name)
def test_every_published_size_has_its_number_of_parameters(size):
    shape = load_shape(size.name)
    for key in ("name", "n_layer", "n_head", "n_embd", "intermediate_size", "head_dim", "num_params"):
        assert getattr(shape, key) == getattr(size, key), key
    assert (shape.vocab_size, shape.block_size, shape.rotary_percentage, shape.norm_eps) == (32000, 2048, 1.0, 1e-5)
    assert shape.num_params_total(causal=False) == size.num_params_total
    for causal in (False, True):
        with torch.device("meta"):
            model = TransEncoder(shape, causal=causal)
        counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
        total = size.num_params_total - (size.n_embd if causal else 0)  # no row for the mask token
        assert sum(counts.values()) == total == shape.num_params_total(causal=causal)
        assert total - counts["embedding.weight"] - counts["head.weight"] == size.num_params


def test_the_ladder_holds_the_published_sizes_and_tiny_ones():
    shapes = ladder()
    assert {size.name for size in SMDM} <= {shape.name for shape in shapes} == set(choices("model"))
    assert [shape.num_params for shape in shapes] == sorted(shape.num_params for shape in shapes)
    tiny = [shape for shape in shapes if shape.vocab_size == 256]
    assert len(tiny) >= 5 and tiny[0].num_params < 5_000 and tiny[-1].num_params > 200_000
    for shape in tiny:
        with torch.device("meta"):
            counts = {name: p.numel() for name, p in TransEncoder(shape, causal=False).named_parameters()}
        assert sum(counts.values()) - counts["embedding.weight"] - counts["head.weight"] == shape.num_params
        assert abs(int(shape.name.removesuffix("k")) - shape.num_params / 1000) < 1  # the name says the size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 0}, ["model.n_layer is 0"]),
        ({"n_embd": 64.0}, ["model.n_embd is 64.0", "whole number"]),
        ({"n_head": True}, ["model.n_head is True"]),
        ({"n_embd": 66, "n_head": 4}, ["n_embd 66", "n_head 4", "multiple"]),
        ({"n_embd": 12, "n_head": 4}, ["even head size"]),
        ({"rotary_percentage": 1.5}, ["rotary_percentage is 1.5", "0 to 1"]),
    ],
)
def test_numbers_that_make_no_model_are_refused(changes, words):
    good = dataclasses.asdict(load_shape("8k"))
    with pytest.raises(UserError) as error:
        ModelShape(**{**good, **changes})
    assert all(word in str(error.value) for word in words), error.value


def test_keys_that_make_no_model_are_refused():
    good = dataclasses.asdict(load_shape("8k"))
    assert shape_from_config(good) == load_shape("8k")
    with pytest.raises(UserError, match="unknown key of model 'n_layers': did you mean n_layer"):
        shape_from_config({**good, "n_layers": 3})
    with pytest.raises(UserError, match="model lacks n_head"):
        shape_from_config({key: value for key, value in good.items() if key != "n_head"})
    with pytest.raises(UserError, match=r"unknown model '170m'.*did you mean 170M"):
        load_shape("170m")
