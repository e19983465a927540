"""The losses against a reference in float64, and against entropies that are known exactly."""

import itertools

import numpy as np
import pytest
import torch
from support.answering import answering
from support.masked import taken_apart
from support.reference_model import TINY, reference_logits

from dlm.core.errors import UserError
from dlm.data.noise import stratified_t, uniforms
from dlm.train.models.encoder import TransEncoder
from dlm.train.objectives import make_objective
from dlm.train.objectives.autoregressive import Autoregressive
from dlm.train.objectives.masked_diffusion import MaskedDiffusion, capacity

V, T, BOS = 11, 9, 3
B = 5


def tensors(batch):
    return {name: torch.as_tensor(value) for name, value in batch.items()}


def random_batch(objective, seed=0):
    noise = np.random.default_rng(seed)
    tokens = noise.integers(0, V, (B, T))
    return tensors(objective.corrupt(tokens, noise.random(B), noise.random((B, T))))


def model_and_weights(causal):
    model = TransEncoder(TINY, causal=causal)
    model.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return model, {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def agree(model, weights, loss, truth):
    """The loss and every gradient."""
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    loss.backward()
    truth.backward()
    for name, parameter in model.named_parameters():
        scale = weights[name].grad.abs().max()
        assert scale > 0, name
        assert (parameter.grad - weights[name].grad).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("weight", ["elbo", "low_var", "realised_fraction"])
def test_the_loss_of_masked_diffusion_and_every_gradient_follow_the_formula(weight):
    objective = MaskedDiffusion(vocab_size=V, weight=weight)
    noise = np.random.default_rng(0)
    tokens, time, uniform = noise.integers(0, V, (B, T)), noise.random(B), noise.random((B, T))
    batch = tensors(objective.corrupt(tokens, time, uniform))
    model, weights = model_and_weights(causal=False)
    mask = torch.from_numpy(uniform < 1e-3 + 0.999 * time[:, None])
    truth = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        p, masked = 1e-3 + 0.999 * time[b], mask[b].sum().item()
        expected = {"elbo": p * T, "low_var": (1 + 1e-3) / 2 * T, "realised_fraction": max(masked, 1)}[weight]
        visible = torch.from_numpy(tokens[b]).clone()
        visible[mask[b]] = V  # the mask token is the row after the vocabulary
        log_prob = reference_logits(weights, TINY, visible, causal=False).log_softmax(-1)
        for t in range(T):
            if mask[b, t]:
                truth = truth - log_prob[t, tokens[b, t]] / expected / B
    agree(model, weights, objective.loss(model, batch).mean(), truth)


def test_the_autoregressive_loss_and_every_gradient_follow_the_formula():
    objective = Autoregressive(bos_id=BOS)
    batch = random_batch(objective)
    model, weights = model_and_weights(causal=True)
    truth = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        given = torch.tensor([BOS, *batch["tokens"][b, :-1].tolist()])
        log_prob = reference_logits(weights, TINY, given, causal=True).log_softmax(-1)
        for t in range(T):
            truth = truth - log_prob[t, batch["tokens"][b, t]] / T / B
    agree(model, weights, objective.loss(model, batch).mean(), truth)


# A small world that is known exactly: all sequences of three letters, and how likely each is.
LETTERS, LENGTH = 3, 4
TEXTS = torch.tensor(list(itertools.product(range(LETTERS), repeat=LENGTH)))
PROB = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(len(TEXTS), 0.3)))  # strongly correlated
ENTROPY = -(PROB * PROB.log()).sum().item() / LENGTH  # nats/token


def conditional(known_MT: torch.Tensor) -> torch.Tensor:
    """(M, T, V) log of the exact probability of each letter at each place given the known letters; -1 is unknown."""
    fits = ((known_MT[:, None] == TEXTS) | (known_MT[:, None] < 0)).all(-1) * PROB  # (M, texts)
    letters = torch.nn.functional.one_hot(TEXTS, LETTERS).double()  # (texts, T, V)
    joint = torch.einsum("mx,xtv->mtv", fits, letters)
    return (joint / joint.sum(-1, keepdim=True)).log()


class ExactDenoiser(torch.nn.Module):
    """Knows the conditional distribution of every masked letter."""

    def forward(self, tokens_BT, index_M):
        return conditional(torch.where(tokens_BT == LETTERS, -1, tokens_BT)).flatten(0, 1)[index_M]


