"""Measure dlm's training step beside that of a peer, whose code is imported from a checkout of theirs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.card.bench import BATCHES, Bench, Side, counted_flops, in_turn, ours
from benchmarks.peers import SHIMS, Absent, smdm
from benchmarks.side_by_side import commit
from dlm.train.objectives.autoregressive import Autoregressive
from dlm.train.objectives.masked_diffusion import MaskedDiffusion

Loss = Callable[[int], torch.Tensor]


def against(bench: Bench) -> dict[str, Any]:
    """Compare dlm's step with that of the row's peer, in turn."""
    peer = bench.row.options["peer"]
    theirs, objective = PEERS[peer](bench)
    record = in_turn(bench, ours(bench, objective=objective), theirs)
    checkout = (bench.smdm or bench.peers / "SMDM") if peer == "smdm" else bench.peers / peer
    return {**record, "peer_is": peer, "peer_commit": commit(checkout) if checkout.is_dir() else None}


def _side(bench: Bench, model: nn.Module, loss: Loss, flops: float, *, slow: bool = False, **about: Any) -> Side:
    """Make a peer's step. ``slow`` copies the loss off the device in every step, as SMDM does."""
    fused = bench.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)

    def step(number: int) -> None:
        with bench.autocast():
            value = loss(number % BATCHES)
        value.backward()
        if slow:
            value.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Side(step=step, tokens=bench.tokens, flops=flops, about=about)


def _our_flops(bench: Bench, *, causal: bool) -> float:
    objective = Autoregressive(bos_id=0) if causal else MaskedDiffusion(vocab_size=bench.shape.vocab_size)
    return counted_flops(bench.shape, objective, length=bench.scale.length) * bench.tokens


def _smdm(bench: Bench) -> tuple[Side, str]:
    """SMDM: its TransEncoder and the body of its training loop (pretrain/train_mdm.py), eager."""
    package = smdm(bench.peers, checkout=bench.smdm)
    shape = bench.shape
    config = package.Config(
        block_size=bench.scale.length, vocab_size=shape.vocab_size, padding_multiple=1, n_layer=shape.n_layer,
        n_head=shape.n_head, n_embd=shape.n_embd, rotary_percentage=1.0, parallel_residual=False, bias=False,
        _norm_class="FusedRMSNorm", norm_eps=1e-5, _mlp_class="LLaMAMLP", intermediate_size=shape.intermediate_size
    )  # fmt: skip
    model = sys.modules["lit_gpt.diffmodel"].TransEncoder(config).to(bench.device)
    data, _ = bench.given_and_next()

    def loss(number: int) -> torch.Tensor:
        text = data[number]
        p = (1 - 1e-3) * torch.rand(len(text), 1, device=text.device) + 1e-3
        masked = torch.rand(text.shape, device=text.device) < p
        logits = model(torch.where(masked, shape.vocab_size, text))
        ce = nn.functional.cross_entropy(logits[masked], text[masked], reduction="none")
        return (ce / p.expand_as(masked)[masked]).sum() / text.numel()

    flops = _our_flops(bench, causal=False)
    return _side(bench, model, loss, flops, slow=True, shims=SHIMS["smdm"]), "masked_diffusion"


def _imported(bench: Bench, peer: str, module: str) -> Any:
    """Import a module of a peer's checkout. Raises Absent."""
    checkout = bench.peers / peer
    if not checkout.is_dir():
        raise Absent(f"no checkout of {peer} at {checkout}")
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"import {module} from {checkout}: {error}") from error


DEPTHS = {"85M": 12, "268M": 18, "666M": 24}  # nanochat's model of about the size of ours


def _nanochat(bench: Bench) -> tuple[Side, str]:
    """nanochat's GPT, compiled, with full attention windows; FLOPs as it counts them."""
    gpt = _imported(bench, "nanochat", "nanochat.gpt")
    depth, width = (DEPTHS[bench.row.size], 64 * DEPTHS[bench.row.size]) if bench.scale.name == "card" else (2, 32)
    heads = max(width // 128, 2)
    config = gpt.GPTConfig(sequence_len=bench.scale.length, vocab_size=bench.shape.vocab_size, n_layer=depth,
                           n_head=heads, n_kv_head=heads, n_embd=width, window_pattern="L")  # fmt: skip
    with torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device=bench.device)
    model.init_weights()
    data, targets = bench.given_and_next()
    compiled = torch.compile(model, dynamic=False)
    flops = float(model.estimate_flops()) * bench.tokens
    return _side(bench, model, lambda number: compiled(data[number], targets[number]), flops,
                 depth=depth, width=width), "autoregressive"  # fmt: skip


def _litgpt(bench: Bench) -> tuple[Side, str]:
    """litgpt's GPT with our own shape, so that FLOPs per token are equal."""
    model_of = _imported(bench, "litgpt", "litgpt.model")
    config_of, utils = importlib.import_module("litgpt.config"), importlib.import_module("litgpt.utils")
    shape = bench.shape
    config = config_of.Config(
        name="ours", block_size=bench.scale.length, vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size,
        n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, rotary_percentage=1.0, bias=False,
        parallel_residual=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        intermediate_size=shape.intermediate_size
    )  # fmt: skip
    model = model_of.GPT(config).to(bench.device)
    compiled = torch.compile(model, dynamic=False)
    data, targets = bench.given_and_next()
    loss: Loss = lambda number: utils.chunked_cross_entropy(compiled(data[number]), targets[number])  # noqa: E731
    return _side(bench, model, loss, _our_flops(bench, causal=True)), "autoregressive"


def _modernbert(bench: Bench) -> tuple[Side, str]:
    """ModernBERT of transformers, compiled, with its head on masked tokens only."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise Absent(f"import transformers: {error}") from error
    shape = bench.shape
    config = transformers.ModernBertConfig(
        vocab_size=shape.vocab_size + 1, hidden_size=shape.n_embd, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.n_layer, num_attention_heads=shape.n_head, max_position_embeddings=bench.scale.length,
        global_attn_every_n_layers=1, sparse_prediction=True, pad_token_id=0, attn_implementation="sdpa"
    )  # fmt: skip
    model = transformers.ModernBertForMaskedLM(config).to(bench.device)
    compiled = torch.compile(model, dynamic=False)
    masked = []
    for batch in bench.batches(MaskedDiffusion(vocab_size=shape.vocab_size)):
        labels = torch.full_like(batch["tokens"], -100)
        labels.view(-1)[batch["index"][batch["target"] >= 0]] = batch["target"][batch["target"] >= 0]
        masked.append({"input_ids": batch["tokens"], "labels": labels})
    flops = _our_flops(bench, causal=False)
    return _side(bench, model, lambda number: compiled(**masked[number]).loss, flops), "masked_diffusion"


PEERS = {"smdm": _smdm, "nanochat": _nanochat, "litgpt": _litgpt, "modernbert": _modernbert}
