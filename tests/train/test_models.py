"""The trunk: positions, masks, selection and initialisation. Its logits are checked in test_objectives."""

import dataclasses
import math

import pytest
import torch
from support.reference_model import TINY, reference_logits, rotated

from dlm.core.errors import UserError
from dlm.core.shape import load_shape
from dlm.train.models.attention import RMSNorm, kernels, rotary_tables, rotate
from dlm.train.models.encoder import TransEncoder


def made(shape=TINY, causal=False, seed=0):
    model = TransEncoder(shape, causal=causal)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


TOKENS = torch.randint(0, TINY.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1))
    cos, sin = rotary_tables(2048, 64)
    turned_q, turned_k = rotate(q.expand(2048, -1), cos, sin), rotate(k.expand(2048, -1), cos, sin)
    scores = turned_q @ turned_k.T
    for distance in (0, 1, 7, 100, 2000):
        same = scores.diagonal(distance)
        assert (same - same[0]).abs().max() < 2e-3 * q.norm() * k.norm()
    assert scores[0].std() > 0.05 * q.norm() * k.norm()  # and they do depend on it
    assert turned_q.norm(dim=-1) == pytest.approx(q.norm().expand(2048), rel=1e-5)
    exact = rotated(q.double().expand(2048, -1))
    assert (turned_q.double() - exact).abs().max() < 1e-3


@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_a_norm_returns_the_type_of_its_input_without_a_warning(of_input, of_weight, is_autocast, recwarn):
    x, weight = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)).to(of_input).unbind()
    norm = RMSNorm(16, eps=1e-5)
    norm.weight = torch.nn.Parameter(weight[0].to(of_weight))
    torch.set_warn_always(True)  # PyTorch warns only once in a process
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            y = norm(x)
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list
    assert y.dtype == of_input
    exact = torch.nn.functional.rms_norm(x.double(), (16,), norm.weight.double(), 1e-5)
    assert (y.double() - exact).abs().max() < (0.02 if y.dtype == torch.bfloat16 else 1e-5)


def test_autocast_does_not_reach_a_norm(monkeypatch):
    """On a GPU, autocast would return float32, and on a CPU it would not; so both see none."""
    seen, plain = [], torch.nn.functional.rms_norm

    def look(*given):
        seen.append(torch.is_autocast_enabled("cpu"))
        return plain(*given)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", look)
    with torch.autocast("cpu", torch.bfloat16):
        RMSNorm(16)(torch.zeros(2, 16))
    assert seen == [False]


def test_the_rotary_tables_are_float32_with_distinct_positions():
    cos, sin = rotary_tables(2048, 64)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (2048, 64)
    assert len(torch.unique(torch.cat([cos, sin], dim=1), dim=0)) == 2048
    assert cos[:, 0].tolist() == pytest.approx([math.cos(t) for t in range(2048)], abs=1e-6)  # the fastest channel
    model = made(load_shape("8k"))
    assert model.cos.dtype == torch.float32 and "cos" not in model.state_dict()
    low = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    turned = rotate(low, cos[1000:1005], sin[1000:1005])
    exact = rotate(low.float(), cos[1000:1005], sin[1000:1005])
    assert turned.dtype == torch.bfloat16
    assert (turned.float() - exact).abs().max() <= exact.abs().max() * 2**-8  # rounded once, at the end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_cast_of_the_model_changes_the_rotary_tables(dtype):
    model = made(load_shape("8k"))
    cos, sin = rotary_tables(model.shape.block_size, model.cos.shape[1])
    cast = model.to(dtype)
    assert cast is model and model.head.weight.dtype == dtype
    assert torch.equal(model.cos, cos) and torch.equal(model.sin, sin) and model.cos.dtype == torch.float32
    assert "cos" in dict(model.named_buffers()) and "cos" not in model.state_dict()
    model.to("meta").to_empty(device="cpu")
    assert torch.equal(model.cos, cos) and model.sin.device == torch.device("cpu")


