"""A planned sweep, and a W&B server to collect from."""

import pytest
from support.by_hand import planned
from support.wandb_server import serving


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return planned(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def module_server():
    with serving() as running:
        yield running
        import wandb

        wandb.teardown()  # it keeps the address of this server


@pytest.fixture
def server(module_server, monkeypatch):
    """A W&B server without runs, to which W&B is sent."""
    module_server.reset()
    for name, value in module_server.env.items():
        monkeypatch.setenv(name, value)
    yield module_server
    assert not module_server.unknown
