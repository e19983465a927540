"""Noise and data order: functions of seed and global sample index, and of nothing else; and random enough."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.masked import taken_apart

from dlm.core.errors import UserError
from dlm.data.manifest import BLOCK_SAMPLES
from dlm.data.mixture import Mixture, spread_rows
from dlm.data.noise import ORDER_STREAM, permute, stratified_t, uniforms, van_der_corput
from dlm.data.packed import PackedTokens, encode_packed
from dlm.train import batches
from dlm.train.batches import FromOffset, PackedDataModule, TrainingBatches, ValidationBatches
from dlm.train.objectives.autoregressive import Autoregressive
from dlm.train.objectives.masked_diffusion import MaskedDiffusion, capacity

T, ROWS, BATCH = 16, 100, 16
DIFFUSION = MaskedDiffusion(vocab_size=256)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "train_0.bin"
    path.write_bytes(encode_packed(np.random.default_rng(0).integers(0, 256, ROWS * T).astype(np.uint8)))
    return Mixture([PackedTokens([path], block_size=T, stride=T)], [BLOCK_SAMPLES], [ORDER_STREAM])


def global_batches(tokens, *, micro, world_size, steps, seed=7, first_step=0):
    """The global batches as they come together from all ranks and micro-batches, in the order of the ranks."""
    ranks = [
        TrainingBatches(tokens, DIFFUSION, seed=seed, batch_size=BATCH, micro_batch_size=micro, rank=rank,
                        world_size=world_size)
        for rank in range(world_size)
    ]  # fmt: skip
    parts = BATCH // micro // world_size
    split = [
        [taken_apart(rank[step * parts + part]) for rank in ranks for part in range(parts)]
        for step in range(first_step, steps)
    ]
    return [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in split]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_the_draws_do_not_depend_on_topology_or_restart(micro, world_size, tokens):
    whole = global_batches(tokens, micro=BATCH, world_size=1, steps=9)
    split = global_batches(tokens, micro=micro, world_size=world_size, steps=9)
    later = global_batches(tokens, micro=micro, world_size=world_size, steps=9, first_step=5)
    for a, b in zip(whole + whole[5:], split + later, strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in a)
    assert len({batch["mask"].tobytes() for batch in whole}) == len({batch["weight"].tobytes() for batch in whole}) == 9
    other = global_batches(tokens, micro=BATCH, world_size=1, steps=1, seed=8)[0]
    assert all(not np.array_equal(other[key], whole[0][key]) for key in other)


def test_an_epoch_holds_every_sequence_once_and_the_next_another_order(tokens):
    batches = global_batches(tokens, micro=4, world_size=2, steps=2 * ROWS // BATCH + 1)
    read = np.concatenate([batch["tokens"] for batch in batches])[: 2 * ROWS]
    everything = tokens.rows(np.arange(ROWS))
    first, second = ([row.tobytes() for row in part] for part in (read[:ROWS], read[ROWS:]))
    assert sorted(first) == sorted(second) == sorted(row.tobytes() for row in everything)
    assert first != second and first != [row.tobytes() for row in everything]


def test_the_masked_share_is_p(tokens):
    batches = global_batches(tokens, micro=BATCH, world_size=1, steps=400)
    p_of_steps = [0.999 * stratified_t(7, step, np.arange(BATCH)) + 1e-3 for step in range(len(batches))]
    for batch, p in zip(batches, p_of_steps, strict=True):
        some = batch["mask"].any(axis=1)
        assert batch["weight"][some] == pytest.approx(1 / (p[some] * T))
    mask, p = np.concatenate([batch["mask"] for batch in batches]), np.concatenate(p_of_steps)
    assert mask.mean() == pytest.approx(p.mean(), abs=4 * float((p * (1 - p)).mean() / mask.size) ** 0.5)
    assert p.mean() == pytest.approx(0.5005, abs=0.002)
    spread = np.array([p.mean() for p in p_of_steps]).std()
    assert spread < 0.01 * np.sqrt(1 / 12 / BATCH)  # of independent draws; pairs t, 1 - t have one mean


def test_t_and_uniforms_are_uniform():
    t = np.concatenate([stratified_t(3, step, np.arange(1)) for step in range(4000)])
    assert stats.kstest(t, "uniform").pvalue > 0.01
    late = np.concatenate([stratified_t(3, step, np.array([13])) for step in range(4000)])  # each place by itself
    assert stats.kstest(late, "uniform").pvalue > 0.01
    drawn = uniforms(3, 0, 300, 130)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 0.01
    for axis in (0, 1):  # neighbours in a row and in a column know nothing of each other
        a, b = np.delete(drawn, -1, axis).ravel(), np.delete(drawn, 0, axis).ravel()
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(a.size)


@given(seed=st.integers(0, 2**63), step=st.integers(0, 2**40), block=st.integers(0, 100), bits=st.integers(1, 8))
def test_every_power_of_two_block_of_t_is_stratified_in_pairs(seed, step, block, bits):
    size = 2**bits
    t = stratified_t(seed, step, np.arange(block * size, (block + 1) * size))
    assert (t >= 0).all() and (t < 1).all()
    assert ((t[::2] + t[1::2] - 1) * (t[::2] > 0)) == pytest.approx(0, abs=1e-12)
    for half in (t[::2], t[1::2]):
        gaps = np.diff(np.sort(np.concatenate([half, [half.min() + 1]])))
        assert gaps == pytest.approx(np.full(size // 2, 2 / size), abs=1e-9)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 8, 16, 32])
def test_a_micro_batch_hardly_ever_has_more_masked_than_its_capacity(batch):
    length, draws = 256, 2000
    slots = capacity(batch, length, eps=1e-3)
    masked = [
        (uniforms(7, step * batch, batch, length) < 0.999 * stratified_t(7, step, place)[:, None] + 1e-3).sum()
        for step, place in ((k, np.arange(k % 5 * batch, (k % 5 + 1) * batch)) for k in range(draws))
    ]
    assert sum(count > slots for count in masked) <= 1
    if batch % 2 == 0:  # and no room is wasted: half the text, and a little
        assert slots < batch * length / 2 + 5 * np.sqrt(batch * length / 4) + 16
        assert np.std(masked) < 1.1 * np.sqrt(batch * length / 4)  # no more than the masks' own chance


def test_van_der_corput_is_the_reversed_binary_number():
    expected = [int(f"{index:016b}"[::-1], 2) / 2**16 for index in range(1000)]
    assert van_der_corput(np.arange(1000)).tolist() == expected


@given(seed=st.integers(0, 2**63), first=st.integers(0, 2**50), rows=st.integers(1, 5), count=st.integers(1, 9),
       skip=st.integers(0, 4))  # fmt: skip
def test_a_row_of_uniforms_is_the_same_whichever_call_draws_it(seed, first, rows, count, skip):
    skip = min(skip, rows - 1)
    assert np.array_equal(uniforms(seed, first, rows, count)[skip:], uniforms(seed, first + skip, rows - skip, count))


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**32))
def test_permute_is_a_bijection(size, seed, epoch):
    sent = permute(np.arange(size), size, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(sent), np.arange(size))
    place = size // 2
    assert permute(np.array([place]), size, seed=seed, epoch=epoch) == sent[place]  # alone as in a crowd


def test_permutations_look_random():
    size, runs = 24, 3000
    sent = np.stack([permute(np.arange(size), size, seed=1, epoch=epoch) for epoch in range(runs)])
    counts = np.stack([np.bincount(sent[:, place], minlength=size) for place in range(size)])
    chi2 = ((counts - runs / size) ** 2 / (runs / size)).sum()  # rows and columns of the table are fixed
    assert 0.001 < stats.chi2.cdf(chi2, (size - 1) ** 2) < 0.999
    big = permute(np.arange(10_000), 10_000, seed=2, epoch=0)
    assert abs(np.corrcoef(big, np.arange(10_000))[0, 1]) < 0.04
    assert (np.diff(big) == 1).mean() < 0.002


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_validation_set_and_its_noise_are_fixed(world_size, tokens):
    def batches(objective, world, rank):
        return ValidationBatches(tokens, objective, seed=1234, num_sequences=30, draws=4, rank=rank, world_size=world)

    for objective, draws in ((DIFFUSION, 4), (Autoregressive(bos_id=0), 1)):
        whole = list(batches(objective, 1, 0))
        parts = [part for rank in range(world_size) for part in batches(objective, world_size, rank)]
        assert all(part["draws"] == draws for part in parts)
        sequence = np.concatenate([part["sequence"] for part in parts])
        assert np.array_equal(sequence, np.arange(30))
        whole, parts = ([taken_apart(part) if "index" in part else part for part in some] for some in (whole, parts))
        for key in whole[0].keys() - {"draws", "sequence"}:
            a, b = (np.concatenate([np.asarray(part[key]) for part in some]) for some in (whole, parts))
            assert np.array_equal(a, b) and len(a) == 30 * draws
        texts = np.concatenate([part["tokens"] for part in parts]).reshape(30, draws, T)
        assert (texts == texts[:, :1]).all()
        assert np.array_equal(texts[:, 0], tokens.rows(spread_rows(ROWS, 30)))


@pytest.mark.parametrize("sequences", [8, 30, 31, 33])
def test_every_rank_validates_equally_often(sequences, tokens, monkeypatch):
    monkeypatch.setattr(batches, "VALIDATION_TOKENS", 4 * T)  # one sequence of four draws at a time

    def sequences_of(rank):
        ranked = ValidationBatches(tokens, DIFFUSION, seed=1, num_sequences=sequences, draws=4, rank=rank, world_size=8)
        return [int(number) for part in ranked for number in part["sequence"]]

    ranks = [sequences_of(rank) for rank in range(8)]
    assert len({len(rank) for rank in ranks}) == 1
    assert set().union(*ranks) == set(range(sequences))
    assert all(len(set(a) & set(b)) == 0 for a, b in itertools.combinations(ranks, 2))


def test_more_devices_than_validation_sequences_are_refused(tokens):
    with pytest.raises(UserError, match=r"3 validation sequences for 4 devices: raise validation\.num_sequences"):
        ValidationBatches(tokens, DIFFUSION, seed=1, num_sequences=3, draws=2, rank=0, world_size=4)


@given(available=st.integers(1, 10**9), wanted=st.integers(1, 2000))
def test_validation_sequences_are_distinct_and_evenly_spread(available, wanted):
    rows = spread_rows(available, wanted)
    assert len(rows) == min(available, wanted) and rows[0] == 0 and rows[-1] < available
    gaps = np.diff(rows)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_for_a_gpu_are_pinned(device, tokens):
    data = object.__new__(PackedDataModule)
    data.objective, data.recipe = DIFFUSION, SimpleNamespace(global_batch_size=BATCH, steps=3)
    validation = {"seed": 1, "num_sequences": 8, "draws": 2}
    data.config = {"seed": 7, "data": {"num_workers": 0}, "validation": validation}
    data.train_tokens = data.validation_tokens = tokens
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=1, global_step=0, accumulate_grad_batches=1, strategy=strategy
    )
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.pin_memory == (device == "cuda") and loader.batch_size is None


def test_a_resumed_run_continues_to_count_samples():
    assert list(FromOffset(3, 6)) == [3, 4, 5] and len(FromOffset(3, 6)) == 6


def test_no_draw_touches_the_global_generators(tokens):
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    global_batches(tokens, micro=4, world_size=1, steps=1)
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
