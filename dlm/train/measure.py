"""measure: model names -> true training FLOP/s on this machine, as JSON. Run by estimate in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch

from dlm.core.flops import flops_per_token
from dlm.core.shape import load_shape
from dlm.train.models.encoder import TransEncoder
from dlm.train.objectives.masked_diffusion import MaskedDiffusion

STEP_FLOPS = 2e9  # sequences are added until a step has about this many, as real micro-batches have


def measure(model: str, *, block_size: int, seconds: float) -> float:
    """FLOP/s (full_masked_head) of forward, backward and AdamW on random tokens, one thread, at least three steps."""
    torch.set_num_threads(1)
    shape = load_shape(model)
    length = min(block_size, shape.block_size, 512)  # what counts is the rate: a long sequence only takes longer
    per_token = float(flops_per_token(shape, convention="full_masked_head", block_size=length, causal=False))
    batch = int(min(max(STEP_FLOPS / (per_token * length), 1), 8))
    network = TransEncoder(shape, causal=False)
    network.init_weights(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    objective = MaskedDiffusion(vocab_size=shape.vocab_size)
    noise = np.random.default_rng(0)
    tokens = noise.integers(0, shape.vocab_size, (batch, length))
    arrays = objective.corrupt(tokens, noise.random(batch), noise.random((batch, length)))
    tensors: dict[str, Any] = {key: torch.as_tensor(value) for key, value in arrays.items()}

    def step() -> None:
        optimizer.zero_grad()
        objective.loss(network, tensors).mean().backward()
        optimizer.step()

    step()
    steps, started = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() - started < seconds:
        step()
        steps += 1
    return steps * batch * length * per_token / (time.perf_counter() - started)


def main() -> None:
    """Read the request from the command line and print the rates."""
    request = json.loads(sys.argv[1])
    options = {"block_size": request["block_size"], "seconds": request["seconds"]}
    print(json.dumps({model: measure(model, **options) for model in request["models"]}))


if __name__ == "__main__":
    main()
