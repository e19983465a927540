"""Shapes of any number of parameters, between the sizes of configs/model."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dlm.core.errors import UserError
from dlm.core.shape import ladder
from dlm.core.sizes import NEAR, shape_near

LADDERS = {vocab: [shape for shape in ladder() if shape.vocab_size == vocab] for vocab in (256, 32000)}
SHAPE = ("n_layer", "n_head", "n_embd", "intermediate_size")


@given(vocab=st.sampled_from(sorted(LADDERS)), share=st.floats(0, 1))
@example(vocab=256, share=0.011447397374174441)  # 1,132 parameters; one more of intermediate_size adds 24
def test_every_size_between_the_smallest_and_the_largest_is_met_within_a_hundredth(vocab, share):
    sizes = LADDERS[vocab]
    low, high = (math.log(sizes[end].num_params) for end in (0, -1))
    target = math.exp(low + share * (high - low))
    shape = shape_near(target, sizes)
    step = 3 * shape.n_layer * shape.n_embd / target  # what one more of intermediate_size adds
    assert abs(shape.num_params / target - 1) <= max(NEAR, step / 2)
    for key in SHAPE[:3]:  # depth, heads and width are between those of two neighbours
        pairs = itertools.pairwise(getattr(size, key) for size in sizes)
        assert any(min(pair) <= getattr(shape, key) <= max(pair) for pair in pairs)
    assert shape.head_dim % 2 == 0 and (vocab == 256 or shape.head_dim % 8 == 0)
    assert 1.25 <= shape.intermediate_size / shape.n_embd <= 8  # half and twice the ratios of the sizes


@pytest.mark.parametrize("vocab", LADDERS)
def test_the_sizes_themselves_are_built_again(vocab):
    for size in LADDERS[vocab]:
        shape = shape_near(size.num_params, LADDERS[vocab])
        assert [getattr(shape, key) for key in SHAPE] == [getattr(size, key) for key in SHAPE], size.name


@pytest.mark.parametrize("vocab", LADDERS)
def test_beyond_what_a_shape_reaches_the_nearest_is_built(vocab):
    sizes = LADDERS[vocab]
    smallest, largest = (shape_near(target, sizes) for target in (1, 1e15))
    assert smallest.num_params < sizes[0].num_params and largest.num_params > sizes[-1].num_params
    assert smallest.n_layer == sizes[0].n_layer and largest.n_layer == sizes[-1].n_layer
    assert shape_near(largest.num_params * 1.2, sizes) == largest
    with pytest.raises(UserError, match="the target is nan parameters"):
        shape_near(math.nan, sizes)


def test_other_fields_come_from_the_sizes_and_heads_divide_into_groups():
    sizes = [dataclasses.replace(size, qk_norm=True) for size in LADDERS[256]]
    assert shape_near(57_000, sizes).qk_norm
    grouped = [dataclasses.replace(size, n_query_groups=2) for size in sizes if size.n_head % 2 == 0]
    shape = shape_near(30_000, grouped)
    assert shape.n_head % 2 == 0 and abs(shape.num_params / 30_000 - 1) <= NEAR
