"""Weighted mixtures: exact in every block, the same at any world size, found in O(1), recorded as they were read."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.masked import taken_apart

from dlm.core.configs import load_choice
from dlm.core.errors import UserError
from dlm.data.manifest import BLOCK_SAMPLES, apportion, read_data, read_manifest
from dlm.data.mixture import Mixture, open_mixture, spread_rows
from dlm.data.noise import ORDER_STREAM
from dlm.data.packed import PackedTokens, encode_packed
from dlm.data.prepare.command import ensure_data, index_packed, main
from dlm.plan.definition import parse_sweep
from dlm.plan.grid import make_plan
from dlm.record.run import read_result
from dlm.train.batches import TrainingBatches, ValidationBatches
from dlm.train.objectives.masked_diffusion import MaskedDiffusion

T = 4  # tokens of a sequence
SEED = 11
WEIGHTS = {"slim": 0.693584, "star": 0.306416}  # TinyLlama's


def make_source(folder: Path, rows: int, first: int, *, vocab_size: int = 60_000, bos_id: int = 1) -> Path:
    """A prepared folder whose sequence n is T times the token first + n; some files, torn anywhere."""
    folder.mkdir(parents=True)
    tokens = np.repeat(np.arange(first, first + rows), T).astype(np.uint16)
    for number, part in enumerate(np.split(tokens, [rows * T // 3 + 1])):
        (folder / f"train_{number}.bin").write_bytes(encode_packed(part))
    (folder / "validation_0.bin").write_bytes(encode_packed(tokens[: 30 * T] + np.uint16(rows)))
    index_packed(folder, vocab_size=vocab_size, bos_id=bos_id, tokenizer="none")
    return folder


@pytest.fixture
def folders(tmp_path):
    return {"slim": make_source(tmp_path / "slim", 9000, 100), "star": make_source(tmp_path / "star", 700, 20_000)}


def node(folders, weights=WEIGHTS):
    return {
        "name": "mix",
        "sources": {name: {"data_dir": str(folders[name]), "weight": weight} for name, weight in weights.items()},
    }


def mixture(data, split="train"):
    return open_mixture(read_data(data), split, block_size=T, stride=T)


def first_tokens(tokens, samples):
    """The sequences that samples are, by their first token."""
    rows = [int(tokens.order(int(sample), 1, seed=SEED)[0]) for sample in samples]
    return tokens.rows(np.array(rows, dtype=np.int64))[:, 0]


def test_the_source_of_a_token_beyond_the_vocabulary_is_named(folders):
    both = mixture(node(folders))
    every = np.arange(len(both))
    assert np.array_equal(both.text(every), both.rows(every))
    path = folders["star"] / "train_1.bin"
    path.write_bytes(path.read_bytes()[:-2] + np.uint16(60_000).tobytes())
    both = mixture(node(folders))
    with pytest.raises(UserError, match=r"/star holds token 60000, its vocabulary has 60000: .* dlm prepare$"):
        both.text(every)


@given(
    total=st.integers(0, 10_000),
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3),
)
def test_parts_are_whole_and_within_one_of_their_share(total, weights):
    parts = apportion(total, weights)
    assert sum(parts) == total
    assert all(abs(part - total * w / sum(weights)) < 1 for part, w in zip(parts, weights, strict=True))


def test_every_block_holds_each_source_in_exactly_its_weight(folders):
    data = read_data(node(folders))
    assert {source.data_dir.name: source.samples for source in data.sources} == {"slim": 5682, "star": 2510}
    tokens = mixture(node(folders))
    orders = []
    for block in range(4):
        read = first_tokens(tokens, np.arange(block * BLOCK_SAMPLES, (block + 1) * BLOCK_SAMPLES))
        assert (np.sum(read < 20_000), np.sum(read >= 20_000)) == (5682, 2510)
        from_star = read >= 20_000
        orders.append(from_star.tobytes())
        for part in np.array_split(from_star, 16):  # and they are well mixed within it
            assert part.mean() == pytest.approx(WEIGHTS["star"], abs=5 * (0.3 * 0.7 / len(part)) ** 0.5)
    assert len(set(orders)) == 4


def test_every_epoch_of_a_source_holds_each_of_its_sequences_once(folders):
    tokens = mixture(node(folders))
    read = first_tokens(tokens, np.arange(3 * BLOCK_SAMPLES))
    for first, rows in ((20_000, 700), (100, 9000)):
        mine = read[(read >= first) & (read < first + rows)] - first
        epochs = [mine[start : start + rows] for start in range(0, len(mine), rows)]
        assert all(sorted(epoch) == list(range(rows)) for epoch in epochs[:-1])
        assert len({epoch.tobytes() for epoch in epochs}) == len(epochs) == -(-len(mine) // rows)


def test_any_sample_is_found_without_those_before_it(folders):
    tokens = mixture(node(folders))
    whole = first_tokens(tokens, np.arange(2 * BLOCK_SAMPLES + 100))
    for start in (0, 1, 8190, BLOCK_SAMPLES, 16_400):
        assert np.array_equal(first_tokens(tokens, np.arange(start, start + 50)), whole[start : start + 50])
    at_once = tokens.rows(tokens.order(0, len(whole), seed=SEED))[:, 0]
    assert np.array_equal(at_once, whole)
    shuffled = np.random.default_rng(0).permutation(len(whole))
    assert np.array_equal(first_tokens(tokens, shuffled), whole[shuffled])
    far = 10**12
    assert (
        first_tokens(tokens, [far, far + 1]).tolist() == first_tokens(mixture(node(folders)), [far, far + 1]).tolist()
    )


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_ranks_together_read_the_same_at_any_world_size(world_size, folders):
    tokens, objective = mixture(node(folders)), MaskedDiffusion(vocab_size=60_000)
    alone = TrainingBatches(tokens, objective, seed=SEED, batch_size=64, micro_batch_size=64, rank=0, world_size=1)
    for micro in (1, 8):
        parts = 64 // world_size // micro
        ranks = [
            TrainingBatches(
                tokens, objective, seed=SEED, batch_size=64, micro_batch_size=micro, rank=rank, world_size=world_size
            )
            for rank in range(world_size)
        ]
        for step in (0, 127, 300):
            read = np.concatenate([rank[step * parts + part]["tokens"] for rank in ranks for part in range(parts)])
            assert np.array_equal(read, alone[step]["tokens"])


def test_the_weights_of_sources_change_the_hash_and_names_and_places_do_not(folders, tmp_path):
    data = node(folders)
    turned = {**data, "sources": dict(reversed(data["sources"].items()))}
    hashes = [read_data(data).hash, tuple(first_tokens(mixture(data), np.arange(500)).tolist())]
    (tmp_path / "elsewhere").mkdir()
    moved = {
        name: folder.rename(tmp_path / "elsewhere" / new)
        for (name, folder), new in zip(folders.items(), "ba", strict=True)  # sorted the other way round
    }
    for weights in (WEIGHTS, {key: 7 * value for key, value in WEIGHTS.items()}):
        same = node(moved, weights)
        hashes.append(read_data(same).hash)
        samples = first_tokens(mixture(same), np.arange(500))
        hashes.append(tuple(samples.tolist()))
    assert hashes[:2] == hashes[2:4] == hashes[4:]
    for folder, name in ((moved["slim"], "slim"), (moved["star"], "star")):
        folder.rename(folders[name])
    assert read_data(turned).hash == read_data(data).hash == hashes[0]
    assert tuple(first_tokens(mixture(turned), np.arange(500)).tolist()) == hashes[1]
    assert read_data(node(folders, {"slim": 0.6, "star": 0.4})).hash != hashes[0]


def test_a_source_is_read_in_one_order_whatever_it_is_mixed_with(folders, tmp_path):
    """Another weight or source changes where a source's samples stand, not which sequence is its n-th."""
    more = {**folders, **{str(n): make_source(tmp_path / str(n), 50, 50_000 + 100 * n) for n in range(4)}}
    orders = []
    for weights in ({"slim": 1, "star": 1}, {"slim": 1, "star": 3, "0": 1}, {"star": 3, "1": 1, "2": 1, "3": 1}):
        read = first_tokens(mixture(node(more, weights)), np.arange(9000))
        orders.append(read[(read >= 20_000) & (read < 50_000)][:4000].tolist())
    assert (
        orders[0] == orders[1] == orders[2]
        and len(set(orders[0])) == 700
        and orders[0][:700] != sorted(orders[0][:700])
    )