class ExactReader(torch.nn.Module):
    """Knows the distribution of every letter given those before it."""

    def forward(self, tokens_BT):
        result = []
        for place in range(LENGTH):
            known = torch.full((len(tokens_BT), LENGTH), -1)
            known[:, :place] = tokens_BT[:, 1 : place + 1]  # after BOS
            result.append(conditional(known)[:, place])
        return torch.stack(result, dim=1)


MASKS = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))


def of_every_text(objective, model, mask, weight) -> float:
    """The expectation over texts of the loss under one mask."""
    texts = len(TEXTS)
    batch = tensors(objective.masked(TEXTS.numpy(), mask.expand(texts, -1).numpy(), np.full(texts, weight)))
    return (PROB * objective.loss(answering(model), batch)).sum().item()


def counted(objective: MaskedDiffusion, model) -> float:
    """The bound without eps, exactly: the mean over k = 1..T of the mean over all masks of k tokens."""
    total = 0.0
    for k in range(1, LENGTH + 1):
        of_k = [mask for mask in MASKS if mask.sum() == k]
        total += sum(of_every_text(objective, model, mask, 1 / k) for mask in of_k) / len(of_k) / LENGTH
    return total


def integrated(objective: MaskedDiffusion, weight=lambda p, masked: 1 / (p * LENGTH), model=None) -> float:
    """The expectation of the loss over texts, masks and t, exactly: Gauss-Legendre is exact for polynomials."""
    model = model or ExactDenoiser()
    nodes, shares = np.polynomial.legendre.leggauss(LENGTH + 1)
    total = 0.0
    for t, share in zip((nodes + 1) / 2, shares / 2, strict=True):
        p = (1 - objective.eps) * t + objective.eps
        for mask in MASKS:
            masked = mask.sum().item()
            chance = p**masked * (1 - p) ** (LENGTH - masked)
            total += share * chance * of_every_text(objective, model, mask, weight(p, masked))
    return total


def test_the_bound_is_tight_for_a_model_with_the_exact_conditionals():
    exact = MaskedDiffusion(vocab_size=LETTERS, eps=1e-7)
    assert integrated(exact) == pytest.approx(ENTROPY, rel=1e-5)
    assert integrated(MaskedDiffusion(vocab_size=LETTERS)) == pytest.approx(ENTROPY, rel=3e-3)  # the bias of eps
    alike = integrated(exact, weight=lambda p, masked: 2 / LENGTH)  # 1 / E[p] instead of 1 / p: a mean weight of one
    assert abs(alike - ENTROPY) > 0.05 * ENTROPY
    assert counted(exact, ExactDenoiser()) == pytest.approx(ENTROPY, rel=1e-6)


def test_a_uniform_model_has_a_training_loss_of_log_v():
    def blind(tokens_BT, index_M):
        return torch.zeros(len(index_M), LETTERS)

    exact = MaskedDiffusion(vocab_size=LETTERS, eps=1e-7)
    for weight, share in (
        (lambda p, masked: 1 / (p * LENGTH), 1),
        (lambda p, masked: 2 / LENGTH, 1),
        (lambda p, masked: 1 / max(masked, 1), LENGTH / (LENGTH + 1)),  # empty draws teach nothing
    ):
        assert integrated(exact, weight, blind) == pytest.approx(np.log(LETTERS) * share, rel=1e-5)


class Doubter(ExactDenoiser):
    """A model that is wrong: less sure than the known letters allow."""

    def forward(self, tokens_BT, index_M):
        return 0.5 * super().forward(tokens_BT, index_M)


@pytest.mark.parametrize("estimator", ["mc", "exact_count"])
def test_an_estimator_is_unbiased_for_its_bound(estimator):
    """Against enumeration of all texts, masks and (by quadrature) times, for a model that is no exact one."""
    objective, n = MaskedDiffusion(vocab_size=LETTERS, eps=0.2, estimator=estimator), 1 << 17
    with_eps, without = integrated(objective, model=Doubter()), counted(objective, Doubter())
    assert abs(with_eps - without) > 0.02 * without  # so that one is not taken for the other
    texts = np.random.default_rng(2).choice(len(TEXTS), size=n, p=PROB.numpy())
    noise = stratified_t(3, 0, np.arange(n)), uniforms(3, 0, n, LENGTH)
    batch = tensors(objective.probe(TEXTS.numpy()[texts], *noise))
    loss = objective.loss(answering(Doubter()), batch).double()
    error = loss.std().item() / n**0.5
    truth = with_eps if estimator == "mc" else without
    assert error < 0.005 * truth and loss.mean().item() == pytest.approx(truth, abs=4 * error)


