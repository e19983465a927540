"""The losses against a reference in float64, and against entropies that are known exactly."""

import itertools

import numpy as np
import pytest
import torch
from reference_model import TINY, reference_logits

from dlm.errors import UserError
from dlm.models.encoder import TransEncoder
from dlm.objectives import make_objective
from dlm.objectives.autoregressive import Autoregressive
from dlm.objectives.masked_diffusion import MaskedDiffusion
from dlm.objectives.noise import stratified_t, uniforms

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


def test_masked_diffusion_is_its_formula_with_every_gradient():
    objective = MaskedDiffusion(vocab_size=V)
    batch = random_batch(objective)
    model, weights = model_and_weights(causal=False)
    truth = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        visible = batch["tokens"][b].clone()
        visible[batch["mask"][b]] = V  # the mask token is the row after the vocabulary
        log_prob = reference_logits(weights, TINY, visible, causal=False).log_softmax(-1)
        for t in range(T):
            if batch["mask"][b, t]:
                truth = truth - log_prob[t, batch["tokens"][b, t]] / batch["p"][b].double() / T / B
    agree(model, weights, objective.nll(model, batch).mean(), truth)


def test_autoregression_is_its_formula_with_every_gradient():
    objective = Autoregressive(bos_id=BOS)
    batch = random_batch(objective)
    model, weights = model_and_weights(causal=True)
    truth = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        given = torch.tensor([BOS, *batch["tokens"][b, :-1].tolist()])
        log_prob = reference_logits(weights, TINY, given, causal=True).log_softmax(-1)
        for t in range(T):
            truth = truth - log_prob[t, batch["tokens"][b, t]] / T / B
    agree(model, weights, objective.nll(model, batch).mean(), truth)


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

    def forward(self, tokens_BT, select_BT):
        return conditional(torch.where(tokens_BT == LETTERS, -1, tokens_BT))[select_BT]


class ExactReader(torch.nn.Module):
    """Knows the distribution of every letter given those before it."""

    def forward(self, tokens_BT):
        result = []
        for place in range(LENGTH):
            known = torch.full((len(tokens_BT), LENGTH), -1)
            known[:, :place] = tokens_BT[:, 1 : place + 1]  # after BOS
            result.append(conditional(known)[:, place])
        return torch.stack(result, dim=1)


def integrated(objective: MaskedDiffusion, weight=lambda p: p) -> float:
    """The expectation of the loss over texts, masks and t, exactly: Gauss-Legendre is exact for polynomials."""
    nodes, shares = np.polynomial.legendre.leggauss(LENGTH + 1)
    masks = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))
    total = 0.0
    for t, share in zip((nodes + 1) / 2, shares / 2, strict=True):
        p = (1 - objective.eps) * t + objective.eps
        for mask in masks:
            chance = p ** mask.sum().item() * (1 - p) ** (~mask).sum().item()
            ones = torch.ones(len(TEXTS))
            batch = {"tokens": TEXTS, "mask": mask.expand(len(TEXTS), -1), "p": ones * weight(p)}
            total += share * chance * (PROB * objective.nll(ExactDenoiser(), batch)).sum().item()
    return total


def test_the_bound_is_tight_for_a_model_that_knows_the_conditionals():
    exact = MaskedDiffusion(vocab_size=LETTERS, eps=1e-7)
    assert integrated(exact) == pytest.approx(ENTROPY, rel=1e-5)
    assert integrated(MaskedDiffusion(vocab_size=LETTERS)) == pytest.approx(ENTROPY, rel=3e-3)  # the bias of eps
    unweighted = integrated(exact, weight=lambda p: 0.5)  # 1 / E[p] instead of 1 / p: the same weight on average
    assert abs(unweighted - ENTROPY) > 0.05 * ENTROPY


def test_the_drawn_bound_has_the_entropy_as_its_mean():
    objective, n = MaskedDiffusion(vocab_size=LETTERS), 32768
    texts = np.random.default_rng(1).choice(len(TEXTS), size=n, p=PROB.numpy())
    batch = tensors(
        objective.corrupt(TEXTS.numpy()[texts], stratified_t(0, 0, np.arange(n)), uniforms(0, 0, n, LENGTH))
    )
    nll = objective.nll(ExactDenoiser(), batch).double()
    error = nll.std().item() / n**0.5
    assert error < 0.02 * ENTROPY
    assert nll.mean().item() == pytest.approx(ENTROPY, abs=4 * error)


