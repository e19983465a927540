"""Finding a run by a part of its name, and the files with what it printed."""

import pytest
from support.stub_cell import result
from support.submissions import write_submitted

from dlm.core.errors import UserError
from dlm.record.run import write_result
from dlm.submit.ledger import Ledger
from dlm.submit.logs import find_run, logs_of


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path))
    folder = tmp_path / "demo" / "runs" / "mdm-4k-2e10-aaaa1111"
    folder.mkdir(parents=True)
    return folder


def test_a_run_is_found_by_a_part_of_its_name(run_dir, tmp_path):
    twin = tmp_path / "other" / "runs" / run_dir.name
    twin.mkdir(parents=True)
    (run_dir.parent / "mdm-8k-2e10-cccc3333").mkdir()
    assert find_run("8k-2e10") == run_dir.parent / "mdm-8k-2e10-cccc3333"
    assert find_run(run_dir.name, tmp_path / "demo") == run_dir == find_run(str(run_dir))
    with pytest.raises(UserError, match=r"matches 2 runs .* in demo, .* in other"):
        find_run("aaaa1111")
    with pytest.raises(UserError, match=r"no run of '\.'"):
        find_run(".", tmp_path / "other2")
    with pytest.raises(UserError, match="did you mean mdm-8k-2e10-cccc3333"):
        find_run("mdm-8k-2e10-cccc3334")


def test_the_logs_are_those_of_the_cell_and_of_its_latest_job(run_dir, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")  # no SLURM is asked
    with pytest.raises(UserError, match="has said nothing yet: it is planned"):
        logs_of(run_dir)
    (run_dir / "log.txt").write_text("one\n")
    assert logs_of(run_dir) == [run_dir / "log.txt"]
    ledger = Ledger(run_dir.parents[1])
    write_submitted(run_dir.parents[1], run_dir.name, "s", "12_0")
    (ledger.folder / "slurm-12_0.txt").write_text("srun: error: x\n")
    (ledger.folder / "slurm-11_0.txt").write_text("another's\n")
    assert logs_of(run_dir) == [run_dir / "log.txt", ledger.folder / "slurm-12_0.txt"]
    write_result(run_dir, result(run_dir.name))
    assert logs_of(run_dir) == [run_dir / "log.txt", ledger.folder / "slurm-12_0.txt"]  # of a finished cell too
