"""Tables and sentences at every width of a terminal: nothing is cut, nothing is too wide, what is missing is named."""

import os
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from dlm.cli import screen
from dlm.cli.check import Check
from dlm.cli.table import WORDS, say, show_table
from dlm.cli.verbs import main
from dlm.core.table import columns_of, laid_out, wrapped
from dlm.fit.exponents import Conventions, Exponents
from dlm.fit.layout import text_table
from dlm.record.outcomes import State
from dlm.submit.table import CellStatus, status_rows

IDS = st.from_regex(r"(mdm|ar|模型)-[0-9]{1,3}(k|M)-[1-9]e[0-9]{2}-[0-9a-f]{8}", fullmatch=True)
NUMBERS = st.one_of(
    st.integers(0, 10**9).map("{:,}".format),
    st.floats(1e-9, 1e9).map("{:.3g}".format),
    st.integers(0, 10**5).map("{:,}/100,000".format),
    st.just("-"),
)
HEADS = ("N", "tokens", "steps", "tokens/N", "budget", "error %", "time", "GPU-h", "GiB")
EXPENDABLE = ("GiB", "error %", "GPU-h", "tokens/N", "budget")
WIDTHS = st.integers(30, 200)


@st.composite
def tables(draw):
    heads = draw(st.lists(st.sampled_from(HEADS), unique=True, max_size=9))
    names = draw(st.lists(IDS, min_size=1, max_size=5, unique=True))
    return [["cell", *heads], *([name, *(draw(NUMBERS) for _ in heads)] for name in names)]


@given(tables(), WIDTHS)
@settings(max_examples=60, deadline=None)
def test_a_table_fits_every_width_with_whole_ids_and_numbers_and_names_the_columns_it_lacks(rows, width):
    layout = laid_out(rows, width, left=WORDS, expendable=EXPENDABLE)
    assert all(cell_len(line) <= width for line in layout.lines)
    words = " ".join(layout.lines).split()
    shown = [place for place, head in enumerate(rows[0]) if head not in layout.missing]
    assert set(layout.missing) <= set(EXPENDABLE) and (not layout.is_stacked or not layout.missing)
    for row in rows[1:]:
        assert all(row[place] in words for place in shown)
    if not layout.is_stacked:
        assert len(layout.lines) == len(rows)  # no row is broken
        assert layout.lines[0].split() == " ".join(rows[0][place] for place in shown).split()


@given(tables())
@settings(max_examples=50, deadline=None)
def test_columns_stay_aligned_with_wide_characters_and_a_pipe_has_all_of_them(rows):
    layout = laid_out(rows, left=WORDS, expendable=EXPENDABLE)
    assert not layout.missing and not layout.is_stacked
    ends = []
    for line, row in zip(layout.lines, rows, strict=True):
        end, places = len(row[0]), []
        for value in row[1:]:
            end = line.index(value, end) + len(value)
            places.append(cell_len(line[:end]))
        ends.append(places)
    if len(rows[0]) > 1:
        assert all(places[-1] == ends[0][-1] for places in ends)


def test_columns_are_left_out_by_their_importance_and_rows_are_stacked_last():
    rows = [["cell", "N", "steps", "GiB", "budget"], ["mdm-4k-1e10-00000000", "4.14k", "1,234", "0.25", "1e10"]]
    kinds = [(layout.missing, layout.is_stacked) for width in range(60, 20, -1)
             if (layout := laid_out(rows, width, left=WORDS, expendable=("GiB", "budget")))]  # fmt: skip
    assert list(dict.fromkeys(kinds)) == [
        ((), False), (("GiB",), False), (("GiB", "budget"), False), ((), True),
    ]  # fmt: skip
    assert laid_out(rows, 32, left=WORDS, expendable=("GiB", "budget")).lines == (
        "cell: mdm-4k-1e10-00000000",
        "  N: 4.14k  steps: 1,234",
        "  GiB: 0.25  budget: 1e10",
    )


