"""A run uses attention kernels only if they compute the right numbers on its device."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dlm.core.errors import UserError
from dlm.core.shape import load_shape
from dlm.train.models import attention, attention_check
from dlm.train.models.attention import kernels
from dlm.train.models.attention_check import fault_of, working_kernels

TINY = dataclasses.replace(load_shape("8k"), block_size=32)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPES = {
    "plain": TINY,
    "grouped": dataclasses.replace(TINY, n_head=2, n_query_groups=1, qk_norm=True),
}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class Halved(torch.autograd.Function):
    """Returns its input; the gradient is halved."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class NaNs(Halved):
    """Returns its input; the gradient is NaN."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


@contextlib.contextmanager
def wrong(change):
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *given, **options: change(plain(*given, **options))
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_right_kernel_has_no_fault(shape, causal, precision):
    how = {"causal": causal, "device": CPU, "precision": precision}
    assert fault_of("flash", kernels("flash", CPU), SHAPES[shape], **how) == ""


def test_a_long_block_is_checked_with_fewer_tokens(monkeypatch):
    seen = []

    def look(q, *given, plain=F.scaled_dot_product_attention, **options):
        seen.append(q.shape[-2])
        return plain(q, *given, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    monkeypatch.setattr(attention_check, "MOST_TOKENS", 16)
    assert fault_of("flash", kernels("flash", CPU), TINY, causal=True, device=CPU, precision="32-true") == ""
    assert seen == [16, 16, 16] and TINY.block_size > 16


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: 1.1 * y, "its output is off by"),
        (Halved.apply, "its gradient of the input is off by"),
        (NaNs.apply, "its gradient of the input is off by nan"),
    ],
)
def test_wrong_numbers_are_a_fault(change, said, precision):
    how = {"causal": False, "device": CPU, "precision": precision}
    assert said in fault_of("flash", lambda: wrong(change), TINY, **how)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("No available kernel.\nAborting execution."),
            "RuntimeError No available kernel. Aborting execution.",
        ),
        (ImportError("undefined symbol"), "ImportError undefined symbol"),  # of a package built for another PyTorch
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_kernel_that_fails_in_any_way_is_a_fault(error, said):
    def refuse(y):
        raise error

    how = {"causal": False, "device": CPU, "precision": "bf16-mixed"}
    assert fault_of("flash", lambda: wrong(refuse), TINY, **how) == said


def test_the_check_leaves_the_random_numbers_of_a_run_as_they_are():
    before = torch.get_rng_state()
    assert fault_of("flash", kernels("flash", CPU), TINY, causal=True, device=CPU, precision="32-true") == ""
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("asked", "precision", "faulty", "chosen"),
    [
        ("auto", "bf16-mixed", (), "flash"),
        ("auto", "bf16-mixed", ("flash",), "cudnn"),
        ("auto", "bf16-mixed", ("flash", "cudnn", "efficient"), "math"),
        ("auto", "32-true", (), "efficient"),
        ("auto", "32-true", ("efficient",), "math"),
        ("cudnn", "bf16-mixed", (), "cudnn"),
        ("cudnn", "bf16-mixed", ("cudnn",), "flash"),
    ],
)
def test_the_first_kernel_without_a_fault_is_used_and_the_others_are_named(
    asked, precision, faulty, chosen, monkeypatch, recwarn
):
    def fault(name, enter, shape, *, causal, device, precision):
        assert (shape, causal, device) == (TINY, True, GPU)
        return "its output is wrong" if name in faulty else ""

    monkeypatch.setattr(attention_check, "fault_of", fault)
    name, enter = working_kernels(asked, TINY, causal=True, device=GPU, precision=precision)
    assert name == chosen
    backends = attention.SDPA[chosen]
    with enter():
        assert torch._C._get_math_sdp_enabled() == (chosen == "math")
        assert torch._C._get_flash_sdp_enabled() == (chosen == "flash"), backends
    assert [str(one.message) for one in recwarn] == [
        f"attention {name} is not used: its output is wrong; {chosen} is used instead" for name in faulty
    ]


def test_kernels_that_cannot_be_had_are_refused_and_not_replaced():
    with pytest.raises(UserError, match=r"trainer\.attention fa3 needs the package flash_attn_interface"):
        working_kernels("fa3", TINY, causal=False, device=GPU, precision="bf16-mixed")


def test_a_cpu_is_not_checked(monkeypatch):
    monkeypatch.setattr(attention_check, "fault_of", lambda *_, **__: pytest.fail("checked"))
    assert working_kernels("auto", TINY, causal=False, device=CPU, precision="32-true")[0] == "auto"


@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_keys_and_values_have_one_type_under_autocast(qk_norm, monkeypatch):
    seen = []
    plain = F.scaled_dot_product_attention

    def look(q, k, v, **options):
        seen.append({q.dtype, k.dtype, v.dtype})
        return plain(q, k, v, **options)

    layer = attention.Attention(dataclasses.replace(TINY, qk_norm=qk_norm))
    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 8, TINY.n_embd), *attention.rotary_tables(8, TINY.head_dim), True)
    assert seen == [{torch.bfloat16}]
