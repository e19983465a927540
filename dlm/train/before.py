"""Check a config, and find out whether its run is done, before torch is imported, which takes several seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm.core.errors import UserError
from dlm.core.recipe import MIN_STEPS, Recipe, derive
from dlm.data.manifest import DataSet
from dlm.data.prepare.command import ensure_data
from dlm.record.aside import RERUN
from dlm.record.run import Result, finished


def checked(config: Mapping[str, Any]) -> tuple[Recipe, DataSet]:
    """Return the recipe and the data set of a run.

    Args:
        config: The composed config, resolved and filled (dlm.core.recipe.fill).

    Raises:
        UserError: The config does not describe a valid run.
    """
    recipe = derive(config)
    _check_steps(config, recipe)
    return recipe, _check_data(config, recipe)


def result_before(config: Mapping[str, Any], recipe: Recipe) -> Result | None:
    """Return the result that the run has already; None if there is something to train, as in every fast_dev_run."""
    if config["trainer"]["fast_dev_run"]:
        return None
    return finished(Path(config["paths"]["run_dir"]), config["cell_id"], recipe.steps)


def nothing_to_train(result: Result, recipe: Recipe) -> str:
    """Return the line for a run that is done."""
    early = f" (stopped early, at step {result.step} of {recipe.steps})" if result.stopped_early else ""
    done = f"{result.cell_id} is done{early}: {result.loss:.4f} nats/token"
    return f"{done}, nothing to train; {RERUN} trains it anew"


def _check_steps(config: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise UserError if the budget pays for too few steps; print a note if training.steps overrides the budget."""
    steps, budget = config["training"]["steps"], config["training"]["budget"]
    if steps is None and recipe.steps < MIN_STEPS:
        raise UserError(
            f"training.budget {budget:g} gives {recipe.steps} steps of {recipe.tokens_per_step} tokens, fewer than "
            f"{MIN_STEPS}: raise training.budget, lower data.batch_size or choose a smaller model"
        )
    if steps is not None and budget is not None:
        print(f"training.steps {recipe.steps} counts, training.budget {budget:g} does not")


def _check_data(config: Mapping[str, Any], recipe: Recipe) -> DataSet:
    """Return the data set of the run. Raises UserError if it is not prepared or its vocabulary is not the model's."""
    data_set = ensure_data(config["data"])
    if data_set.vocab_size != recipe.shape.vocab_size:
        raise UserError(
            f"model.vocab_size {recipe.shape.vocab_size} is not the {data_set.vocab_size} of the data "
            f"{config['data']['name']}: choose another model or data, or set model.vocab_size={data_set.vocab_size}"
        )
    return data_set
