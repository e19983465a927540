"""A sweep of stub cells, commands that stand in for others, and a stand-in for SLURM."""

import pytest
from support import TESTS, slurm_stand_in
from support.submissions import prepend_to_path

from dlm.submit import submission


@pytest.fixture
def sweep_dir(tmp_path, monkeypatch):
    """A sweep whose jobs can import the stub cell."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    return tmp_path / "work" / "demo"


@pytest.fixture
def bin_dir(tmp_path, monkeypatch):
    """A folder whose commands come before all others."""
    prepend_to_path(tmp_path / "bin", monkeypatch)
    return tmp_path / "bin"


@pytest.fixture
def slurm(tmp_path, bin_dir, monkeypatch):
    """The state of a stand-in for SLURM (``slurm_stand_in``)."""
    slurm_stand_in.install(bin_dir, tmp_path / "db")
    monkeypatch.setattr(submission, "code_origin", lambda: None)  # this checkout may hold changes
    return tmp_path / "db"
