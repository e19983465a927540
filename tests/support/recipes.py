"""A recipe.json as `dlm hparams` writes it."""

import json
import math
from pathlib import Path

LAWS = {
    "lr": {"log": math.log(0.2), "params": -0.5, "tokens": 0.05},
    "batch_tokens": {"log": math.log(2.0), "params": 0.0, "tokens": 0.5},
}


def recipe(**changes):
    """The content of a recipe whose range holds the cells of the small sweeps of the tests."""
    return {
        "format": "dlm-recipe-1",
        "objective": "masked_diffusion",
        **LAWS,
        "range": {"params": [3e3, 1e5], "tokens": [1e4, 1e8]},
        "runs": 19,
        "source": "19 tuning runs",
        "optimizer": "adamw",
        **changes,
    }


def write_recipe(path: Path, **changes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe(**changes)))
    return path