@given(st.lists(st.text(alphabet="ab1,-/模é ", min_size=1, max_size=40), max_size=12).map(" ".join), st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_a_sentence_is_broken_between_words_and_loses_nothing(line, width):
    parts = wrapped(line, width)
    if width > 1:  # a wide character needs two columns
        assert all(columns_of(part) <= width for part in parts)
    assert "".join("".join(parts).split()) == "".join(line.split())
    if all(columns_of(word) <= width // 2 for word in line.split()):
        assert " ".join(parts).split() == line.split()  # no word is broken


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Print on a terminal of a width, and return the lines without colours."""

    def shown(width, show, *given, **named):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))
        show(*given, **named)
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return shown


FAILED = CellStatus(
    cell_id="mdm-110k-1.25e16-0a1b2c3d", state=State.OUT_OF_MEMORY, job="1234567_12", step=1234, steps=20000, loss=2.5,
    tokens_per_sec=12345.0, eta_sec=5000.0, attempts=2, steps_redone=17,
    reason="exit code 4: torch.OutOfMemoryError: /scratch/a/very/long/folder/of/some/user/with/a/log.txt 説明 " * 2,
)  # fmt: skip


@pytest.mark.parametrize("width", range(30, 201, 10))
def test_a_status_fits_every_width(terminal, width):
    sums = ["sweep: 2 cells: 1 out_of_memory, 1 planned", "ends in: unknown, because no cell runs now"]
    rows = status_rows([FAILED, CellStatus(cell_id="b", state=State.PLANNED, steps=10)])
    lines = terminal(width, screen.show_status, rows, sums)
    assert all(cell_len(line) <= width for line in lines)
    words = " ".join(lines).split()
    assert {FAILED.cell_id, "1,234/20,000", "2.5000", "1234567_12"} <= set(words) and "…" not in " ".join(lines)
    whole = " ".join(words)
    assert "out_of_memory" in whole and "torch.OutOfMemoryError:" in whole
    lacks = [head for head in screen.LESS_URGENT if not re.search(rf"(^|\s){re.escape(head)}[:,;\s]", whole)]
    assert not lacks


@pytest.mark.parametrize("width", [30, 40, 59, 60, 80, 200])
def test_a_check_of_the_doctor_fits_every_width(terminal, width):
    check = Check(state="FAILED", name="node lightning", found="模型 [bold] " * 20, advice="change the key " * 9)
    lines = terminal(width, screen.show_check, check)
    assert all(cell_len(line) <= width for line in lines)
    assert lines[0].split()[:3] == ["FAILED", "node", "lightning"] and "to do: change" in " ".join(
        map(str.strip, lines)
    )


def test_a_pipe_gets_all_columns_without_colours_whatever_columns_says(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_table([{"cell": "a" * 30, "state": "running", "N": "9" * 300}], expendable=("N",), whole="dlm x")
    say("word " * 50)
    head, row, words = capsys.readouterr().out.splitlines()
    assert head.split() == ["cell", "state", "N"] and row.split() == ["a" * 30, "running", "9" * 300]
    assert words.split() == ["word"] * 50


def test_a_command_to_copy_stays_in_one_line(terminal):
    command = "  dlm sweep workdir/smoke --set 'models=[2k,4k,8k,19k,33k,37k]'"
    lines = terminal(40, say, "what would settle it: 2k and 37k would show where the minimum lies", command)
    assert lines[-1] == command and max(map(len, lines[:-1])) <= 40


def test_only_the_state_of_a_cell_has_its_colour(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_table([{"cell": "running-done", "state": "failed", "reason": "it was done"}], whole="dlm x")
    assert re.findall(r"\x1b\[31m(\w+)\x1b\[0m", capsys.readouterr().out) == ["failed"]


def test_two_thousand_rows_take_no_time(terminal):
    rows = [{"cell": f"mdm-{number}", "state": "done", **dict.fromkeys(HEADS, "1.25")} for number in range(2000)]
    before = time.process_time()
    lines = terminal(80, show_table, rows, expendable=EXPENDABLE, whole="dlm x")
    assert len(lines) > 2000 and time.process_time() - before < 1


def test_an_error_on_a_terminal_is_broken_between_words_and_in_a_pipe_it_is_one_line(workdir, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    whole = ""
    for is_terminal in (False, True):
        monkeypatch.setattr(sys, "argv", ["dlm", "status", "no-such-sweep"])
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        with pytest.raises(SystemExit) as stop:
            main()
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and lines[0].startswith("dlm: ")
        assert (len(lines) > 1) is is_terminal
        whole = lines[0] if not is_terminal else whole
        assert " ".join(" ".join(lines).split()) == whole


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_tables_of_fits_fit_the_terminal(width):
    numbers = [("fit", "a", "N*"), ("isoflop", "0.5123 (0.4 to 0.6)", "1.23M (1M to 1.4M)"), ("chinchilla", "-", "2M")]
    for lines in (text_table(numbers, width), text_table(numbers)):
        words = " ".join(lines)
        assert all(value in words for row in numbers[1:] for value in row)
    assert all(cell_len(line) <= width for line in text_table(numbers, width))


def test_the_exponents_under_other_counts_fit_the_terminal():
    counts = dict.fromkeys(("6n", "6n_total", "full", "full_masked_head", "as given"), "a source")
    rows = [
        Exponents(N=size, C=name, by=form, a=0.5371, b=0.4629, is_proportional=True)
        for form in ("isoflop", "chinchilla") for size in ("params", "params_total") for name in counts
    ]  # fmt: skip
    found = Conventions(rows=tuple(rows), size=dict.fromkeys(("params", "params_total"), "x"), compute=counts, own="6n")
    tables = len(found.sentences())
    for width in (30, 40, 80):
        lines = found.lines(width)[1:-tables]
        assert all(len(line) <= width for line in lines)
        assert " ".join(" ".join(lines).split()).count("0.537 0.463") == len(rows)
    assert len(found.lines()) == 1 + 2 * 3 + tables  # without a width, each row is one line


@pytest.mark.parametrize("width", ["40", "60", "80"])
def test_the_help_of_a_verb_with_many_options_cuts_no_word(width):
    """In a process of its own, because the width is read when the command starts."""
    words = [sys.executable, "-m", "dlm.cli", "fit", "--help"]
    shown = subprocess.run(
        words, env={**os.environ, "COLUMNS": width}, capture_output=True, text=True, check=True
    ).stdout
    assert "…" not in shown and "--budget-tolerance" in shown
