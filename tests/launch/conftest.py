"""Compose configs as `python -m dlm.launch` does."""

import hydra
import pytest

from dlm import launch
from dlm.core.paths import configs_dir


@pytest.fixture
def compose(stdlib_data):
    launch.register()

    def composed(*overrides: str):
        with hydra.initialize_config_dir(str(configs_dir()), version_base=None):
            return hydra.compose("config", overrides=list(overrides))

    return composed