def test_one_source_alone_reads_as_it_always_did(folders):
    """A weight of zero leaves the other with its own hash and order, and is not even looked at."""
    data = node({**folders, "star": folders["star"] / "gone"}, {"slim": 0.7, "star": 0})
    single = {"name": "slim", "data_dir": str(folders["slim"])}
    assert read_data(data).hash == read_data(single).hash == read_manifest(folders["slim"]).hash
    tokens = PackedTokens(sorted(folders["slim"].glob("train*.bin")), block_size=T, stride=T)
    expected = first_tokens(Mixture([tokens], [BLOCK_SAMPLES], [ORDER_STREAM]), np.arange(20_000))
    assert np.array_equal(first_tokens(mixture(data), np.arange(20_000)), expected)
    with pytest.raises(UserError, match=r"no prepared data in .*gone"):
        ensure_data(node({**folders, "star": folders["star"] / "gone"}))


def test_the_samples_that_were_read_are_counted_exactly(folders):
    tokens = mixture(node(folders))
    for count in (0, 1, 700, 8191, 8192, 20_000):
        read = first_tokens(tokens, np.arange(count))
        parts = [read[read < 20_000], read[read >= 20_000]]
        assert sorted(tokens.samples_read(count, seed=SEED)) == sorted(map(len, parts))
        assert tokens.unique_tokens(count, seed=SEED) == T * len(np.unique(read))
        passes = max(len(part) / rows for part, rows in zip(parts, (9000, 700), strict=True))
        assert tokens.epochs(count, seed=SEED) == pytest.approx(passes)
    planned = read_data(node(folders)).epochs(20 * BLOCK_SAMPLES * T)
    assert planned == pytest.approx(tokens.epochs(20 * BLOCK_SAMPLES, seed=SEED)) == pytest.approx(20 * 2510 / 700)


