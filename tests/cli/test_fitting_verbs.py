"""The verb reconcile, and what `dlm fit` says of other counts of N and C."""

import json
import sys

import pytest
from support.counted_runs import counted_runs
from typer.testing import CliRunner

from dlm.cli import verbs


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        counted_runs(sigma=0.003, seed=seed).to_csv(f"{name}.csv", index=False)


def dlm(*arguments):
    ended = CliRunner().invoke(verbs.app, list(arguments))
    assert ended.exit_code == 0, (ended.output, ended.exception)
    return ended.output


def test_reconcile_prints_text_or_json(tables):
    common = ("reconcile", "one.csv", "two.csv", "--form", "isoflop", "--bootstrap", "60")
    assert "rest, between the sets" in dlm(*common)
    shown = json.loads(dlm(*common, "--json"))
    assert [one["label"] for one in shown["sets"]] == ["one", "two"]
    assert {cell["N"] for cell in shown["cells"] if cell["common"]} == {"blocks", "with_embeddings"}
    assert set(shown["parts"]["a"]) == {"convention", "form", "noise", "rest"}


def test_fit_prints_the_exponents_under_other_counts(tables):
    common = ("fit", "one.csv", "--law", "isoflop", "--bootstrap", "0")
    assert "a and b under other counts of N (rows) and C (columns):" in dlm(*common, "--verbose")
    shown = json.loads(dlm(*common, "--json"))["conventions"]
    assert {row["N"] for row in shown["exponents"]} == {"blocks", "with_embeddings"}
    assert any(line.startswith("invariant: b of isoFLOP curves") for line in shown["meaning"])


def test_fit_answers_in_ten_lines_and_verbose_gives_the_rest(tables):
    common = ("fit", "one.csv", "--law", "isoflop", "--bootstrap", "0")
    lines, whole = dlm(*common).splitlines(), dlm(*common, "--verbose").splitlines()
    assert len(lines) <= 10 < len(whole) and max(map(len, lines)) <= 80
    assert lines[0] == whole[0] and lines[-1].endswith(": --verbose")


def test_predict_answers_in_ten_lines_too(tables):
    common = ("predict", "one.csv", "--law", "chinchilla", "--bootstrap", "100", "--at", "1e21")
    lines, whole = dlm(*common).splitlines(), dlm(*common, "--verbose").splitlines()
    assert len(lines) <= 10 < len(whole)
    assert [line.split()[0] for line in lines if line.startswith("1e21")] == ["1e21"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["one.csv"], "reconcile compares two sets of runs or more, and there is one, one: give another"),
        (["one.csv", "one.csv"], "one.csv is given twice"),
        (["one.csv", "two.csv", "--form", "cubic"], "form 'cubic'"),
        (["one.csv", "two.csv", "--bootstrap", "3"], "replicates is 3"),
        (["one.csv", "absent.csv"], "no file absent.csv"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tables, monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["dlm", "reconcile", *words])
    with pytest.raises(SystemExit) as stop:
        verbs.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("dlm: ") and said in line
