"""Runs of a masked-diffusion law of the Skaling form, and its exact optimum."""

import numpy as np

from dlm.fit import optimum
from dlm.fit.laws.skaling import Skaling
from dlm.fit.points import Cost

BUDGETS = np.geomspace(1e18, 1e20, 6)
# Skaling's law as it fits public masked diffusion points (mdm_prime_v2): k = .3
DIFFUSION = np.array([[0.52, 20.4, 93.5, 0.366, 0.4925, 0.30]])


def diffusion(seed, *, sigma=0.005, budgets=BUDGETS, sizes=5):
    """Runs around each budget's best size, and the true (N*, D*, L*) at any C."""
    law = Skaling()

    def best(c):
        return optimum.best(law, DIFFUSION, c, Cost())[0]

    n = np.concatenate([best(c)[0] * np.geomspace(0.2, 5, sizes) for c in budgets])
    c = np.repeat(budgets, sizes)
    loss = law.predict(DIFFUSION, np.log(n)[None], np.log(c / 6 / n)[None])[0]
    return n, c / 6 / n, loss * np.exp(sigma * np.random.default_rng(seed).standard_normal(len(n))), c, best
