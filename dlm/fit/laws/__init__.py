"""The loss surfaces that can be fitted, by name."""

from __future__ import annotations

from dlm.fit.laws.chinchilla import Chinchilla
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.epochs import Epochs
from dlm.fit.laws.law import Law
from dlm.fit.laws.onset import Onset
from dlm.fit.laws.penalty import Penalty
from dlm.fit.laws.skaling import Skaling
from dlm.fit.laws.tied import Tied

LAWS: dict[str, type[Law]] = {
    law.name: law for law in (Chinchilla, Skaling, Tied, DataConstrained, Epochs, Penalty, Onset)
}

UNIQUE = ("epochs", "data-constrained", "penalty", "onset")  # laws of unique tokens, the simplest first

# The name of each law in the report. Those that are no surfaces, or are made of several, are not in LAWS.
LAW_NAMES = {
    "combined": "combined law",
    "isoflop": "isoFLOP curves",
    "chinchilla": "fitted surface",
    "envelope": "envelope",
    "skaling": "Skaling surface",
    "tied": "surface of one exponent",
    "data-constrained": "data-constrained surface",
    "epochs": "surface of epochs that never harm",
    "penalty": "surface with a penalty for repetition",
    "onset": "surface with an onset of overfitting",
}
