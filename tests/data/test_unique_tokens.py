"""data.unique_tokens: a run reads the first sequences of a fixed order, again and again, and no others."""

import json

import numpy as np
import pytest
import test_mixture as mixtures

from dlm.core.errors import UserError
from dlm.data.manifest import Unique, read_data, read_manifest
from dlm.data.mixture import open_mixture
from dlm.data.prepare.command import main
from dlm.plan.definition import parse_sweep
from dlm.plan.grid import make_plan
from dlm.plan.needs import tokens_needed
from dlm.record.run import read_result

T, ROWS = mixtures.T, {"slim": 9000, "star": 700}


@pytest.fixture
def folders(tmp_path):
    return {
        "slim": mixtures.make_source(tmp_path / "slim", ROWS["slim"], 100),
        "star": mixtures.make_source(tmp_path / "star", ROWS["star"], 20_000),
    }


def limited(data, tokens):
    limit = Unique(tokens=tokens, block_size=T, stride=T)
    return open_mixture(data, "train", block_size=T, stride=T, unique=limit)


def test_every_seed_reads_the_same_text_and_a_smaller_limit_a_part_of_it(folders):
    data = read_data({"data_dir": str(folders["slim"])})
    read = {}
    for sequences in (50, 51, 700):
        tokens = limited(data, sequences * T + T - 1)  # rounded down to whole sequences
        first, second = tokens.order(0, sequences, seed=0), tokens.order(sequences, sequences, seed=5)
        assert len(set(first)) == sequences and set(first) == set(second) and not np.array_equal(first, second)
        read[sequences] = set(first.tolist())
        assert tokens.unique_tokens(sequences - 1, seed=3) == (sequences - 1) * T
        assert tokens.unique_tokens(9 * sequences, seed=3) == sequences * T
        assert tokens.epochs(9 * sequences, seed=3) == 9
        limit = Unique(tokens=sequences * T, block_size=T, stride=T)
        assert data.epochs(9 * sequences * T, unique=limit) == 9
    assert read[50] < read[51] < read[700]
    places = np.array(sorted(read[700])) / ROWS["slim"]  # spread over the whole training text, not its beginning
    assert abs(places.mean() - 0.5) < 0.05 and places.max() > 0.99
    assert sorted(limited(data, ROWS["slim"] * T).order(0, ROWS["slim"], seed=0)) == [*range(ROWS["slim"])]


def test_a_mixture_divides_the_unique_text_by_its_weights(folders):
    data = read_data(mixtures.node(folders))
    tokens = limited(data, 1000 * T)
    assert sorted(tokens.limits) == [306, 694]
    read = tokens.rows(tokens.order(0, 20_000, seed=0))[:, 0]
    assert len(np.unique(read[read < 20_000])) == 694 and len(np.unique(read[read >= 20_000])) == 306
    unlimited = open_mixture(data, "train", block_size=T, stride=T)
    assert not np.array_equal(read, unlimited.rows(unlimited.order(0, 20_000, seed=0))[:, 0])


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (T - 1, f"data.unique_tokens is {T - 1}, less than one sequence of {T} tokens from "),
        (
            (ROWS["slim"] + 1) * T,
            f"its training split has {ROWS['slim'] * T} in whole sequences: lower data.unique_tok",
        ),
    ],
)
def test_too_little_and_too_much_unique_text_are_refused_in_one_line(folders, tokens, words):
    with pytest.raises(UserError) as error:
        limited(read_data({"data_dir": str(folders["slim"])}), tokens)
    assert words in str(error.value) and "\n" not in str(error.value) and str(folders["slim"]) in str(error.value)


@pytest.fixture
def text_data(tmp_path, monkeypatch):
    """Prepared bytes, where data=stdlib looks for them."""
    monkeypatch.setenv("DLM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path / "workdir"))
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdefgh "), 900)) for _ in range(120)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = tmp_path / "data" / "stdlib"
    assert main(["text", str(source), "--out", str(folder), "--tokenizer", "bytes", "--validation-share", "0.2"]) == 0
    return read_manifest(folder)


def planned(**changes):
    content = {
        "name": "repeated", "budgets": [1e10], "convention": "full_masked_head", "models": ["4k"],
        "groups": {"data": "stdlib", "trainer": "cpu"}, "hardware": {"device": "cpu", "gpus_per_node": 0},
        "set": {"data.block_size": 128, "data.batch_size": 8, "optimizer.lr": 1e-3}, "max_epochs": 1e6, **changes,
    }  # fmt: skip
    return parse_sweep(content, "repeated.yaml")


def test_a_plan_counts_epochs_of_the_unique_text_and_other_ids_stay(text_data):
    usual, few = make_plan(planned()), make_plan(planned(vary={"data.unique_tokens": [None, 12_800, 2.56e4]}))
    epochs = [cell.epochs for cell in few.cells]
    tokens = usual.cells[0].tokens
    assert epochs == pytest.approx([tokens / text_data.tokens("train"), tokens / 12_800, tokens / 25_600])
    assert few.cells[0].cell_id == usual.cells[0].cell_id and len({cell.cell_id for cell in few.cells}) == 3
    limited_plan = make_plan(planned(vary={"data.unique_tokens": [12_800, None]}, max_epochs=5))
    assert [cell.cell_id for cell in limited_plan.cells] == [usual.cells[0].cell_id]
    assert "epochs of the data, above max_epochs 5" in limited_plan.dropped[0]["reason"]
    (need,) = tokens_needed(planned(vary={"data.unique_tokens": [12_800, 25_600]}))
    assert need.tokens == 25_600
    with pytest.raises(UserError, match=r"data.unique_tokens is 100000000, which takes 100000000 tokens of .* has "):
        make_plan(planned(set={"data.unique_tokens": 1e8, "optimizer.lr": 1e-3, "data.batch_size": 8}))
    with pytest.raises(UserError, match=r"data.unique_tokens is 0\.5: it must be a whole number of at least 1"):
        make_plan(planned(set={"data.unique_tokens": 0.5, "optimizer.lr": 1e-3, "data.batch_size": 8}))


def test_a_run_trains_on_its_unique_text_only_and_records_it(launch, text_data, workdir):
    settings = ("data=stdlib", "model=4k", "data.block_size=32", "data.stride=32", "data.batch_size=8",
                "experiment=debug", "logger=none", "validation.draws=2", "training.steps=40")  # fmt: skip
    ended = launch(*settings, "validation.times=1", "sweep=few", "data.unique_tokens=1000")
    assert ended.code == 0, ended.err
    (run_dir,) = (workdir / "few" / "runs").iterdir()
    result = read_result(run_dir)
    assert result.unique_tokens == 992 and result.epochs == pytest.approx(40 * 8 / 31)
