"""docs/troubleshooting.md quotes messages of dlm as they stand in the source, and as a user gets them."""

import ast
import re
from functools import cache

import pandas as pd
import pytest
from support import ROOT
from support.markdown import Page
from typer.testing import CliRunner

from dlm.cli.verbs import app

PAGE = Page(ROOT / "docs" / "troubleshooting.md")
QUOTED = re.findall(r"^\| `(.+?)` \|", PAGE.prose, flags=re.MULTILINE)
GAP = "..."  # stands for a value, in the page and in the messages below
VALUE = "\N{REPLACEMENT CHARACTER}"


def message(node: ast.AST) -> str:
    """The text of a string or f-string, with VALUE in place of each value that is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(message(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else VALUE


@cache
def messages() -> tuple[str, ...]:
    """Every string of dlm and its tools but the docstrings, and every line of the Makefile."""
    found = (ROOT / "Makefile").read_text().splitlines()
    for path in sorted([*(ROOT / "dlm").rglob("*.py"), *(ROOT / "tools").glob("*.py")]):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
        strings = (node for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr))
        found += [message(node) for node in strings if id(node) not in alone]
    return tuple(dict.fromkeys(found))


def is_message(quoted: str) -> bool:
    """Whether a string of the source has the constant parts of `quoted`, in their order."""
    longest, wanted = max(quoted.split(GAP), key=len), pattern(quoted)
    return any(longest in text and wanted.search(text) for text in messages())


def pattern(quoted: str) -> re.Pattern[str]:
    """A regular expression for a message of the page, in which a gap stands for any text."""
    return re.compile(".*".join(map(re.escape, quoted.split(GAP))), flags=re.DOTALL)


def test_the_page_has_forty_messages_or_more_and_none_twice():
    assert len(QUOTED) == len(set(QUOTED)) >= 40


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_in_the_source(quoted):
    assert len(re.sub(r"[^a-z]", "", quoted.replace(GAP, ""))) >= 9, "too little is left to be a message"
    assert is_message(quoted)


def grid(*, budgets=(1e15, 1e16, 1e17), sizes=(1e6, 2e6, 4e6, 8e6, 16e6), **columns) -> pd.DataFrame:
    """Runs of a law that falls with size and tokens, at every size and budget, with further columns."""
    rows = [(n, c / 6 / n, c) for c in budgets for n in sizes]
    frame = pd.DataFrame(rows, columns=["params", "tokens", "budget"])
    return frame.assign(loss=1.5 + 400 / frame.params**0.34 + 400 / frame.tokens**0.28, **columns)


def checkpoints() -> pd.DataFrame:
    """The checkpoints of three runs, at every 1.3 times the tokens, without a column that names the run."""
    runs = pd.DataFrame([(n, 1e7 * 1.3**k) for n in (1e6, 3e6, 11e6) for k in range(9)], columns=["params", "tokens"])
    return runs.assign(loss=1.5 + 400 / runs.params**0.34 + 400 / runs.tokens**0.28)


def of_one_ratio() -> pd.DataFrame:
    return grid()[:8].assign(params=lambda runs: 1e6 * 2.0**runs.index, tokens=lambda runs: 20 * runs.params)


TABLES = {  # what is wrong in a table, and how the message begins that it causes, as on the page
    "all runs cost nearly the same C": grid(budgets=(1e16,)),
    "the runs have several objectives": pd.concat([grid(objective="a"), grid(objective="b")]),
    "the runs count FLOPs in several conventions": grid(flops=1e16, convention=["6n", "full", *["6n"] * 13]),
    "... has no run with status 'done'": grid(status="running"),
    "no surface fits": grid().assign(loss=lambda runs: 2 + runs.params / 1e7 + runs.tokens / 1e10),
    "... rows look like checkpoints": checkpoints(),
    "all runs have nearly one ratio": of_one_ratio(),
    "the lowest loss is at the": grid(sizes=(1e5, 2e5, 4e5, 8e5)),
}


@pytest.mark.parametrize("begins", TABLES)
def test_a_table_that_is_wrong_gives_the_message_of_the_page(begins, tmp_path):
    (quoted,) = (one for one in QUOTED if one.startswith(begins))
    path = tmp_path / "runs.csv"
    TABLES[begins].to_csv(path, index=False)
    law = ["--law", "isoflop"] if "lowest" in begins else ["--law", "chinchilla"]
    assert pattern(quoted).search(said("fit", str(path), *law, "--bootstrap", "0", "--json"))


PLANS = {
    "...config key in the sweep definition": ["--set", "optimzer.lr=1"],
    "no cell is left of": ["--set", "budgets=[1e3]"],
    "the definition has": ["--set", "max_cells=2"],
    "... has ..., which runs code": ["--set", "+callbacks.mine._target_=os.system"],
    "... holds the plan of another definition": ["--set", "optimizer.lr=1e-3"],
}


@pytest.mark.parametrize("begins", PLANS)
def test_a_plan_that_is_wrong_gives_the_message_of_the_page(begins, tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path))
    monkeypatch.setenv("DLM_DATA", str(tmp_path / "data"))
    (quoted,) = (one for one in QUOTED if one.startswith(begins))
    said("plan", "demo")
    assert pattern(quoted).search(said("plan", "demo", *PLANS[begins]))


def said(*words: str) -> str:
    """All that a command prints and complains of, on one line."""
    ended = CliRunner().invoke(app, list(words))
    return " ".join(f"{ended.output} {ended.exception or ''}".split())