def test_the_validation_sequences_are_divided_by_weight_and_fixed(folders):
    tokens = mixture(node(folders), "validation")
    objective = MaskedDiffusion(vocab_size=60_000)

    def read(world_size):
        parts = [
            ValidationBatches(tokens, objective, seed=1, num_sequences=20, draws=2, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        return np.concatenate([taken_apart(batch)["tokens"] for part in parts for batch in part])

    alone = read(1)
    assert (np.sum(alone[:, 0] < 20_000), np.sum(alone[:, 0] >= 20_000)) == (2 * 14, 2 * 6)
    assert len(np.unique(alone[:, 0])) == 20 and np.array_equal(read(3), alone)
    assert len(tokens.validation_rows(80)) == 30 + 25  # slim has only 30 of its 55
    assert spread_rows(10, 0).tolist() == []


def test_a_sequence_spans_files_and_maps_are_given_back(folders, monkeypatch):
    paths = sorted(folders["slim"].glob("train*.bin"))
    tokens = PackedTokens(paths, block_size=T, stride=T)
    whole = tokens.rows(np.arange(9000))
    assert len(tokens) == 9000 and np.array_equal(whole[:, 0], np.arange(100, 9100))
    assert (whole == whole[:, :1]).all()
    monkeypatch.setattr("dlm.data.packed.MAX_OPEN", 1)
    few = PackedTokens(paths, block_size=T, stride=T)
    assert np.array_equal(few.rows(np.array([2999, 3000, 1, 8999, 3001])), whole[[2999, 3000, 1, 8999, 3001]])
    assert len(few._opened) == 1


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"slim": -1, "star": 1}, ["data.sources.slim.weight is -1", "at least 0"]),
        ({"slim": "much", "star": 1}, ["data.sources.slim.weight is 'much'", "number"]),
        ({"slim": float("nan"), "star": 1}, ["data.sources.slim.weight is nan"]),
        ({"slim": True, "star": 1}, ["data.sources.slim.weight is True"]),
        ({"slim": 0, "star": 0}, ["every weight of slim, star is 0"]),
        ({"slim": 1, "star": 1e-9}, ["star", "less than half a sample in 8192"]),
    ],
)
def test_weights_that_make_no_mixture_are_named(weights, words, folders):
    with pytest.raises(UserError) as error:
        read_data(node(folders, weights))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_sources_that_do_not_fit_together_are_named(folders, tmp_path):
    for name, options, word in (("other", {"vocab_size": 50_999}, "vocab_size"), ("bos", {"bos_id": 2}, "bos_id")):
        folders[name] = make_source(tmp_path / name, 40, 400, **options)
        with pytest.raises(UserError, match=word):
            read_data(node(folders, {"slim": 1, name: 1}))
    twice = make_source(tmp_path / "twice", 700, 20_000)
    for again in (twice, folders["star"]):
        with pytest.raises(UserError, match="add their weights"):
            read_data(node({"star": folders["star"], "again": again}, {"star": 1, "again": 1}))
    with pytest.raises(UserError, match=r"data\.sources\.slim is 3"):
        read_data({"name": "mix", "sources": {"slim": 3}})