def test_exact_count_masks_exactly_k_tokens_with_k_evenly_spread():
    objective, length, n = MaskedDiffusion(vocab_size=V, estimator="exact_count"), 16, 1024
    t = (np.arange(n) + 0.5) / n
    batch = taken_apart(objective.probe(np.zeros((n, length), dtype=int), t, uniforms(5, 0, n, length)))
    masked = batch["mask"].sum(1)
    assert batch["weight"] == pytest.approx(1 / masked) and masked.min() == 1 and masked.max() == length
    assert (np.bincount(masked)[1:] == n // length).all()
    places = batch["mask"].mean(0)  # no place is preferred
    assert np.abs(places - (length + 1) / (2 * length)).max() < 4 * np.sqrt(0.25 / n)


def test_the_drawn_bound_has_the_entropy_as_its_mean():
    objective, n = MaskedDiffusion(vocab_size=LETTERS), 32768
    texts = np.random.default_rng(1).choice(len(TEXTS), size=n, p=PROB.numpy())
    batch = tensors(
        objective.corrupt(TEXTS.numpy()[texts], stratified_t(0, 0, np.arange(n)), uniforms(0, 0, n, LENGTH))
    )
    nll = objective.loss(answering(ExactDenoiser()), batch).double()
    error = nll.std().item() / n**0.5
    assert error < 0.02 * ENTROPY
    assert nll.mean().item() == pytest.approx(ENTROPY, abs=4 * error)


def test_the_autoregressive_loss_with_exact_conditionals_is_the_entropy():
    nll = Autoregressive(bos_id=LETTERS).loss(answering(ExactReader()), {"tokens": TEXTS})
    assert (PROB * nll).sum().item() == pytest.approx(ENTROPY, rel=1e-6)


def test_both_objectives_score_every_token():
    """A model that knows nothing pays log V for each of the T tokens, the first and the last included."""
    tokens = torch.arange(T)[None] % V

    def blind(tokens_BT, index_M=None):
        logits = torch.zeros(*tokens_BT.shape, V)
        return logits if index_M is None else logits.flatten(0, 1)[index_M]

    everything = MaskedDiffusion(vocab_size=V).masked(tokens.numpy(), np.ones((1, T), dtype=bool), np.full(1, 1 / T))
    everything = tensors(everything)
    assert MaskedDiffusion(vocab_size=V).loss(answering(blind), everything).item() == pytest.approx(np.log(V))
    assert Autoregressive(bos_id=BOS).loss(answering(blind), {"tokens": tokens}).item() == pytest.approx(np.log(V))
    for place in range(T):  # each counts for 1 / T

        def sure_of_one(tokens_BT, index_M=None, place=place):
            logits = torch.zeros(1, T, V)
            logits[0, place, place] = 100.0
            return logits if index_M is None else logits.flatten(0, 1)[index_M]

        share = np.log(V) * (T - 1) / T
        assert MaskedDiffusion(vocab_size=V).loss(answering(sure_of_one), everything).item() == pytest.approx(share)
        assert Autoregressive(bos_id=BOS).loss(answering(sure_of_one), {"tokens": tokens}).item() == pytest.approx(
            share
        )


def seen_logits(objective, model, batch):
    seen = []
    objective.loss(answering(lambda *args: seen.append(model(*args)) or seen[0]), batch)
    return seen[0].detach()


def test_no_target_leaks_into_its_own_prediction():
    model, _ = model_and_weights(causal=True)
    objective = Autoregressive(bos_id=BOS)
    tokens = torch.arange(T)[None] % V
    before = seen_logits(objective, model, {"tokens": tokens})
    for place in range(T):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % V
        moved = (seen_logits(objective, model, {"tokens": changed}) - before).abs().amax(-1)[0] > 1e-6
        assert not moved[: place + 1].any() and moved[place + 1 :].all()

    model, _ = model_and_weights(causal=False)
    diffusion = MaskedDiffusion(vocab_size=V)
    batch = random_batch(diffusion)
    before = seen_logits(diffusion, model, batch)
    text = taken_apart(batch)
    hidden = tensors(diffusion.masked(np.where(text["mask"], (text["tokens"] + 1) % V, text["tokens"]), text["mask"],
                                      text["weight"]))  # fmt: skip
    assert torch.equal(seen_logits(diffusion, model, hidden), before)
    seen = tensors(diffusion.masked(np.where(text["mask"], text["tokens"], (text["tokens"] + 1) % V), text["mask"],
                                    text["weight"]))  # fmt: skip
    assert not torch.equal(seen_logits(diffusion, model, seen), before)


def test_a_sequence_without_a_masked_token_has_a_loss_of_zero():
    objective, (model, _) = MaskedDiffusion(vocab_size=V), model_and_weights(causal=False)
    none = np.zeros((2, T), dtype=bool)
    batch = tensors(objective.masked(np.zeros((2, T), dtype=int), none, np.array([100.0, 0.2])))
    assert objective.loss(model, batch).tolist() == [0.0, 0.0]
    none[1, 3] = True
    batch = tensors(objective.masked(np.zeros((2, T), dtype=int), none, np.array([100.0, 0.2])))
    first, second = objective.loss(model, batch).tolist()
    assert first == 0 < second


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_masked_tokens_beyond_the_capacity_count_too(batch):
    """Everything masked: twice the capacity of an even micro-batch; the loss is that of the dense head."""
    objective, (model, _) = MaskedDiffusion(vocab_size=V), model_and_weights(causal=False)
    tokens = np.random.default_rng(3).integers(0, V, (batch, 16))
    full = tensors(objective.masked(tokens, np.ones_like(tokens, dtype=bool), np.full(batch, 1 / 16)))
    slots = capacity(batch, 16, eps=1e-3)
    assert len(full["index"]) % slots == 0 and len(full["index"]) == (slots if slots == tokens.size else 2 * slots)
    dense = model(full["tokens"]).transpose(1, 2)
    truth = torch.nn.functional.cross_entropy(dense, torch.from_numpy(tokens), reduction="none").mean(1)
    assert objective.loss(model, full).tolist() == pytest.approx(truth.tolist(), rel=1e-6)


def test_the_head_on_masked_positions_agrees_with_the_dense_head():
    """A micro-batch of 8 with room to spare, so filled up: what is filled in must not count."""
    objective = MaskedDiffusion(vocab_size=V)
    tokens = np.random.default_rng(4).integers(0, V, (8, 16))
    batch = tensors(objective.corrupt(tokens, stratified_t(0, 0, np.arange(8)), uniforms(0, 0, 8, 16)))
    text = taken_apart(batch)
    assert 0 < text["mask"].sum() < len(batch["index"]) < tokens.size
    results = []
    for dense in (False, True):
        model, _ = model_and_weights(causal=False)
        if dense:
            logits = model(batch["tokens"]).transpose(1, 2)
            ce = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens), reduction="none")
            weight = torch.from_numpy(text["mask"] * text["weight"][:, None]).float()
            loss = (ce * weight).sum(1).mean()
        else:
            loss = objective.loss(model, batch).mean()
        loss.backward()
        results.append((loss.item(), [parameter.grad for parameter in model.parameters()]))
    (masked_loss, masked_grads), (dense_loss, dense_grads) = results
    assert masked_loss == pytest.approx(dense_loss, rel=1e-6)
    for a, b in zip(masked_grads, dense_grads, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max().clamp(min=1)


def test_tokens_are_masked_with_probability_p():
    objective = MaskedDiffusion(vocab_size=V, eps=0.25)
    n, length = 64, 4096
    t = (np.arange(n) + 0.5) / n
    batch = taken_apart(objective.corrupt(np.zeros((n, length), dtype=int), t, uniforms(5, 0, n, length)))
    p = 0.75 * t + 0.25
    assert batch["weight"] == pytest.approx(1 / (p * length))
    assert (np.abs(batch["mask"].mean(1) - p) < 4 * np.sqrt(p * (1 - p) / length)).all()


def test_the_config_chooses_the_objective():
    def made_of(**node):
        return make_objective({"objective": node, "validation": {"estimator": "mc"}}, vocab_size=V, bos_id=BOS)

    made = made_of(name="masked_diffusion", eps=0.01)
    assert isinstance(made, MaskedDiffusion) and (made.mask_id, made.eps, made.info.causal) == (V, 0.01, False)
    read = made_of(name="autoregressive")
    assert isinstance(read, Autoregressive) and read.bos_id == BOS and read.info.causal
    with pytest.raises(UserError, match="did you mean masked_diffusion"):
        made_of(name="masked")
