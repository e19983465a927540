"""Measure the training speed of models on this machine: `python -m dlm.train.measure REQUEST`, JSON in and out.

A plan runs this in a process of its own, because planning does not import torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dlm.core.configs import load_choice
from dlm.core.errors import ExitCode, UserError
from dlm.core.flops import flops_per_token
from dlm.core.shape import shape_from_config
from dlm.train.models.encoder import TransEncoder
from dlm.train.objectives.masked_diffusion import MaskedDiffusion
from dlm.train.optim import make_optimizer

STEP_FLOPS = 2e9  # most FLOPs of a measured step, because a longer one only takes longer


def measure(
    model: str,
    *,
    block_size: int,
    batch_size: int,
    seconds: float,
    optimizer: Mapping[str, Any],
    keys: Mapping[str, Any] | None = None,
) -> float:
    """Measure the speed of forward pass, backward pass and optimiser on random tokens with one thread.

    Args:
        model: The name of a model in configs/model.
        block_size: Tokens of a sequence; at most 512 are used, because longer sequences only take longer.
        batch_size: Sequences of a step; fewer are used if these would take more than STEP_FLOPS.
        seconds: How long to measure; at least three steps are measured.
        optimizer: The config node ``optimizer``.
        keys: Keys of the model with other values than in configs/model.

    Returns:
        The speed in FLOP/s, counted by the convention full_masked_head.
    """
    torch.set_num_threads(1)
    shape = shape_from_config({**load_choice("model", model), **(keys or {})})
    objective = MaskedDiffusion(vocab_size=shape.vocab_size)
    length = min(block_size, shape.block_size, 512)
    per_token = float(
        flops_per_token(shape, convention="full_masked_head", block_size=length, objective=objective.info)
    )
    batch = int(min(max(STEP_FLOPS / (per_token * length), 1), batch_size))
    network = TransEncoder(shape, causal=objective.info.causal)
    network.init_weights(torch.Generator().manual_seed(0))
    stepper = make_optimizer(network, optimizer, shape)
    noise = np.random.default_rng(0)
    tokens = noise.integers(0, shape.vocab_size, (batch, length))
    arrays = objective.corrupt(tokens, noise.random(batch), noise.random((batch, length)))
    tensors: dict[str, Any] = {key: torch.as_tensor(value) for key, value in arrays.items()}

    def step() -> None:
        stepper.zero_grad()
        objective.loss(network, tensors).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
        stepper.step()

    step()
    steps, started = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() - started < seconds:
        step()
        steps += 1
    return steps * batch * length * per_token / (time.perf_counter() - started)


def main() -> None:
    """Read the arguments of `measure`, with a list of models, from the command line; print {model: FLOP/s}."""
    request = json.loads(sys.argv[1])
    models = request.pop("models")
    try:
        print(json.dumps({model: measure(model, **request) for model in models}))
    except UserError as error:  # the definition combines what cannot be trained
        print(error, file=sys.stderr)
        sys.exit(ExitCode.USER_ERROR)


if __name__ == "__main__":
    main()
