"""Every notebook in analysis/ runs from top to bottom on a small synthetic runs.csv, and carries no outputs in git."""

import os

import pytest
from support import ROOT
from support.demo_runs import demo_runs

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted((ROOT / "analysis").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    demo_runs().to_csv(tmp_path / "runs.csv", index=False)
    monkeypatch.setenv("DLM_RUNS_CSV", str(tmp_path / "runs.csv"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    fewer = "from dlm.fit import table; table.fit_sweep.__kwdefaults__['bootstrap'] = 200"  # instead of 4000, for speed
    notebook.cells.insert(0, nbformat.v4.new_code_cell(fewer))
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))
    assert "image/png" in shown
    assert "best at 3e12 FLOPs: N = " in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_there_are_notebooks():
    assert NOTEBOOKS
