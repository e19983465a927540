"""Measure dlm's training step beside nanochat's and litgpt's on a CPU, at equal FLOPs per token.

    python benchmarks/cpu.py --peers DIR [--rows nanochat,litgpt] [--threads 1]

DIR holds checkouts of the peers, nanochat/ and litgpt/. One that is not there, or cannot be imported, is reported as
absent. Row C6 is a forward pass, a backward pass, clipping and a fused AdamW step of each side's own model and loss
in float32, autoregressive on both sides. The sides are measured in turn; the result is the median of true FLOP/s (6
for each weight of a matrix and token, and half of the attention square). dlm's masked diffusion is measured too,
counted as full_masked_head. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import Side, alternate, commit, compared, write_result
from dlm.core.flops import flops_per_token
from dlm.core.shape import ModelShape
from dlm.data.noise import stratified_t, uniforms
from dlm.train.models.encoder import TransEncoder
from dlm.train.objectives import Objective
from dlm.train.objectives.autoregressive import Autoregressive
from dlm.train.objectives.masked_diffusion import MaskedDiffusion

BATCH, LENGTH, STEPS = 4, 128, 4
Loss = Callable[[int], torch.Tensor]


def side(model: nn.Module, loss: Loss, flops_per_step: float) -> Side:
    """Make a window of STEPS training steps; it returns FLOP/s and steps per second. ``loss`` takes a step's number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def window() -> dict[str, float]:
        began = time.perf_counter()
        for step in range(STEPS):
            loss(step).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - began
        return {"flops_per_sec": STEPS * flops_per_step / seconds, "steps_per_sec": STEPS / seconds}

    return window


def texts(vocab_size: int) -> np.ndarray:
    """Random tokens, (STEPS, BATCH, LENGTH + 1)."""
    return np.random.default_rng(0).integers(0, vocab_size, (STEPS, BATCH, LENGTH + 1))


def given_and_next(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, and the token that follows each of them; both (STEPS, BATCH, LENGTH)."""
    text = torch.from_numpy(texts(vocab_size))
    return text[:, :, :-1].contiguous(), text[:, :, 1:].contiguous()


def ours(shape: ModelShape, objective: Objective) -> Side:
    """dlm's model and loss. The batches are made beforehand, because workers of the loader make them in a real run."""
    model = TransEncoder(shape, causal=objective.info.causal)
    model.init_weights(torch.Generator().manual_seed(0))
    noise = [
        (stratified_t(0, step, np.arange(BATCH)), uniforms(0, step * BATCH, BATCH, LENGTH)) for step in range(STEPS)
    ]
    batches = [
        {key: torch.as_tensor(value) for key, value in objective.corrupt(text[:, :-1], *drawn).items()}
        for text, drawn in zip(texts(shape.vocab_size), noise, strict=True)
    ]
    per_token = flops_per_token(shape, convention="full_masked_head", block_size=LENGTH, objective=objective.info)
    return side(model, lambda step: objective.loss(model, batches[step]).mean(), float(per_token) * BATCH * LENGTH)


def decoder_flops(*, layers: int, matrices: int, width: int, vocab: int) -> float:
    """Training FLOPs of one step of a causal decoder with ``matrices`` weights in each layer."""
    per_token = 6 * (layers * matrices + vocab * width) + 6 * layers * width * LENGTH
    return float(per_token * BATCH * LENGTH)


def nanochat() -> tuple[Side, ModelShape, str]:
    """nanochat's GPT: 8 layers of 12 d^2 weights, as many as 6 of our layers of 16 d^2."""
    gpt = importlib.import_module("nanochat.gpt")
    config = gpt.GPTConfig(sequence_len=LENGTH, vocab_size=32000, n_layer=8, n_head=4, n_kv_head=4, n_embd=256,
                           window_pattern="L")  # fmt: skip
    with torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device="cpu")
    model.init_weights()
    data, targets = given_and_next(32000)
    flops = decoder_flops(layers=8, matrices=12 * 256**2, width=256, vocab=32000)
    shape = ModelShape(name="6M", n_layer=6, n_head=4, n_embd=256, intermediate_size=1024, vocab_size=32000,
                       block_size=LENGTH)  # fmt: skip
    note = "nanochat GPT, 8 layers of width 256, windows off, float32, fused AdamW for all its parameters"
    return side(model, lambda step: model(data[step], targets[step]), flops), shape, note


def litgpt() -> tuple[Side, ModelShape, str]:
    """litgpt's pythia-14m: 6 layers of 12 d^2 weights, width 128; our gated MLP has as many weights."""
    model_of, config_of = importlib.import_module("litgpt.model"), importlib.import_module("litgpt.config")
    config = config_of.Config.from_name("pythia-14m", block_size=LENGTH)
    model = model_of.GPT(config)
    chunked = importlib.import_module("litgpt.utils").chunked_cross_entropy
    vocab = config.padded_vocab_size
    data, targets = given_and_next(vocab)
    flops = decoder_flops(layers=6, matrices=12 * 128**2, width=128, vocab=vocab)
    shape = ModelShape(name="14m", n_layer=6, n_head=4, n_embd=128, intermediate_size=344, vocab_size=vocab,
                       block_size=LENGTH)  # fmt: skip
    note = "litgpt pythia-14m with its chunked_cross_entropy, float32, fused AdamW"
    return side(model, lambda step: chunked(model(data[step]), targets[step]), flops), shape, note


PEERS = {"nanochat": nanochat, "litgpt": litgpt}


def row(name: str, peers: Path) -> dict[str, Any]:
    """Measure one peer beside dlm, or say why it is absent."""
    checkout = peers / name
    if not checkout.is_dir():
        return {"absent": f"ls {name}: no such directory under --peers"}
    sys.path.insert(0, str(checkout))
    try:
        peer, shape, note = PEERS[name]()
    except ImportError as error:
        return {"absent": f"import {name}: {error}"}
    result: dict[str, Any] = {"peer": note, "peer_commit": commit(checkout), "batch": [BATCH, LENGTH]}
    objectives = {
        "autoregressive": Autoregressive(bos_id=0),
        "masked_diffusion": MaskedDiffusion(vocab_size=shape.vocab_size),
    }
    for objective, made in objectives.items():
        result[objective] = compared(*alternate(ours(shape, made), peer))
    return result


def main() -> None:
    """Measure the rows that were asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(PEERS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {name: row(name, options.peers.resolve()) for name in options.rows.split(",")}
    print(json.dumps(rows, indent=2))
    command = f"python benchmarks/cpu.py --peers DIR --rows {options.rows} --threads {options.threads}"
    name = f"step_cpu_{datetime.date.today()}"
    print(write_result(name, rows, command=command, packages=("torch", "numpy"), threads=options.threads))


if __name__ == "__main__":
    main()