def test_one_folder_can_hold_both_as_tinyllama_keeps_them(tmp_path, capsys):
    for name, first in (("train_slim_0", 0), ("train_slim_1", 50), ("train_star_0", 200), ("validation_0", 300)):
        tokens = np.arange(first, first + 50).astype(np.uint16)
        (tmp_path / "both" / f"{name}.bin").parent.mkdir(exist_ok=True)
        (tmp_path / "both" / f"{name}.bin").write_bytes(encode_packed(tokens))
    for name, out in (("slim", "slim_pajama"), ("star", "starcoder")):
        index = (
            "packed",
            str(tmp_path / "both"),
            "--train",
            f"train_{name}*.bin",
            "--out",
            str(tmp_path / "data" / out),
        )
        assert main(list(index)) == 0
        assert main(list(index)) == 2 and "holds prepared data already" in capsys.readouterr().err
    tokens = mixture(node({"slim": tmp_path / "data/slim_pajama", "star": tmp_path / "data/starcoder"}))
    read = tokens.rows(np.arange(len(tokens)))
    assert sorted(read.ravel().tolist()) == [*range(100), *range(200, 248)]
    assert not (tmp_path / "both" / "manifest.json").exists()
    assert main(["packed", str(tmp_path / "both"), "--train", "train_none*.bin"]) == 2


def test_the_shipped_mixture_has_tinyllamas_weights():
    shipped = load_choice("data", "slim_star")
    assert {name: source["weight"] for name, source in shipped["sources"].items()} == WEIGHTS


@pytest.fixture
def two_texts(stdlib_data, tmp_path, monkeypatch):
    """DLM_DATA with two sources of bytes where slim_star looks for them."""
    monkeypatch.setenv("DLM_DATA", str(tmp_path / "data"))
    for name, seed in (("slim_pajama", 0), ("starcoder", 1)):
        random = np.random.default_rng(seed)
        texts = ["".join(random.choice(list("abcdefgh "), 900)) for _ in range(40 if seed else 200)]
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        out = str(tmp_path / "data" / name)
        assert main(["text", str(source), "--out", out, "--tokenizer", "bytes", "--validation-share", "0.2"]) == 0


SETTINGS = ("data=slim_star", "model=4k", "data.block_size=32", "data.stride=32", "data.batch_size=8",
            "data.num_workers=0", "experiment=debug", "logger=none", "validation.draws=2")  # fmt: skip


def test_a_run_on_a_mixture_records_what_it_read(launch, two_texts, workdir):
    def ran(sweep, *overrides):
        ended = launch(*SETTINGS, "training.steps=100", "validation.times=1", f"sweep={sweep}", *overrides)
        assert ended.code == 0, ended.err
        (run_dir,) = (workdir / sweep / "runs").iterdir()
        return read_result(run_dir)

    both, alone = ran("both"), ran("alone", "data.sources.star.weight=0")
    held = read_manifest(workdir.parent / "data" / "starcoder").tokens("train") // 32
    data = read_data({"data_dir": workdir.parent / "data" / "slim_pajama"})
    assert alone.data_hash == data.hash != both.data_hash and alone.cell_id != both.cell_id
    assert both.epochs == pytest.approx(800 * WEIGHTS["star"] / held, rel=0.1)
    assert alone.epochs == pytest.approx(800 * 32 / data.sources[0].manifest.tokens("train"), rel=0.01)
    assert both.tokens == 100 * 8 * 32 and both.unique_tokens <= both.tokens
    for weight in ("-1", "much"):
        ended = launch(*SETTINGS, f"data.sources.star.weight={weight}")
        assert f"data.sources.star.weight is {weight}" in ended.complaint.replace("'", "")


def test_a_plan_prices_a_mixture_by_its_most_repeated_source(two_texts, tmp_path):
    def planned(**changes):
        content = {
            "name": "mix", "budgets": [1e10], "convention": "full_masked_head", "models": ["4k"], "max_epochs": 1e6,
            "groups": {"data": "slim_star", "trainer": "cpu"}, "hardware": {"device": "cpu", "gpus_per_node": 0},
            "set": {"data.block_size": 128, "data.batch_size": 8, **changes.pop("set", {})}, **changes,
        }  # fmt: skip
        return make_plan(parse_sweep(content, "mix.yaml"))

    plan = planned()
    star = read_manifest(tmp_path / "data" / "starcoder").tokens("train")
    (cell,) = plan.cells
    assert cell.epochs == pytest.approx(cell.tokens * 2510 / 8192 / star)
    with pytest.raises(UserError, match="above max_epochs"):
        planned(max_epochs=cell.epochs / 2)
    (without,) = planned(set={"data.sources.star.weight": 0}).cells
    slim = read_manifest(tmp_path / "data" / "slim_pajama")
    assert without.epochs == pytest.approx(without.tokens / slim.tokens("train"))
    varied = planned(vary={"data.sources.star.weight": [0, 0.1, 0.3]})
    assert len({cell.cell_id for cell in varied.cells}) == 3 and varied.data_hash is not None
    assert without.cell_id in {cell.cell_id for cell in varied.cells}
    (tmp_path / "data" / "starcoder").rename(tmp_path / "away")
    assert planned(set={"data.sources.star.weight": 0}).cells[0].cell_id == without.cell_id
    assert planned().data_hash is None and planned().cells[0].epochs is None
