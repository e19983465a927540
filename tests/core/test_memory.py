"""How many sequences a device computes at once: by the memory of a GPU, by the size of the model on a CPU."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm.core.memory import (
    CHUNK_BYTES,
    COPIES,
    DENSE_BYTES,
    GIB,
    MOST_TOKENS,
    SHARE,
    micro_batch_limit,
    training_bytes,
)
from dlm.core.objectives import OBJECTIVES
from dlm.core.shape import load_shape

DIFFUSION, CAUSAL = OBJECTIVES["masked_diffusion"], OBJECTIVES["autoregressive"]
COMPILED = {"compile": True, "precision": "auto"}


def limit(model, *, memory_gib=None, trainer=COMPILED, block_size=2048, objective=DIFFUSION):
    memory = None if memory_gib is None else memory_gib * GIB
    return micro_batch_limit(load_shape(model), objective, trainer, block_size=block_size, memory_bytes=memory)


def test_the_limits_on_a_cpu_are_those_of_smdm():
    sizes = ("19M", "34M", "48M", "66M", "944M", "1028M")
    assert [limit(size) for size in sizes] == [32, 16, 16, 8, 8, 4]


def test_larger_gpus_and_smaller_models_compute_more_sequences_at_once():
    on_80_gb = [limit(size, memory_gib=79) for size in ("6M", "170M", "472M", "1028M", "2121M")]
    assert on_80_gb == sorted(on_80_gb, reverse=True)
    assert on_80_gb[:2] == [32, 32] and on_80_gb[3] >= 8 and on_80_gb[4] >= 4
    assert [limit("170M", memory_gib=gib) for gib in (24, 44, 79, 139)] == sorted(
        limit("170M", memory_gib=gib) for gib in (24, 44, 79, 139)
    )
    assert limit("170M", memory_gib=24) < 16 < limit("472M", memory_gib=139)
    assert limit("2121M", memory_gib=16) == 1  # it is tried with one sequence, though the estimate says too much
    eager = limit("472M", memory_gib=79, trainer={"compile": False})
    assert eager < limit("472M", memory_gib=79)
    full = limit("472M", memory_gib=79, trainer={"compile": False, "precision": "32-true"})
    again = limit("472M", memory_gib=79, trainer={"compile": False, "activation_checkpointing": True})
    assert full < eager < again


@given(
    model=st.sampled_from(["8k", "6M", "85M", "472M"]),
    gib=st.floats(1, 200),
    block_size=st.sampled_from([128, 2048]),
    objective=st.sampled_from([DIFFUSION, CAUSAL]),
    cross_entropy=st.sampled_from(["auto", "dense", "chunked"]),
)
def test_what_is_chosen_fits(model, gib, block_size, objective, cross_entropy):
    trainer = {**COMPILED, "cross_entropy": cross_entropy}
    chosen = limit(model, memory_gib=gib, trainer=trainer, block_size=block_size, objective=objective)
    assert 1 <= chosen <= MOST_TOKENS // block_size
    needed = [
        training_bytes(load_shape(model), objective, trainer, tokens=count * block_size, compiled=True)
        for count in (chosen, chosen + 1)
    ]
    assert chosen == 1 or needed[0] <= SHARE * gib * GIB
    if cross_entropy != "auto" and chosen < MOST_TOKENS // block_size:
        assert needed[1] > SHARE * gib * GIB


@pytest.mark.parametrize("objective", [DIFFUSION, CAUSAL])
def test_logits_take_no_more_than_their_chunks(objective):
    shape, vocabulary = load_shape("6M"), 32_000
    twice = dataclasses.replace(shape, vocab_size=2 * vocabulary)

    def of_logits(tokens, cross_entropy="auto"):
        """The memory of a model with twice the vocabulary beyond that of one, without its parameters."""
        trainer = {**COMPILED, "cross_entropy": cross_entropy}
        one, two = (training_bytes(s, objective, trainer, tokens=tokens, compiled=True) for s in (shape, twice))
        causal = objective.causal
        return two - one - 16 * (twice.num_params_total(causal=causal) - shape.num_params_total(causal=causal))

    share = 0.6 if objective is DIFFUSION else 1.0
    few, many = 4096, 65536
    assert of_logits(few) == of_logits(few, "dense") == pytest.approx(COPIES * 4 * few * vocabulary * share)
    assert of_logits(many, "dense") == pytest.approx(COPIES * 4 * many * vocabulary * share)
    assert of_logits(many) == of_logits(many, "chunked") == 0  # no more than for half of the vocabulary
    assert 4 * many * vocabulary * share > DENSE_BYTES > CHUNK_BYTES


@given(tokens=st.integers(1, 2 * MOST_TOKENS), share=st.floats(0.5, 0.6))
def test_the_estimate_covers_the_logits_of_every_share_of_masked_tokens(tokens, share):
    shape = load_shape("6M")
    needed = training_bytes(shape, DIFFUSION, COMPILED, tokens=tokens, compiled=True)
    others = 16 * shape.num_params_total(causal=False) + 46 * tokens * shape.n_layer * shape.n_embd
    logits = 4 * int(share * tokens) * shape.vocab_size
    assert needed >= others + COPIES * (logits if logits <= DENSE_BYTES else CHUNK_BYTES) - 1


@pytest.mark.parametrize("objective", [DIFFUSION, CAUSAL])
@pytest.mark.parametrize("model", ["6M", "34M", "85M"])
def test_every_micro_batch_up_to_the_limit_fits(model, objective):
    """A run takes the largest one that divides its batch. Dense logits can take more than chunked ones of more text."""
    for gib in range(6, 49):
        for trainer in (COMPILED, {"compile": False}):
            compiled, largest = trainer["compile"], limit(model, memory_gib=gib, trainer=trainer, objective=objective)
            needed = [
                training_bytes(load_shape(model), objective, trainer, tokens=count * 2048, compiled=compiled)
                for count in range(1, largest + 1)
            ]
            assert largest == 1 or max(needed) <= SHARE * gib * GIB, (gib, compiled, largest)