def test_the_gradient_of_a_rotation_is_rotated_back():
    x = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    weight = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    cos, sin = rotary_tables(9, 8)
    (gradient,) = torch.autograd.grad((rotate(x, cos, sin) * weight).sum(), x)
    back = rotate(weight, cos, -sin)  # the transpose of a rotation turns the other way
    assert (gradient - back).abs().max() < 1e-6 < (gradient - weight).abs().max()


def test_part_of_a_head_can_stay_unrotated():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    cos, sin = rotary_tables(6, 4)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[:, 4:], x[:, 4:])
    assert turned[:, :4].double() == pytest.approx(rotated(x[:, :4].double()), abs=1e-5)
    half = made(dataclasses.replace(TINY, rotary_percentage=0.5))
    assert half.cos.shape == (16, 4) and half(TOKENS).shape == (3, 12, 11)


FOUR_HEADS = dataclasses.replace(TINY, n_head=4)
OPTIONS = {
    "plain": TINY,
    "half_rotated": dataclasses.replace(FOUR_HEADS, rotary_percentage=0.5),
    "grouped": dataclasses.replace(FOUR_HEADS, n_query_groups=2),
    "one_group": dataclasses.replace(FOUR_HEADS, n_query_groups=1),
    "qk_norm": dataclasses.replace(TINY, qk_norm=True),
    "completep": dataclasses.replace(TINY, parametrisation="completep", base_n_embd=4, base_n_layer=1),
    "all": dataclasses.replace(FOUR_HEADS, n_query_groups=2, qk_norm=True, rotary_percentage=0.5,
                               parametrisation="completep", base_n_embd=32, base_n_layer=4),
}  # fmt: skip


