"""How many simulated worlds a test of coverage tries: a few with every commit, many in a campaign."""

import numpy as np
import pytest


def worlds(few, many):
    """Give the test an argument ``worlds``: `few` by default, and `many` in `make test-long`."""
    return pytest.mark.parametrize("worlds", [few, pytest.param(many, marks=pytest.mark.long)])


def least_share(worlds):
    """The least share of worlds that 95 % intervals must cover: three standard errors below 95 %."""
    return 0.95 - 3 * np.sqrt(0.95 * 0.05 / worlds)
