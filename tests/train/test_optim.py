"""Optimisers by name: which parameter gets what, against AdamW written out; CompleteP's promise; Muon; branches."""

import copy

import numpy as np
import pytest
import torch
from support.masked import taken_apart
from support.modules import make_module
from support.reference_model import TINY

from dlm.core.errors import UserError
from dlm.core.schedule import Rates
from dlm.core.shape import ModelShape
from dlm.train.models.encoder import TransEncoder
from dlm.train.objectives.masked_diffusion import MaskedDiffusion
from dlm.train.optim import check_branch, factors, kind_of, make_optimizer

ADAMW = {"name": "adamw", "lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-3, "weight_decay": 0.1, "decay": "all"}
MUON = {**ADAMW, "name": "muon", "momentum": 0.95}
KINDS = ("embedding", "hidden", "norm", "head")


def shape_of(width=32, depth=2, *, base=None):
    completep = {"parametrisation": "completep", "base_n_embd": base[0], "base_n_layer": base[1]} if base else {}
    return ModelShape(name="x", n_layer=depth, n_head=width // 16, n_embd=width, intermediate_size=4 * width,
                      vocab_size=64, block_size=32, **completep)  # fmt: skip


def model_of(shape):
    model = TransEncoder(shape, causal=False)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def batch_of(shape, sequences=8):
    noise = np.random.default_rng(0)
    objective = MaskedDiffusion(vocab_size=shape.vocab_size)
    length = shape.block_size
    batch = objective.corrupt(
        noise.integers(0, shape.vocab_size, (sequences, length)), noise.random(sequences),
        noise.random((sequences, length))
    )  # fmt: skip
    assert taken_apart(batch)["mask"].any()
    return objective, {key: torch.as_tensor(value) for key, value in batch.items()}


def train(model, optimizer, shape, steps):
    objective, batch = batch_of(shape)
    for _ in range(steps):
        optimizer.zero_grad()
        objective.loss(model, batch).mean().backward()
        optimizer.step()


def adamw_by_hand(weight, gradients, *, lr, weight_decay, eps, betas=(0.9, 0.95)):
    """Loshchilov and Hutter (1711.05101), algorithm 2, in float64."""
    weight, m, v = weight.double(), 0.0, 0.0
    for step, gradient in enumerate(gradients, start=1):
        m, v = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient**2
        change = m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        weight = weight - lr * (change + weight_decay * weight)
    return weight


def muon_by_hand(weight, gradients, *, lr, weight_decay, momentum):
    """Muon with Nesterov's momentum and changes of AdamW's size (Liu et al. 2502.16982), in float64."""
    weight, average = weight.double(), 0.0
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        change = momentum * average + (1 - momentum) * gradient
        change = change / change.norm()
        for _ in range(5):  # towards the orthogonal matrix that is nearest
            square = change @ change.T
            change = 3.4445 * change + (-4.7750 * square + 2.0315 * square @ square) @ change
        weight = weight - lr * (0.2 * max(weight.shape) ** 0.5 * change + weight_decay * weight)
    return weight


# What Dey et al. (2505.01618), table 1, say of twice the width (m_N = 2) and three times the depth (m_L = 3).
COMPLETEP = {
    "embedding": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3 / 2},
    "hidden": {"lr": 1e-2 / 2, "weight_decay": 0.2, "eps": 1e-3 / 6},
    "norm": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3 / 6},
    "head": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3 / 2},
}
PLAIN = {kind: {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3} for kind in KINDS}


@pytest.mark.parametrize(
    ("shape", "decay", "settings"),
    [
        (shape_of(), "all", PLAIN),
        (shape_of(), "matrices", {**PLAIN, "norm": {**PLAIN["norm"], "weight_decay": 0.0}}),
        (shape_of(64, 6, base=(32, 2)), "all", COMPLETEP),
        (shape_of(64, 6, base=(64, 6)), "all", PLAIN),
    ],
    ids=["sp", "matrices", "completep", "completep_at_its_base"],
)
def test_every_parameter_moves_as_the_formula_of_adamw(shape, decay, settings):
    model = model_of(shape)
    optimizer = make_optimizer(model, {**ADAMW, "decay": decay}, shape)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for step in range(3)]
                 for name, p in before.items()}  # fmt: skip
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name][step]
        optimizer.step()
    seen = set()
    for name, parameter in model.named_parameters():
        kind = kind_of(name, parameter)
        seen.add(kind)
        truth = adamw_by_hand(before[name], [g.double() for g in gradients[name]], **settings[kind])
        assert (parameter - truth).abs().max() < 1e-6, name
    assert seen == set(KINDS)
    assert optimizer.param_groups[0]["lr"] == ADAMW["lr"]
    assert len(optimizer.param_groups) == len({tuple(value.items()) for value in settings.values()})


