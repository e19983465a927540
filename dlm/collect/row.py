"""Turn a cell and its sources into a row of runs.csv, or into the reason why the cell has no row there.

Warnings state where the run directory, its .wandb files and the W&B server disagree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm.collect.agreement import check_sources_agree
from dlm.collect.exclusion import Cause, Excluded
from dlm.collect.history import History
from dlm.collect.sources import LIVE, UNREADABLE, FoundCell, describe, id_of
from dlm.core.configs import load_yaml
from dlm.core.errors import UserError
from dlm.core.files import read_json
from dlm.record.columns import RUN_COLUMNS, RunRow
from dlm.record.outcomes import OUTCOMES, Retry, State
from dlm.record.run import read_result
from dlm.record.wandb import planned_facts

COLUMN_TYPES = {column.name: str(column.type) for column in dataclasses.fields(RunRow)}


def run_row(cell: FoundCell, entropies: Mapping[str, float]) -> tuple[dict[str, Any], Excluded | None]:
    """Make the row of a cell, and find out whether the row goes into runs.csv.

    Args:
        cell: The cell with all its sources. Changed in place: warnings are added, and a history of another config is
            removed.
        entropies: For each data set with a known value, the unigram entropy of its validation text, in nats/token.

    Returns:
        The row with the columns of ``RunRow``, and why it is excluded from runs.csv; None when it is not excluded.
    """
    planned = planned_facts(cell.config, cell.recipe)
    check_sources_agree(cell, {**planned, "data_hash": cell.data_hash})
    loss = _loss_columns(cell)
    row = dataclasses.asdict(RunRow(**{**_columns_of_config(cell), **_measured_columns(cell), **planned, **loss}))
    excluded = (_unusable(cell, loss) if loss else _unfinished(cell)) or _not_learned(cell, row, entropies)
    if excluded is not None and excluded.cause is Cause.OTHER_CONFIG:  # the logged history belongs to another cell
        cell.merged = History(run_id=cell.name, key=[])
    return row, excluded


def _columns_of_config(cell: FoundCell) -> dict[str, Any]:
    """Return the columns that follow from the config but are not in ``planned_facts``, and the state of the cell."""
    config, recipe = cell.config, cell.recipe
    return {
        "run_id": cell.name,
        "sweep": cell.sweep,
        "model": recipe.shape.name,
        "budget": recipe.budget_flops,
        "global_batch_size": recipe.global_batch_size,
        "block_size": recipe.block_size,
        "learning_rate": config["optimizer"]["lr"],
        "weight_decay": config["optimizer"]["weight_decay"],
        "dropout": 0.0,
        "schedule": config["scheduler"]["name"],
        "parent": config.get("parent") or config.get("ckpt_path"),
        "seed": config["seed"],
        "data": config["data"]["name"],
        "data_hash": cell.data_hash,
        "status": str(cell.now.state),
        "role": "proof" if config.get("forecast") else config.get("role"),
    }


def _measured_columns(cell: FoundCell) -> dict[str, Any]:
    """Return the recorded columns: facts of the last attempt, of the status, and all result fields that are columns."""
    status, result, attempt = cell.now.status, cell.now.result, _last_attempt(cell)
    measured = {"git_sha": attempt.get("git_sha"), "device": attempt.get("device")}
    if status is not None:
        measured |= {key: getattr(status, key) for key in ("attempts", "steps_redone", "tokens_per_sec")}
    if result is not None:
        measured |= {key: value for key, value in vars(result).items() if key in RUN_COLUMNS}
    return measured


def _last_attempt(cell: FoundCell) -> Mapping[str, Any]:
    """Return the facts of the last attempt, from env.json or else from W&B; {} if neither has them."""
    path = cell.run_dir / "env.json"
    if not path.is_file():
        return next((one.run.record for one in cell.in_wandb if one.run.record), {})
    try:
        attempts = read_json(path)["attempts"]
        return dict(attempts[-1]) if attempts else {}
    except (UserError, KeyError, TypeError, ValueError) as error:
        cell.warn(f"env.json cannot be read ({error}): device and git_sha stay unknown")
        return {}


def _loss_columns(cell: FoundCell) -> dict[str, Any]:
    """Return the loss of the result, or else the loss logged at the planned last step, as columns; {} without both."""
    result = cell.now.result
    if result is not None:
        return {"loss": result.loss, "loss_se": result.loss_se, "source": cell.source, "estimator": result.estimator}
    if not cell.lacks_result:
        return {}
    step = cell.recipe.steps
    logged = [("run_dir", "metrics.jsonl", cell.metrics)]
    logged += [(one.source, one.where, one.history) for one in cell.in_wandb]
    for source, where, history in logged:
        loss, error = history.at(step)
        if loss is not None and math.isfinite(loss):
            cell.warn(f"result.json is absent or not whole; the loss {loss:g} at step {step} was read from {where}")
            return {"loss": loss, "loss_se": error, "source": source, "estimator": "unknown", "status": str(State.DONE)}
    return {}


def _unusable(cell: FoundCell, loss: Mapping[str, Any]) -> Excluded | None:
    """Return why the loss that was found does not count as the loss of this cell; None when it counts."""
    if not math.isfinite(loss["loss"]):
        return Excluded(State.DIVERGED, f"its loss is {loss['loss']}")
    result = cell.now.result
    if result is not None and result.stopped_early:
        progress = f" at step {result.step} of {cell.recipe.steps}"
        details = (
            "laws need the loss at the planned last step: train it with `python -m dlm.launch --rerun` and without the "
            "callback that stopped it"
        )
        return Excluded(Cause.STOPPED_EARLY, details, progress=progress)
    return _of_other_config(cell, loss["source"])


def _of_other_config(cell: FoundCell, source: str) -> Excluded | None:
    """Return an exclusion if the run in ``source`` had another config than this cell; warn if this is unknown."""
    where = "config.yaml" if source == "run_dir" else "config in W&B"
    try:
        found = _id_of_run(cell, source)
    except UNREADABLE as error:
        cell.warn(f"{where} cannot be read ({describe(error)}): it was not checked that its result is of this cell")
        return None
    if found is None:
        cell.warn(f"{where} is absent: it was not checked that its result is of this cell")
    if found in (None, cell.name):
        return None
    details = f"its {where} is that of {found}, another run: move its folder away, then submit the cell again"
    return Excluded(Cause.OTHER_CONFIG, details)


def _id_of_run(cell: FoundCell, source: str) -> str | None:
    """Return the cell id that follows from the config of the run in ``source``; None without a config."""
    told = next((one.run for one in cell.in_wandb if one.source == source), None)
    if cell.now.result is not None:
        data_hash: str | None = cell.now.result.data_hash
    else:
        data_hash = (told.data_hash if told is not None else None) or cell.data_hash
    if told is not None:
        return id_of(told.config, data_hash) if told.config else None
    return cell.metrics.cell_id(data_hash, lambda: _id_of_file(cell.run_dir / "config.yaml", data_hash))


def _id_of_file(path: Path, data_hash: str | None) -> str | None:
    """Return the cell id that follows from a config.yaml; None where the file is absent or empty."""
    config = load_yaml(path) if path.is_file() else None
    return id_of(config, data_hash) if config else None


def _unfinished(cell: FoundCell) -> Excluded:
    """Return why a cell has no loss, and what the user should do."""
    foreign = _of_other_config(cell, "run_dir") if cell.metrics.num_rows and cell.lacks_result else None
    if foreign is not None:
        return foreign
    now, steps = cell.now, cell.recipe.steps
    result = read_result(cell.run_dir) or next((one.result for one in cell.in_wandb if one.result is not None), None)
    if result is not None and now.state not in LIVE:
        if result.cell_id != cell.name:
            details = f"its result is of {result.cell_id}: give its folder that name, or move it away"
            return Excluded(Cause.OTHER_CONFIG, details)
        reached = f"its result is of {result.cell_id} at step {result.step}"
        details = f"{reached}, planned was {cell.name} at step {steps}: submit it again"
        return Excluded(Cause.SHORT if result.step < steps else Cause.LONG, details)
    last = cell.merged.last_step
    step = now.status.step if now.status is not None else last
    progress = f", step {step} of {steps}" if step is not None else ""
    if now.reason:
        progress += f" ({now.reason})"
    if now.state not in LIVE and last is not None and last >= steps:
        progress += f", {Cause.NO_VALIDATION}: no val/loss at the planned last step"
    outcome = OUTCOMES[now.state]
    advice = outcome.advice
    if outcome.retry is Retry.START and (cell.run_dir / "LATEST").is_file():
        advice += ", it goes on from its checkpoint"
    return Excluded(now.state, advice, progress=progress)


def _not_learned(cell: FoundCell, row: Mapping[str, Any], entropies: Mapping[str, float]) -> Excluded | None:
    """Exclude a model that did not learn: its loss is not below the unigram entropy of the validation text."""
    result = cell.now.result
    entropy = result.unigram_entropy if result is not None else entropies.get(row["data"])
    if entropy is None:
        cell.warn(f"nothing states the unigram entropy of {row['data']}: it was not checked whether the model learned")
        return None
    if row["loss"] < entropy:
        return None
    details = (
        f"its loss {row['loss']:.4f} is not below the unigram entropy of the validation text, {entropy:.4f} nats/token"
    )
    return Excluded(Cause.NOT_LEARNED, details)
