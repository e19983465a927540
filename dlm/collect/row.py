"""runrow: what was found of one cell -> its row of runs.csv, or the reason why it has none. Called by collect.

The order of trust: the run directory, its .wandb files, the W&B server. What they do not agree on becomes a warning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dlm.collect.agreement import check_row_agrees
from dlm.collect.history import History
from dlm.collect.sources import LIVE, UNREADABLE, CellFiles, id_of, said_of
from dlm.core.configs import load_yaml
from dlm.core.errors import UserError
from dlm.core.files import read_json
from dlm.record.columns import RunRow
from dlm.record.outcomes import OUTCOMES, State
from dlm.record.run import read_result

# What a result states of its run, under the same names as in RunRow.
_OF_RESULT = (
    "unique_tokens", "epochs", "tokens_per_sec", "device", "gpu_hours", "attempts", "steps_redone", "data_hash",
)  # fmt: skip


# What a run tells W&B of its plan (record.described), under the same names as in RunRow.
RECORDED = ("objective", "params", "params_total", "tokens", "steps", "convention", "flops", "flops_6n",
            "flops_6n_total", "flops_full", "flops_full_masked_head", "data_hash")  # fmt: skip


def run_row(cell: CellFiles) -> tuple[dict[str, Any], str | None]:
    """(row of RunRow's columns, reason to exclude it or None)."""
    planned = _planned_columns(cell)
    check_row_agrees(cell, {key: planned[key] for key in RECORDED})
    known = planned | _measured_columns(cell)
    result, final = cell.now.result, dict[str, Any]()
    if result is not None:
        final = {"loss": result.loss, "loss_se": result.loss_se, "source": cell.source, "estimator": result.estimator}
        reason = None if math.isfinite(result.loss) else f"diverged: its loss is {result.loss}"
    else:
        final, reason = _final_without_result(cell), None
    if final:
        reason = reason or _foreign(cell, final["source"])
    elif cell.history.num_rows and cell.now.state not in LIVE and read_result(cell.run_dir) is None:
        reason = _foreign(cell, "run_dir") or _reason(cell)
    else:
        reason = _reason(cell)
    if reason is not None and reason.startswith("another config"):  # nor is what it logged a history of this cell
        cell.merged = History(run_id=cell.name, key=[])
    return dataclasses.asdict(RunRow(**{**known, **final})), reason


def _planned_columns(cell: CellFiles) -> dict[str, Any]:
    """What is known of a cell before it has run."""
    config, recipe = cell.config, cell.recipe
    return {
        "run_id": cell.name,
        "sweep": cell.sweep,
        "objective": config["objective"]["name"],
        "model": recipe.shape.name,
        "params": recipe.shape.num_params,
        "params_total": recipe.shape.num_params_total(causal=recipe.causal),
        "tokens": recipe.tokens,
        "flops": recipe.flops[recipe.convention],
        "convention": recipe.convention,
        **{f"flops_{convention}": value for convention, value in recipe.flops.items()},
        "budget": recipe.budget_flops,
        "steps": recipe.steps,
        "global_batch_size": recipe.global_batch_size,
        "block_size": recipe.block_size,
        "learning_rate": config["optimizer"]["lr"],
        "schedule": config["scheduler"]["name"],
        "parent": config.get("ckpt_path"),
        "seed": config["seed"],
        "data": config["data"]["name"],
        "data_hash": cell.data_hash,
        "status": str(cell.now.state),
        **dict.fromkeys(("loss", "loss_se", "unique_tokens", "epochs", "tokens_per_sec", "device", "gpu_hours")),
        "estimator": "",
        "source": "",
        "attempts": 0,
        "steps_redone": 0,
        "git_sha": None,
    }


def _measured_columns(cell: CellFiles) -> dict[str, Any]:
    """What the run says beyond the loss."""
    measured: dict[str, Any] = {}
    status, result = cell.now.status, cell.now.result
    if status is not None:
        measured |= {key: getattr(status, key) for key in ("attempts", "steps_redone", "tokens_per_sec")}
    last = _last_attempt(cell)
    measured |= {"git_sha": last.get("git_sha"), "device": last.get("device")}
    if result is not None:
        measured |= {key: getattr(result, key) for key in _OF_RESULT}
    return measured


def _last_attempt(cell: CellFiles) -> Mapping[str, Any]:
    path = cell.run_dir / "env.json"
    if not path.is_file():
        return next((one.run.record for one in cell.logged if one.run.record), {})
    try:
        attempts = read_json(path)["attempts"]
        return dict(attempts[-1]) if attempts else {}
    except (UserError, KeyError, TypeError, ValueError) as error:
        cell.warn([f"env.json cannot be read ({error}): device and git_sha stay unknown"])
        return {}


def _final_without_result(cell: CellFiles) -> dict[str, Any]:
    """Where there is no result: the loss at the planned last step from metrics.jsonl, else from W&B, else {}."""
    if cell.now.state in LIVE or read_result(cell.run_dir) is not None:
        return {}
    step = cell.recipe.steps
    named = [("run_dir", "metrics.jsonl", cell.history)]
    named += [(one.source, one.where, one.history) for one in cell.logged]
    for source, name, history in named:
        loss, error = history.at(step)
        if loss is not None and math.isfinite(loss):
            cell.warn([f"result.json is absent or not whole; the loss {loss:g} at step {step} was read from {name}"])
            return {"loss": loss, "loss_se": error, "source": source, "estimator": "unknown", "status": str(State.DONE)}
    return {}


def _foreign(cell: CellFiles, source: str) -> str | None:
    """Why a loss is not of the cell it lies with: the config that it was reached with must have the id of the cell."""
    where = "config.yaml" if source == "run_dir" else "config in W&B"
    data_hash = _data_hash(cell, source)
    known: list[str | None] | None = cell.history.config_id if source == "run_dir" else None
    if known is None or known[0] != data_hash:
        try:
            config = _config_behind(cell, source)
            if not config:
                cell.warn([f"{where} is absent: that its result is of this cell was not checked"])
                return None
            known = [data_hash, id_of(config, data_hash)]
        except UNREADABLE as error:
            cell.warn([f"{where} cannot be read ({said_of(error)}): that its result is of this cell was not checked"])
            return None
        if source == "run_dir":
            cell.history.config_id = known
    if known[1] != cell.name:
        return f"another config: its {where} is that of {known[1]}, another run: move it away, then submit it again"
    return None


def _data_hash(cell: CellFiles, source: str) -> str | None:
    """Of the data that a run was trained on, as its result says, else its record in W&B, else the plan."""
    if cell.now.result is not None:
        return cell.now.result.data_hash
    record = next((one.run.record for one in cell.logged if one.source == source), {})
    said = record.get("data_hash")
    return said if isinstance(said, str) else cell.data_hash


def _config_behind(cell: CellFiles, source: str) -> Any:
    """The config that the run had which gave the loss; None where it is not there."""
    if source == "run_dir":
        path = cell.run_dir / "config.yaml"
        return load_yaml(path) if path.is_file() else None
    return next(one.run.config for one in cell.logged if one.source == source)


def _reason(cell: CellFiles) -> str:
    """Why a cell has no row in runs.csv, and what to do."""
    now = cell.now
    result = read_result(cell.run_dir) or next((one.result for one in cell.logged if one.result is not None), None)
    if result is not None and now.state not in LIVE:
        if result.cell_id != cell.name:
            return f"another config: its result is of {result.cell_id}: give its folder that name, or move it away"
        planned = f"{cell.name} at step {cell.recipe.steps}"
        short = "short: " if result.step < cell.recipe.steps else ""
        return f"{short}its result is of {result.cell_id} at step {result.step}, planned was {planned}: submit it again"
    last = cell.merged.last_step
    step = now.status.step if now.status is not None else last
    progress = f", step {step} of {cell.recipe.steps}" if step is not None else ""
    said = f" ({now.reason})" if now.reason else ""
    advice = OUTCOMES[now.state].advice
    if advice == "submit again" and (cell.run_dir / "LATEST").is_file():
        advice += ", it goes on from its checkpoint"
    if now.state not in LIVE and last is not None and last >= cell.recipe.steps:
        said += ", missing validation: no val/loss at the planned last step"
    return f"{now.state}{progress}{said}: {advice}"


def did_not_learn(cell: CellFiles, row: Mapping[str, Any], entropies: Mapping[str, float]) -> str | None:
    """A model that is no better than counting tokens did not learn, and says nothing about scaling."""
    result = cell.now.result
    entropy = result.unigram_entropy if result is not None else entropies.get(row["data"])
    if entropy is None:
        cell.warn([f"nothing states the unigram entropy of {row['data']}: whether it learned was not checked"])
        return None
    if row["loss"] < entropy:
        return None
    return (
        f"did not learn: its loss {row['loss']:.4f} is not below the unigram entropy of the validation text, "
        f"{entropy:.4f} nats/token"
    )
