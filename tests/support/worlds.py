"""The number of simulated worlds in a coverage test: few in every test run, many in a long campaign."""

import numpy as np
import pytest


def worlds(few, many):
    """Parametrise a test with the argument ``worlds``: ``few`` by default, ``many`` in `make test-long`."""
    return pytest.mark.parametrize("worlds", [few, pytest.param(many, marks=pytest.mark.long)])


def least_share(worlds):
    """Return the lowest acceptable coverage of 95 % intervals: three standard errors below 95 %."""
    return 0.95 - 3 * np.sqrt(0.95 * 0.05 / worlds)
