"""The notebooks of analysis/ run from top to bottom, use public names only, and carry no outputs in git."""

import ast
import hashlib
import importlib
import os
import re

import pandas as pd
import pytest
from support import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
ANALYSIS = ROOT / "analysis"
NOTEBOOKS = sorted(ANALYSIS.glob("*.ipynb"))
RESULTS = ANALYSIS / "results"
MOST_BYTES = 400_000  # of the stored results
EXPECTED = {
    "01_plan": "28 planned runs|GPU-hours",
    "02_runs": "did not learn",
    "03_isoflop": "masked_diffusion, 20,608 parameters on 5,605,376 tokens: predicted 2.4",
    "04_surface_and_uncertainty": "of 10 losses are inside their interval",
    "05_mdm_vs_ar": "no loss is reached by both",
    "06_any_wandb_project": "dataset is 'shuffled', required is 'stdlib'",
    "07_published_laws": "with_embeddings",
}


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_the_notebooks_run(tmp_path, monkeypatch):
    """All run in one kernel, which forgets its names between two of them: this imports the libraries once."""
    runs = pd.read_csv(RESULTS / "demo_both_runs.csv")
    runs[runs["objective"] == "masked_diffusion"].to_csv(tmp_path / "runs.csv", index=False)  # half: in half the time
    monkeypatch.setenv("DLM_RUNS_CSV", str(tmp_path / "runs.csv"))
    monkeypatch.setenv("DLM_DRAWS", "100")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    everything = nbformat.v4.new_notebook()
    for path in NOTEBOOKS:
        for source in ("%reset -f", *(cell.source for cell in code_cells(path))):
            everything.cells.append(nbformat.v4.new_code_cell(source, metadata={"notebook": path.stem}))
    nbclient.NotebookClient(
        everything, timeout=300, kernel_name="python3", resources={"metadata": {"path": ANALYSIS}}
    ).execute()
    for path in NOTEBOOKS:
        own = [cell for cell in everything.cells if cell.metadata["notebook"] == path.stem]
        shown = "".join(str(output) for cell in own for output in cell.outputs)
        assert shown.count("image/png") >= 2 or path.stem == "07_published_laws", path.stem
        assert re.search(EXPECTED[path.stem].replace("(", r"\("), shown.replace("\\'", "'")), path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs(path):
    assert code_cells(path)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names_only(path):
    tree = ast.parse("\n".join(cell.source for cell in code_cells(path)))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    for node in imported:
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            assert not any(name.split(".")[0] == "dlm" for name in names), "from dlm.ROOM import NAME, please"
        elif str(node.module).split(".")[0] == "dlm":
            assert set(names) <= set(importlib.import_module(node.module).__all__), f"{node.module} does not export all"
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not {name for name in used if name.startswith("_")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_a_question_and_says_what_it_does_not_show(path):
    words = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert "**Question.**" in words[0]
    assert any("does not show" in text or "may not" in text for text in words[1:])
    assert f"[{path.stem}]({path.name})" in (ANALYSIS / "README.md").read_text()


def test_the_stored_results_are_those_of_the_readme_and_small():
    hashes = dict(re.findall(r"\| \[(.+?)\]\(.+?\) \| `([0-9a-f]{64})` \|", (RESULTS / "README.md").read_text()))
    stored = {path.name: path for path in RESULTS.iterdir() if path.suffix not in (".py", ".md") and path.is_file()}
    assert hashes == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in stored.items()}
    assert sum(path.stat().st_size for path in stored.values()) < MOST_BYTES


def test_there_are_seven_notebooks():
    assert [path.stem for path in NOTEBOOKS] == sorted(EXPECTED)
