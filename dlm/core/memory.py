"""Estimate the memory of training, and how many sequences a device computes at once. It is arithmetic only."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import Any

from dlm.core.objectives import ObjectiveInfo
from dlm.core.shape import ModelShape

GIB = 2**30
STATE_BYTES = 16  # per parameter: weights, gradient and two moments in float32
# Bytes of activations per token, layer and channel, by whether the run is compiled: measured in bf16-mixed.
ACTIVATION_BYTES = {False: 64, True: 46}
BLOCK_INPUT_BYTES = 4  # the same for a block whose other activations are computed again
FULL = ("32-true", "64-true")  # the precisions in which activations take twice as much

# Cross-entropies (dlm.train.models.cross_entropy), in bytes of float32 logits. The dense one holds three times as many
# bytes, in its backward pass. The chunked one holds at most three times a chunk, and takes about 10 % longer.
DENSE_BYTES = 2**31  # up to here, `auto` is dense
CHUNK_BYTES = 2**29
COPIES = 3

MOST_TOKENS = 2**16  # of a micro-batch; above, kernels do not get faster
SHARE = 0.8  # the share of a GPU's memory that a run may fill by this estimate


def training_bytes(
    shape: ModelShape, objective: ObjectiveInfo, trainer: Mapping[str, Any], *, tokens: int, compiled: bool
) -> float:
    """Estimate an upper limit of the training memory of a device that holds the whole model, in bytes.

    Args:
        shape: The shape of the model.
        objective: The objective, which decides at how many positions there are logits.
        trainer: The config node ``trainer``, or a part of it.
        tokens: Tokens of a micro-batch.
        compiled: Whether torch.compile is used.
    """
    state = STATE_BYTES * shape.num_params_total(causal=objective.causal)
    per_layer: float = ACTIVATION_BYTES[compiled] * (2 if trainer.get("precision") in FULL else 1)
    layers = per_layer * shape.n_layer
    if trainer.get("activation_checkpointing"):
        layers = BLOCK_INPUT_BYTES * shape.n_layer + per_layer
    least, most = _head_shares(objective)
    every_logit = 4 * tokens * shape.vocab_size
    chosen = trainer.get("cross_entropy", "auto")
    if chosen == "dense":
        held = math.inf
    else:
        held = DENSE_BYTES if chosen == "auto" and least * every_logit <= DENSE_BYTES else CHUNK_BYTES
    logits = min(most * every_logit, held)
    return state + layers * tokens * shape.n_embd + COPIES * logits


def _head_shares(objective: ObjectiveInfo) -> tuple[float, float]:
    """Return the least and the largest share of the positions of a micro-batch that have logits."""
    return (0.5, 0.6) if objective.head_share < 1 else (1.0, 1.0)


def micro_batch_limit(
    shape: ModelShape,
    objective: ObjectiveInfo,
    trainer: Mapping[str, Any],
    *,
    block_size: int,
    memory_bytes: float | None,
) -> int:
    """Return how many sequences a device computes at once at most. It changes the result of a run by rounding only.

    On a GPU, this is what fits into SHARE of its memory, and at most MOST_TOKENS. On a CPU, it depends on the size of
    the model, with the numbers of SMDM (pretrain/train_mdm.py).

    Args:
        shape: The shape of the model.
        objective: The objective.
        trainer: The config node ``trainer``, or a part of it.
        block_size: Tokens of a sequence.
        memory_bytes: The memory of the GPU; None for a CPU.
    """
    if memory_bytes is None:
        return next((n for limit, n in ((20e6, 32), (50e6, 16), (1000e6, 8)) if shape.num_params <= limit), 4)
    compiled = bool(trainer.get("compile"))
    # So many sequences at most have dense logits under `auto`, which can take more than the chunked ones of further
    # sequences. All smaller micro-batches have to fit too, because a run takes one that divides its batch.
    most_dense = max(int(DENSE_BYTES / (4 * _head_shares(objective)[0] * block_size * shape.vocab_size)), 1)

    def needed(sequences: int) -> float:
        return max(
            training_bytes(shape, objective, trainer, tokens=number * block_size, compiled=compiled)
            for number in {sequences, min(sequences, most_dense)}
        )

    candidates = range(1, max(MOST_TOKENS // block_size, 1) + 1)
    return max(bisect.bisect_right(candidates, SHARE * memory_bytes, key=needed), 1)
