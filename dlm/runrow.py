"""runrow: the files of one cell -> its row of runs.csv, or the reason why it has none. Called by collect.

The order of trust: result.json, metrics.jsonl, the offline W&B file. What they do not agree on becomes a warning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.crosscheck import check_history, check_value, final_validation
from dlm.errors import UserError
from dlm.files import read_json
from dlm.groups import load_yaml
from dlm.identity import cell_id
from dlm.ledger import CellNow
from dlm.recipe import Recipe, derive
from dlm.record import Result, RunRow, State, read_result
from dlm.wandb_file import WandbRun

# What a result states of its run, under the same names as in RunRow.
_OF_RESULT = (
    "unique_tokens", "epochs", "tokens_per_sec", "device", "gpu_hours", "attempts", "steps_redone", "data_hash",
)  # fmt: skip
# What to do about a cell that has no result, by its state.
ADVICE = {
    State.PLANNED: "submit it",
    State.SUBMITTED: "wait, then collect again",
    State.RUNNING: "wait, then collect again",
    State.PREEMPTED: "submit again, it goes on from its checkpoint",
    State.LOST: "submit again, it goes on from its checkpoint",
    State.CANCELLED: "submit again, it goes on from its checkpoint",
    State.FAILED: "see its log.txt, then submit again",
    State.OUT_OF_MEMORY: "lower data.micro_batch_size, then submit with --retry-failed",
    State.DIVERGED: "lower optimizer.lr in the definition",
    State.BAD_CONFIG: "mend the definition or its overrides, then submit with --retry-failed",
}


@dataclass(kw_only=True)
class CellFiles:
    """One cell with everything that was found of it."""

    name: str
    run_dir: Path
    config: Mapping[str, Any]
    recipe: Recipe
    now: CellNow
    data_hash: str | None
    warnings: list[str] = field(default_factory=list)

    def warn(self, lines: Iterable[str]) -> None:
        self.warnings += [f"{self.name}: {line}" for line in lines]


def run_row(
    cell: CellFiles, sweep: str, metrics: list[dict[str, Any]], wandb: WandbRun | None
) -> tuple[dict[str, Any], str | None]:
    """(row of RunRow's columns, reason to exclude it or None)."""
    known = _planned_columns(cell, sweep) | _measured_columns(cell)
    if cell.now.result is not None:
        result = cell.now.result
        final = {"loss": result.loss, "loss_se": result.loss_se, "source": "run_dir", "estimator": result.estimator}
        _cross_check(cell, final, metrics, wandb)
        reason = None if math.isfinite(result.loss) else f"its loss is {result.loss}"
        reason = reason or _foreign(cell, result)
        return dataclasses.asdict(RunRow(**{**known, **final})), reason
    final = _final_without_result(cell, metrics, wandb)
    if final:
        return dataclasses.asdict(RunRow(**{**known, **final})), None
    return dataclasses.asdict(RunRow(**known)), _reason(cell)


def _planned_columns(cell: CellFiles, sweep: str) -> dict[str, Any]:
    """What is known of a cell before it has run."""
    config, recipe = cell.config, cell.recipe
    return {
        "run_id": cell.name,
        "sweep": sweep,
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
    """What the run directory says beyond the loss."""
    measured: dict[str, Any] = {}
    status, result = cell.now.status, cell.now.result
    if status is not None:
        measured |= {key: getattr(status, key) for key in ("attempts", "steps_redone", "tokens_per_sec")}
    last = _last_attempt(cell)
    measured |= {"git_sha": last.get("git_sha"), "device": last.get("device")}
    if result is not None:
        measured |= {key: getattr(result, key) for key in _OF_RESULT}
    return measured


def _last_attempt(cell: CellFiles) -> dict[str, Any]:
    path = cell.run_dir / "env.json"
    if not path.is_file():
        return {}
    try:
        attempts = read_json(path)["attempts"]
        return dict(attempts[-1]) if attempts else {}
    except (UserError, KeyError, TypeError, ValueError) as error:
        cell.warn([f"env.json cannot be read ({error}): device and git_sha stay unknown"])
        return {}


def _cross_check(
    cell: CellFiles, final: Mapping[str, Any], metrics: list[dict[str, Any]], wandb: WandbRun | None
) -> None:
    """Warn of every number that result.json, metrics.jsonl and the W&B file do not agree on."""
    step = cell.recipe.steps
    for name, rows in (("metrics.jsonl", metrics), ("the W&B file", wandb.history if wandb else [])):
        loss, error = final_validation(rows, step)
        cell.warn(check_value(f"val/loss at step {step}", final["loss"], loss, name))
        cell.warn(check_value(f"val/loss_se at step {step}", final["loss_se"], error, name))
    if wandb is not None:
        cell.warn(wandb.warnings)
        cell.warn(check_history(metrics, wandb.history))


def _final_without_result(cell: CellFiles, metrics: list[dict[str, Any]], wandb: WandbRun | None) -> dict[str, Any]:
    """Where result.json is absent: the loss at the planned last step from metrics.jsonl, else from W&B, else {}."""
    if cell.now.state in (State.RUNNING, State.SUBMITTED) or read_result(cell.run_dir) is not None:
        return {}
    for source, rows in (("run_dir", metrics), ("wandb", wandb.history if wandb else [])):
        loss, error = final_validation(rows, cell.recipe.steps)
        if loss is not None and math.isfinite(loss):
            name = "metrics.jsonl" if source == "run_dir" else "the W&B file"
            read = f"the loss {loss:g} at step {cell.recipe.steps} was read from {name}"
            cell.warn([f"result.json is absent or not whole; {read}"])
            return {"loss": loss, "loss_se": error, "source": source, "estimator": "unknown", "status": str(State.DONE)}
    return {}


def _foreign(cell: CellFiles, result: Result) -> str | None:
    """Why a result is not of the cell it lies with: its config.yaml must have the id of the cell."""
    path = cell.run_dir / "config.yaml"
    if not path.is_file():
        cell.warn(["config.yaml is absent: that its result is of this cell was not checked"])
        return None
    try:
        config = load_yaml(path)
        found = cell_id(config, steps=derive(config).steps, data_hash=result.data_hash)
    except (UserError, KeyError, TypeError) as error:
        cell.warn([f"config.yaml cannot be read ({error}): that its result is of this cell was not checked"])
        return None
    if found != cell.name:
        return f"its config.yaml is that of {found}, another run: move the folder away, then submit it again"
    return None


def _reason(cell: CellFiles) -> str:
    """Why a cell has no row in runs.csv, and what to do."""
    now, result = cell.now, read_result(cell.run_dir)
    if result is not None:
        planned = f"{cell.name} at step {cell.recipe.steps}"
        return f"its result is of {result.cell_id} at step {result.step}, planned was {planned}: submit it again"
    progress = f", step {now.status.step} of {cell.recipe.steps}" if now.status is not None else ""
    said = f" ({now.reason})" if now.reason else ""
    return f"{now.state}{progress}{said}: {ADVICE.get(now.state, 'submit it again')}"


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
