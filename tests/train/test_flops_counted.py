"""What the formula says a run costs, against torch's own counter on the running model."""

import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dlm.core.flops import flops_per_token
from dlm.core.shape import load_shape
from dlm.data.noise import stratified_t, uniforms
from dlm.train.models.attention import kernels
from dlm.train.models.encoder import TransEncoder
from dlm.train.objectives.autoregressive import Autoregressive
from dlm.train.objectives.masked_diffusion import MaskedDiffusion

BATCH, LENGTH = 8, 192
MATRIX, ATTENTION = torch.ops.aten.mm, torch.ops.aten.bmm


def counted(shape, objective):
    """(FLOPs by kind, the batch) of forward and backward pass of one micro-batch, as the first of a run has it."""
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (BATCH, LENGTH))
    noise = stratified_t(0, 0, np.arange(BATCH)), uniforms(0, 0, BATCH, LENGTH)
    batch = objective.corrupt(tokens, *noise)
    counter = FlopCounterMode(display=False)
    with FakeTensorMode():  # the counter needs the shapes of the operations, not their results
        model = TransEncoder(shape, causal=objective.info.causal)
        with kernels("math", torch.device("cpu"))(), counter:  # the others hide their products from the counter
            objective.loss(model, {key: torch.as_tensor(value) for key, value in batch.items()}).mean().backward()
    by_kind = counter.get_flop_counts()["Global"]
    assert set(by_kind) == {MATRIX, ATTENTION}
    return by_kind[MATRIX], by_kind[ATTENTION], batch


SHAPES = {
    "6M": load_shape("6M"),
    "19M": load_shape("19M"),
    "grouped": dataclasses.replace(load_shape("6M"), n_query_groups=2, qk_norm=True),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_the_counted_flops_agree_with_the_formula(name, causal):
    shape = SHAPES[name]
    objective = Autoregressive(bos_id=0) if causal else MaskedDiffusion(vocab_size=shape.vocab_size)
    matrices, attention, batch = counted(shape, objective)
    per_row = 6 * shape.vocab_size * shape.n_embd
    if causal:
        attention /= 2  # this kernel computes the upper triangle too, the others do not
    else:  # places that only fill the batch up are computed and not part of the work
        padding = int((batch["weight"] == 0).sum())
        assert 0 < padding < 0.15 * len(batch["index"])  # a long sequence needs less: .03 at 8 x 2048
        matrices -= padding * per_row
        masked = len(batch["index"]) - padding
        assert masked == pytest.approx(0.5005 * BATCH * LENGTH, rel=0.05)
        matrices += (0.5005 * BATCH * LENGTH - masked) * per_row  # a run has many batches, and their mean is this
    per_token = flops_per_token(shape, convention="full_masked_head", block_size=LENGTH, objective=objective.info)
    formula = BATCH * LENGTH * per_token
    assert matrices + attention == pytest.approx(float(formula), rel=5e-3)
    without_attention = formula - BATCH * LENGTH * 12 * shape.n_layer * shape.n_embd * LENGTH // (1 + causal)
    assert matrices == pytest.approx(float(without_attention), rel=5e-3)
