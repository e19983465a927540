"""How many bytes are read and written where nothing is compiled: on a GPU, this traffic takes most of the time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlm.train.models.attention import rotary_tables, rotate

BATCH, LENGTH, HEADS, DIM = 2, 128, 4, 64


class Traffic(TorchDispatchMode):
    """Adds up the bytes of the arguments and the results of all operators that compute something."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        storages = {one.untyped_storage()._cdata for one in tensors}
        results = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        if func._schema.is_mutable or any(one.untyped_storage()._cdata not in storages for one in results):
            self.bytes += sum(one.numel() * one.element_size() for one in (*tensors, *results))
        return out


def per_channel(bytes_):
    return bytes_ / (BATCH * LENGTH * HEADS * DIM)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 56), (torch.float32, 60)])  # with the tables
def test_a_rotation_moves_half_of_what_it_would_with_pytorchs_gradients(dtype, most):
    x = torch.randn(BATCH, LENGTH, HEADS, DIM).to(dtype).transpose(1, 2).requires_grad_()
    tables = rotary_tables(LENGTH, DIM)
    towards = torch.ones_like(x)
    with Traffic() as ours:
        rotate(x, *tables).backward(towards)
    cos, sin = tables[0], tables[1].abs()
    with Traffic() as plain:  # the formula of the paper
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        (wide * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x).backward(towards)
    assert per_channel(ours.bytes) <= most
    assert ours.bytes < (0.55 if dtype == torch.bfloat16 else 0.75) * plain.bytes
