"""The CSV files of dlm: texts survive, and a spreadsheet takes none of them for a formula."""

import csv
import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import NAMES

from dlm.fit.csv_file import as_csv, read_csv
from dlm.fit.rows import read_runs

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def table(names):
    return pd.DataFrame({"objective": list(names), "loss": [-1.5 + place for place in range(len(names))]})


@pytest.mark.parametrize("name", NAMES)
def test_a_name_survives_alone(name):  # a column of such names only would become numbers, truth values or nothing
    found = read_csv(io.StringIO(as_csv(table([name, name]))))
    assert found.objective.tolist() == [name, name] and found.loss.tolist() == [-1.5, -0.5]


@given(st.lists(TEXTS, min_size=1))
def test_all_names_survive(names):
    found = read_csv(io.StringIO(as_csv(table(names))))
    assert found.objective.tolist() == names and len(found) == len(names)


def test_no_cell_of_text_is_a_formula_and_numbers_stay():
    rows = list(csv.DictReader(io.StringIO(as_csv(table(NAMES)), newline="")))
    assert len(rows) == len(NAMES) and not any(row["objective"].startswith(tuple("=+-@\t\r")) for row in rows)
    assert rows[0]["loss"] == "-1.5"


def test_a_table_of_others_is_read_as_before():
    theirs = "objective,parent,note,params\n1,NA,'tis,-1e-3\n2,x,'=y,2\n"
    found = read_csv(io.StringIO(theirs))
    assert found.objective.tolist() == [1, 2] and found.params.tolist() == [-1e-3, 2]
    assert found.parent.isna().tolist() == [True, False] and found.note.tolist() == ["'tis", "=y"]


def test_a_fit_reads_the_names_that_were_written(tmp_path):
    runs = pd.DataFrame({"objective": NAMES, "params": 10, "tokens": 20, "loss": 2.0, "run_id": NAMES})
    (tmp_path / "runs.csv").write_bytes(as_csv(runs).encode())
    found = read_runs(tmp_path)
    assert tuple(found.objective) == tuple(found.run_id) == NAMES