def scattered(shape, causal=False):
    """With norms that are not all one, and larger matrices, so that each of them shows in the logits."""
    model = made(shape, causal=causal)
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(place)
            parameter.mul_(1.5).add_(0.3 * torch.rand(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_logits_are_those_of_the_reference(option, causal):
    shape = OPTIONS[option]
    model = scattered(shape, causal=causal)
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for tokens, logits in zip(TOKENS, model(TOKENS), strict=True):
        truth = reference_logits(weights, shape, tokens, causal)
        assert (logits - truth).abs().max() < 1e-5 * max(truth.abs().max(), 1)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_is_counted(option):
    shape = OPTIONS[option]
    for causal in (False, True):
        model = TransEncoder(shape, causal=causal)
        assert sum(p.numel() for p in model.parameters()) == shape.num_params_total(causal=causal)
        outer = model.embedding.weight.numel() + model.head.weight.numel()
        assert shape.num_params == shape.num_params_total(causal=causal) - outer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_every_attention_kernel_gives_the_same_result(option, causal):
    results = []
    for name in ("math", "flash", "auto"):
        model = scattered(OPTIONS[option], causal=causal)
        with kernels(name, torch.device("cpu"))():
            logits = model(TOKENS)
            logits.square().mean().backward()
        results.append((logits.detach(), model.blocks[0].attention.qkv.weight.grad))
    for logits, gradient in results[1:]:
        assert (logits - results[0][0]).abs().max() < 1e-5 * logits.abs().max()
        assert (gradient - results[0][1]).abs().max() < 1e-4 * gradient.abs().max()


def test_attention_kernels_that_are_missing_are_refused():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for name in ("efficient", "cudnn", "flash_attn", "fa3", "fa4"):
        with pytest.raises(UserError, match=rf"trainer\.attention {name} needs a CUDA device, this run is on cpu"):
            kernels(name, cpu)
    for precision in ("32-true", "64-true"):
        for name in ("flash", "cudnn", "flash_attn", "fa3", "fa4"):
            words = rf"trainer\.attention {name} computes in 16 bits, trainer\.precision is {precision}: set auto"
            with pytest.raises(UserError, match=words):
                kernels(name, gpu, precision=precision)
        for name in ("math", "efficient"):
            kernels(name, gpu, precision=precision)
        kernels("flash", cpu, precision=precision)  # PyTorch's, which computes in 32 bits there
    with pytest.raises(UserError, match=r"needs the package flash-attn: install dlm\[flash\] or set auto"):
        kernels("flash_attn", gpu)
    with pytest.raises(UserError, match="needs the package flash-attn-4"):
        kernels("fa4", gpu)


def test_activation_checkpointing_changes_no_gradient():
    results = []
    for checkpointing in (False, True):
        model = TransEncoder(TINY, causal=False, checkpointing=checkpointing)
        model.init_weights(torch.Generator().manual_seed(0))
        saved: list[int] = []

        def keep(x, saved=saved):
            saved.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(TOKENS).square().mean()
        loss.backward()
        results.append(([parameter.grad for parameter in model.parameters()], sum(saved)))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[1][1] < results[0][1] / 2


@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_token_changes_earlier_logits_only_if_the_model_is_bidirectional(place):
    other = TOKENS.clone()
    other[:, place] = (other[:, place] + 1) % TINY.vocab_size
    for causal in (True, False):
        model = made(causal=causal)
        moved = (model(other) - model(TOKENS)).abs().amax((0, 2)) > 1e-6
        assert moved[place:].all() and moved[:place].any() == (not causal and place > 0)


def test_selected_logits_equal_the_dense_ones_at_their_positions():
    model = made()
    index = torch.tensor([5, 0, 35, 17, 17])  # in any order, twice if asked
    assert (model(TOKENS, index) - model(TOKENS).flatten(0, 1)[index]).abs().max() < 1e-6
    assert model(TOKENS, index[:0]).shape == (0, 11)


@pytest.mark.parametrize("name", ["33k", "6M"])
def test_the_initialisation_is_that_of_smdm(name):
    shape = load_shape(name)
    model = made(shape)
    for key, parameter in model.named_parameters():
        if key.endswith(("norm.weight", "norm_1.weight", "norm_2.weight")):
            assert (parameter == 1).all()
            continue
        into_stream = key.endswith(("attention.proj.weight", "mlp.down.weight"))
        std = 1 / (shape.n_embd**0.5 * shape.n_layer) if into_stream else (2 / (5 * shape.n_embd)) ** 0.5
        error = 4 * std / math.sqrt(parameter.numel())
        assert parameter.mean().item() == pytest.approx(0, abs=error), key
        assert parameter.std().item() == pytest.approx(std, abs=error), key
    again, other = made(shape), made(shape, seed=1)
    assert torch.equal(again.head.weight, model.head.weight)
    assert not torch.equal(other.head.weight, model.head.weight)


def test_the_mask_token_has_a_row_and_no_logit():
    assert made().embedding.weight.shape[0] == TINY.vocab_size + 1
    assert made(causal=True).embedding.weight.shape[0] == TINY.vocab_size
    assert made()(torch.full((1, 3), TINY.vocab_size)).shape == (1, 3, TINY.vocab_size)


@pytest.mark.parametrize("causal", [False, True])
def test_under_autocast_the_residual_stream_is_in_bfloat16_and_the_losses_are_in_float32(causal):
    shape, target = dataclasses.replace(TINY, qk_norm=True), TOKENS.flatten() % TINY.vocab_size
    streams, results = [], []
    for is_autocast in (False, True):
        model = scattered(shape, causal=causal)
        for block in model.blocks:
            block.register_forward_hook(lambda _, given, result: streams.append((given[0].dtype, result.dtype)))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            losses = model(TOKENS, None, target)
        losses.mean().backward()
        assert losses.dtype == torch.float32
        gradients = [parameter.grad for parameter in model.parameters()]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        results.append([losses, torch.cat([gradient.flatten() for gradient in gradients])])
    layers = len(streams) // 2
    assert streams == [(torch.float32,) * 2] * layers + [(torch.bfloat16,) * 2] * layers
    for exact, rough in zip(*results, strict=True):
        assert 0 < (rough - exact).norm() < 0.05 * exact.norm()