def test_completep_starts_like_smdm_at_its_base():
    plain, same = shape_of(64, 4), shape_of(64, 4, base=(64, 4))
    for a, b in zip(model_of(plain).parameters(), model_of(same).parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(set(factors(kind, plain).values()) == {1.0} for kind in KINDS)


def moved_by_training(shape, lr, steps=4):
    """Root mean square change of the residual stream's end and of the logits."""
    model = model_of(shape)
    optimizer = make_optimizer(model, {**ADAMW, "eps": 1e-8, "lr": lr}, shape)
    _, batch = batch_of(shape)

    def look():
        stream = []
        hook = model.blocks[-1].register_forward_hook(lambda module, given, result: stream.append(result.detach()))
        with torch.no_grad():
            logits = model(batch["tokens"])
        hook.remove()
        return stream[0], logits

    before = look()
    train(model, optimizer, shape, steps)
    return [(a - b).square().mean().sqrt().item() for a, b in zip(look(), before, strict=True)]


def test_completep_keeps_activations_alike_over_width_and_depth():
    """A few steps at one rate change stream and logits alike at every width and depth; under sp they do not."""
    lr = 5e-3
    stream, logits = np.array([moved_by_training(shape_of(width, base=(32, 2)), lr) for width in (32, 128, 512)]).T
    assert max(stream) < 1.3 * min(stream) and max(logits) < 2.2 * min(logits)
    stream, logits = np.array([moved_by_training(shape_of(32, depth, base=(32, 2)), lr) for depth in (2, 8, 32)]).T
    assert max(stream) < 2.5 * min(stream) and max(logits) < 1.2 * min(logits)
    narrow, wide, deep = (moved_by_training(shape_of(*size), lr)[0] for size in ((32, 2), (512, 2), (32, 32)))
    assert wide > 10 * narrow and deep > 5 * narrow


def test_muon_takes_the_matrices_of_the_blocks_and_makes_them_orthogonal():
    shape = shape_of()
    models = [model_of(shape) for _ in range(2)]
    start = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    config = {**MUON, "weight_decay": 0.0}
    for model, settings in zip(models, (config, {**config, "name": "adamw"}), strict=True):
        train(model, make_optimizer(model, settings, shape), shape, 1)
    for (name, by_muon), by_adamw in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if kind_of(name, by_muon) != "hidden":
            assert torch.equal(by_muon, by_adamw), name
            continue
        spectrum, other = (torch.linalg.svdvals((p - start[name]).detach()) for p in (by_muon, by_adamw))
        assert spectrum.max() < 1.8 * spectrum.median(), name  # most of it within .7 to 1.2 after five iterations
        assert other.max() > 2.5 * other.median(), name
        size = (by_muon - start[name]).square().mean().sqrt() / config["lr"]
        assert 0.1 < size < 0.3, name  # as large as AdamW's changes usually are: .2 of the learning rate


@pytest.mark.parametrize("momentum", [0.5, 0.95])
def test_muon_moves_a_matrix_as_its_formula_with_the_momentum_of_the_config(momentum):
    shape = shape_of()
    model = model_of(shape)
    optimizer = make_optimizer(model, {**MUON, "momentum": momentum}, shape)
    matrices = {name: p for name, p in model.named_parameters() if kind_of(name, p) == "hidden"}
    start = {name: p.detach().clone() for name, p in matrices.items()}
    random = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(3, *p.shape, generator=random) for name, p in matrices.items()}
    for step in range(3):
        for name, parameter in matrices.items():
            parameter.grad = gradients[name][step]
        optimizer.step()
    settings = {"lr": MUON["lr"], "weight_decay": MUON["weight_decay"], "momentum": momentum}
    for name, parameter in matrices.items():
        truth = muon_by_hand(start[name], gradients[name].double(), **settings)
        assert (parameter - truth).norm() < 0.05 * (truth - start[name]).norm(), name  # PyTorch computes in bfloat16


