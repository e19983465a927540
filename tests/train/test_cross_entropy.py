"""The ways to compute the head and the cross-entropy: equal losses and gradients, and what they hold in memory."""

import weakref

import pytest
import torch
from support.modules import make_batch, make_module, objective_named, set_up
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlm.core.errors import UserError
from dlm.core.shape import load_shape
from dlm.train.models import cross_entropy
from dlm.train.models.cross_entropy import IGNORED, auto, chunked, cross_entropy_named, dense

M, C, V = 37, 16, 300
CPU, GPU, PRECISION = torch.device("cpu"), torch.device("cuda"), "bf16-mixed"
SMALL = {"chunk_bytes": 4 * V * 8}  # 8 positions: four chunks and a part of one


def given(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(M, C, generator=random), torch.randn(V, C, generator=random)
    target = torch.randint(0, V, (M,), generator=random)
    target[[3, 8, 36]] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def results(compute, dtype=torch.float32, *, autocast=False):
    """The losses and both gradients, with a different weight for every position."""
    hidden, weight, target = given(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = compute(hidden, weight, target)
    (losses * torch.linspace(-1, 2, M)).sum().backward()
    return losses.detach(), hidden.grad, weight.grad


def truth(dtype=torch.float32):
    def exact(hidden, weight, target):
        return torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, target, reduction="none")

    return [one.double() for one in results(exact, dtype)]


@pytest.mark.parametrize("compute", [dense, auto, lambda *given: chunked(*given, **SMALL)])
def test_losses_and_gradients_in_float32_are_those_of_the_formula(compute):
    losses, *gradients = results(compute)
    exact, *exact_gradients = truth()
    assert losses.dtype == torch.float32 and losses[[3, 8, 36]].tolist() == [0.0] * 3
    assert (losses - exact).abs().max() < 1e-6 * exact.abs().max()
    for one, right in zip(gradients, exact_gradients, strict=True):
        assert (one - right).abs().max() < 1e-6 * right.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compute", [dense, lambda *given: chunked(*given, **SMALL)])
def test_logits_in_bfloat16_give_a_loss_in_float32(compute, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    losses, *gradients = results(compute, dtype, autocast=autocast)
    hidden, weight, target = given(torch.bfloat16)
    logits = hidden @ weight.T
    assert losses.dtype == torch.float32 and logits.dtype == torch.bfloat16
    rounded_once = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    assert (losses - rounded_once).abs().max() < 1e-6 * rounded_once.abs().max()
    for one, right in zip(gradients, truth(dtype)[1:], strict=True):
        assert one.dtype == dtype
        assert (one - right).norm() < 0.02 * right.norm()


def test_the_chunks_of_the_gradient_of_the_weights_are_added_in_float32():
    """In bfloat16, the sum of a thousand small gradients of one sign would stop growing."""
    random = torch.Generator().manual_seed(0)
    hidden, target = torch.rand(1000, C, generator=random), torch.zeros(1000, dtype=torch.long)
    gradients = []
    for compute in (dense, lambda *given: chunked(*given, chunk_bytes=4 * 20)):
        weight = (0.1 * torch.randn(20, C, generator=random.manual_seed(1))).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            compute(hidden, weight, target).sum().backward()
        gradients.append(weight.grad)
    assert (gradients[1] - gradients[0]).norm() < 0.01 * gradients[0].norm()


@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_training_step_is_the_same_and_is_compiled_whole_with_chunks(objective, is_compiled, monkeypatch):
    monkeypatch.setattr(chunked, "__kwdefaults__", {"chunk_bytes": 4 * 256 * 10})
    seen = []
    for name in ("dense", "chunked"):
        module = set_up(make_module({"trainer.cross_entropy": name, "model.n_layer": 1}, objective_named(objective)))
        compute = module.compute_loss
        if is_compiled and name == "chunked":
            torch._dynamo.reset()
            compute = torch.compile(compute, backend="aot_eager", fullgraph=True, dynamic=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(2):  # the number of masked tokens differs, the number of chunks does not
                batch = make_batch(module.objective, step=step)
                batch.pop("overflow", None)
                loss = compute(module.model, batch).mean()
                loss.backward()
        seen.append((loss.item(), [parameter.grad for parameter in module.model.parameters()]))
    (loss, gradients), (other_loss, other_gradients) = seen
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for one, other in zip(gradients, other_gradients, strict=True):
        assert (one - other).abs().max() < 1e-6 * max(one.abs().max().item(), 1.0)


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at once, beyond those that existed before."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        for one in tree_leaves(out):
            if not isinstance(one, torch.Tensor):
                continue
            storage = one.untyped_storage()
            if storage._cdata in self.known | before:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, name, size):
        self.known.discard(name)
        self.now -= size


def peak_bytes(compute, *, positions, precision):
    """The peak of the head and the loss of 6M, forwards and backwards, on tensors without values."""
    shape = load_shape("6M")
    with FakeTensorMode():
        hidden = torch.empty(positions, shape.n_embd, requires_grad=True)
        weight = torch.empty(shape.vocab_size + 1, shape.n_embd, requires_grad=True)
        target = torch.zeros(positions, dtype=torch.long)
        with Peak() as peak:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = compute(hidden, weight, target).mean()
            loss.backward()
    return peak.most


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_peak_of_the_chunked_loss_is_at_most_three_fifths_of_the_dense_one(precision):
    many = 33_312  # the capacity of 32 sequences of 2,048 tokens
    whole = peak_bytes(dense, positions=many, precision=precision)
    logits = 4 * many * 32_001
    assert whole > 2 * logits
    assert peak_bytes(chunked, positions=many, precision=precision) <= 0.25 * whole
    assert peak_bytes(auto, positions=many, precision=precision) <= 0.25 * whole
    few = 4_096  # two sequences of 2,048 tokens of the autoregressive model
    assert peak_bytes(auto, positions=few, precision=precision) == peak_bytes(dense, positions=few, precision=precision)
    less = peak_bytes(lambda *given: chunked(*given, chunk_bytes=2**26), positions=few, precision=precision)
    assert less <= 0.6 * peak_bytes(dense, positions=few, precision=precision)


def test_cross_entropies_that_are_missing_are_refused(monkeypatch):
    for name in ("auto", "dense", "chunked"):
        on_cpu = cross_entropy_named(name, CPU, precision=PRECISION)
        assert on_cpu is cross_entropy_named(name, GPU, precision=PRECISION)
    for name, package in (("liger", "liger-kernel"), ("cut", "cut-cross-entropy")):
        with pytest.raises(UserError, match=rf"trainer\.cross_entropy {name} needs a CUDA device, this run is on cpu"):
            cross_entropy_named(name, CPU, precision=PRECISION)
        with pytest.raises(UserError, match=rf"needs the package {package}: install dlm\[{name}\] or set auto"):
            cross_entropy_named(name, GPU, precision=PRECISION)


class FirstWeightOnly(torch.autograd.Function):
    """The error of liger-kernel 0.8.0: the weight of the first position counts for all positions."""

    @staticmethod
    def forward(ctx, losses):
        return losses.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:1].expand_as(gradient)


def half_only(hidden, weight, target):
    """A kernel like that of cut-cross-entropy 25.1, which has no backward pass in float32."""
    assert torch.is_autocast_enabled("cpu"), "Backwards requires embeddings to be bf16 or fp16"
    return dense(hidden, weight, target)


WRONG = {
    "one weight": (lambda *given: FirstWeightOnly.apply(dense(*given)), "its gradient of the input is off by"),
    "nan": (lambda *given: dense(*given) * torch.nan, "its loss is off by nan"),
    "refuses": (half_only, "AssertionError Backwards requires embeddings to be bf16 or fp16"),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("compute", [dense, chunked])
def test_the_check_of_packages_accepts_right_numbers_in_every_precision(compute, precision):
    assert cross_entropy.fault_of(compute, CPU, precision) == ""


@pytest.mark.parametrize("name", WRONG)
def test_a_package_that_computes_wrong_numbers_is_refused(name, monkeypatch):
    compute, fault = WRONG[name]
    real = cross_entropy.fault_of
    monkeypatch.setattr(cross_entropy, "fault_of", lambda compute, _, precision: real(compute, CPU, precision))
    monkeypatch.setattr(cross_entropy.util, "find_spec", lambda module: module)
    monkeypatch.setattr(cross_entropy, "_liger", compute)
    with pytest.raises(UserError, match=f"liger does not work here under trainer.precision 32-true: {fault}"):
        cross_entropy_named("liger", GPU, precision="32-true")
    assert real(half_only, CPU, "bf16-mixed") == ""
