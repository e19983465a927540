"""Trained runs that several tests start from."""

import shutil

import pytest
import torch
from support.runs import SHORT, train_here


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small models gain nothing from more threads, and threads of several test processes slow each other down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained_once(stdlib_data, tmp_path_factory):
    """A finished run of SHORT, which no test changes."""
    return train_here(tmp_path_factory.mktemp("trained"), *SHORT)


@pytest.fixture
def trained(trained_once, workdir):
    """A copy of a finished run of SHORT, in this test's work directory."""
    return shutil.copytree(trained_once, workdir / "adhoc" / "runs" / trained_once.name)


@pytest.fixture
def undisturbed(stdlib_data, tmp_path):
    """Trains the same run in another work directory, from start to end at once; its folder."""
    return lambda *overrides: train_here(tmp_path / "undisturbed", *overrides)