def test_muon_shrinks_a_matrix_by_rate_times_decay():
    """Decoupled, as AdamW's: W - lr (O + decay W) (Liu et al. 2502.16982), whatever adjusts the rate of O."""
    shape, decay = shape_of(), 0.3
    start = {name: p.detach().clone() for name, p in model_of(shape).named_parameters()}
    ends = []
    for weight_decay in (0.0, decay):
        model = model_of(shape)
        train(model, make_optimizer(model, {**MUON, "weight_decay": weight_decay}, shape), shape, 1)
        ends.append(dict(model.named_parameters()))
    for name, before in start.items():  # both optimisers: no parameter is left out under decay: all
        shrunk = ends[1][name] - ends[0][name]
        assert (shrunk + MUON["lr"] * decay * before).abs().max() < 1e-6, name


def test_muon_goes_on_from_its_state_bit_for_bit():
    shape = shape_of()
    model = model_of(shape)
    optimizer = make_optimizer(model, MUON, shape)
    train(model, optimizer, shape, 3)
    other = copy.deepcopy(model)
    resumed = make_optimizer(other, MUON, shape)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, shape, 3)
    train(other, resumed, shape, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    fresh = copy.deepcopy(other)
    train(fresh, make_optimizer(fresh, MUON, shape), shape, 1)
    train(other, resumed, shape, 1)
    assert not torch.equal(fresh.head.weight, other.head.weight)  # the state matters


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_the_schedule_moves_every_group(config):
    shape = shape_of(64, 6, base=(32, 2)) if config is ADAMW else shape_of()
    model = model_of(shape)
    optimizer = make_optimizer(model, config, shape)
    first = [group["lr"] for group in optimizer.param_groups]
    linear = {"name": "linear", "warmup_fraction": 0, "warmup_min_steps": 0, "min_ratio": 0.5}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Rates(config=linear, steps=10, warmup=0).multiplier)
    for step in range(1, 10):
        train(model, optimizer, shape, 1)
        schedule.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [lr * (1 - step / 18) for lr in first]
        )


def test_muon_under_completep_is_refused():
    with pytest.raises(UserError, match=r"muon has no rules for model\.parametrisation completep"):
        make_optimizer(model_of(TINY), MUON, shape_of(base=(32, 2)))


WSD = {"name": "wsd", "warmup_fraction": 0.01, "warmup_min_steps": 100, "min_ratio": 0.0, "decay_fraction": 0.1}


def test_a_branch_starts_where_trunk_and_branch_are_at_their_peak_rate():
    def rates(config, steps, warmup=100):
        return Rates(config=config, steps=steps, warmup=warmup)

    def check(config, steps, at, trunk=WSD, trunk_steps=5000, warmup=100):
        check_branch(rates(config, steps, warmup), trunk=rates(trunk, trunk_steps), at=at)

    check(WSD, 2213, 2000)
    assert rates(WSD, 2213).multiplier(2000) == 1 > rates(WSD, 2213).multiplier(2003)
    with pytest.raises(UserError, match=r"step 4900 is not from the constant part of a wsd run"):
        check(WSD, 6000, 4900)
    with pytest.raises(UserError, match=r"step 50 is not from the constant part"):
        check(WSD, 6000, 50)
    with pytest.raises(UserError, match=r"step 2000 is not from the constant part of a wsd run"):
        check(WSD, 2212, 2000, trunk={**WSD, "name": "linear"})
    with pytest.raises(
        UserError, match=r"warmed up for 100 steps, this run warms up for 22, .*warmup_tokens_per_param"
    ):
        check(WSD, 2213, 2000, warmup=22)
    with pytest.raises(UserError, match="outside the constant part of a run of 2100 steps: choose another") as no:
        check(WSD, 2100, 2000)
    named = int(str(no.value).rpartition("=")[2])
    check(WSD, named, 2000)
    with pytest.raises(UserError):
        check(WSD, named - 1, 2000)


@pytest.mark.parametrize(("limit", "after"), [(1.0, 1.0), (0.01, 0.01), (1e6, None), (None, None)])
def test_the_global_norm_of_the_gradients_is_clipped(limit, after):
    module = make_module({"optimizer.gradient_clip_val": limit})
    for place, parameter in enumerate(module.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
    before = [parameter.grad.clone() for parameter in module.parameters()]
    norm = sum(float(gradient.double().square().sum()) for gradient in before) ** 0.5
    module.configure_gradient_clipping(None)
    assert float(module.grad_norm) == pytest.approx(norm, rel=1e-5) and norm > 2
    share = 1.0 if after is None else after / norm
    for parameter, gradient in zip(module.parameters(), before, strict=True):
        assert (parameter.grad - share * gradient).abs().max() < 1e-5 * share
