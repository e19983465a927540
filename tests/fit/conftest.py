"""Truths that the fits must find again, and the published points they must reproduce."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="session")
def reference():
    """Read one published file, or skip: the points carry no licence, so they are not part of the project."""
    folder = os.environ.get("DLM_REFERENCE_DATA")

    def read(name: str) -> pd.DataFrame:
        if not folder:
            pytest.skip(f"DLM_REFERENCE_DATA is not set: the folder that holds {name}")
        return pd.read_csv(Path(folder) / name)

    return read


@pytest.fixture(scope="session")
def epoch(reference):
    """The 240 points that Besiroglu et al. (2404.10102) fitted."""
    frame = reference("epoch_chinchilla.csv")
    return frame[~frame["excluded_by_epoch"]]


@dataclass(frozen=True)
class World:
    """A known law, runs drawn from it, and its exact optimum at C FLOPs (C = 6 N D)."""

    E: float = 1.69
    A: float = 406.4
    B: float = 410.7
    alpha: float = 0.34
    beta: float = 0.28

    def loss(self, n, d):
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def best(self, c):
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        n = g * (c / 6) ** (self.beta / (self.alpha + self.beta))
        return n, c / 6 / n

    def grid(self, budgets, *, width=8.0, sizes=15, sigma=0.0, seed=0):
        """(N, D, L, C): `sizes` per budget, log-spaced within `width` times the optimum either way."""
        n = np.concatenate([self.best(c)[0] * np.geomspace(1 / width, width, sizes) for c in budgets])
        c = np.repeat(np.asarray(budgets, dtype=float), sizes)
        d = c / 6 / n
        noise = 1 + sigma * np.random.default_rng(seed).standard_normal(len(n))
        return n, d, self.loss(n, d) * noise, c


@pytest.fixture(scope="session")
def world():
    """Hoffmann et al.'s published numbers as the truth."""
    return World()