def test_reading_with_the_exact_conditionals_gives_the_entropy():
    nll = Autoregressive(bos_id=LETTERS).nll(ExactReader(), {"tokens": TEXTS})
    assert (PROB * nll).sum().item() == pytest.approx(ENTROPY, rel=1e-6)


def test_both_score_every_token():
    """A model that knows nothing pays log V for each of the T tokens, the first and the last included."""
    tokens = torch.arange(T)[None] % V

    def blind(tokens_BT, select_BT=None):
        logits = torch.zeros(*tokens_BT.shape, V)
        return logits if select_BT is None else logits[select_BT]

    everything = {"tokens": tokens, "mask": torch.ones(1, T, dtype=torch.bool), "p": torch.ones(1)}
    assert MaskedDiffusion(vocab_size=V).nll(blind, everything).item() == pytest.approx(np.log(V))
    assert Autoregressive(bos_id=BOS).nll(blind, {"tokens": tokens}).item() == pytest.approx(np.log(V))
    for place in range(T):  # each counts for 1 / T

        def sure_of_one(tokens_BT, select_BT=None, place=place):
            logits = torch.zeros(1, T, V)
            logits[0, place, place] = 100.0
            return logits if select_BT is None else logits[select_BT]

        share = np.log(V) * (T - 1) / T
        assert MaskedDiffusion(vocab_size=V).nll(sure_of_one, everything).item() == pytest.approx(share)
        assert Autoregressive(bos_id=BOS).nll(sure_of_one, {"tokens": tokens}).item() == pytest.approx(share)


def seen_logits(objective, model, batch):
    seen = []
    objective.nll(lambda *args, **options: seen.append(model(*args, **options)) or seen[0], batch)
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
    other = torch.where(batch["mask"], (batch["tokens"] + 1) % V, batch["tokens"])
    assert torch.equal(seen_logits(diffusion, model, {**batch, "tokens": other}), before)
    visible = torch.where(batch["mask"], batch["tokens"], (batch["tokens"] + 1) % V)
    assert not torch.equal(seen_logits(diffusion, model, {**batch, "tokens": visible}), before)


def test_a_sequence_without_a_masked_token_costs_nothing():
    batch = {"tokens": torch.zeros(2, T, dtype=torch.long), "mask": torch.zeros(2, T, dtype=torch.bool),
             "p": torch.tensor([0.001, 0.5])}  # fmt: skip
    model, _ = model_and_weights(causal=False)
    assert MaskedDiffusion(vocab_size=V).nll(model, batch).tolist() == [0.0, 0.0]


def test_tokens_are_masked_with_probability_p():
    objective = MaskedDiffusion(vocab_size=V, eps=0.25)
    n, length = 64, 4096
    t = (np.arange(n) + 0.5) / n
    batch = objective.corrupt(np.zeros((n, length), dtype=int), t, uniforms(5, 0, n, length))
    assert batch["p"] == pytest.approx(0.75 * t + 0.25)
    deviation = np.sqrt(batch["p"] * (1 - batch["p"]) / length)
    assert (np.abs(batch["mask"].mean(1) - batch["p"]) < 4 * deviation).all()


def test_the_config_names_the_objective():
    made = make_objective({"name": "masked_diffusion", "eps": 0.01}, vocab_size=V, bos_id=BOS)
    assert isinstance(made, MaskedDiffusion) and (made.mask_id, made.eps, made.causal) == (V, 0.01, False)
    read = make_objective({"name": "autoregressive"}, vocab_size=V, bos_id=BOS)
    assert isinstance(read, Autoregressive) and read.bos_id == BOS and read.causal
    with pytest.raises(UserError, match="did you mean masked_diffusion"):
        make_objective({"name": "masked"}, vocab_size=V, bos_id=BOS)
    for eps in (0, 1, 2.0, -1e-3):
        with pytest.raises(UserError, match=r"objective\.eps"):
            MaskedDiffusion(vocab_size=V, eps=eps)
