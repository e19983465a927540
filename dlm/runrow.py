"""runrow: what was found of one cell -> its row of runs.csv, or the reason why it has none. Called by collect.

The order of trust: the run directory, its .wandb files, the W&B server. What they do not agree on becomes a warning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.crosscheck import check_history, check_value
from dlm.errors import UserError
from dlm.files import read_json
from dlm.groups import load_yaml
from dlm.history import History, from_rows
from dlm.identity import cell_id
from dlm.ledger import CellNow
from dlm.recipe import Recipe, derive
from dlm.record import Result, RunRow, State, logged_result, read_result
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
class Logged:
    """What one W&B source, named in the table and in words, knows of a run."""

    source: str  # wandb (local files) or wandb_api
    where: str  # "the W&B file" or "the W&B server"
    run: WandbRun
    history: History
    read: bool  # whether the rows behind ``history`` were read just now

    @classmethod
    def of(cls, run: WandbRun, name: str, *, source: str, key: Any, read: bool = True) -> Logged:
        """From a run as W&B tells it; its history merged on the optimiser step."""
        where = {"wandb": "the W&B file", "wandb_api": "the W&B server"}[source]
        return cls(source=source, where=where, run=run, history=from_rows(run.history, name, key, []), read=read)

    @property
    def result(self) -> Result | None:
        """The result that the run logged at its end."""
        return logged_result(self.run.summary)


@dataclass(kw_only=True)
class CellFiles:
    """One cell with everything that was found of it."""

    name: str
    sweep: str
    run_dir: Path
    config: Mapping[str, Any]
    recipe: Recipe
    now: CellNow
    data_hash: str | None
    history: History  # of metrics.jsonl
    logged: list[Logged] = field(default_factory=list)  # by W&B, the most trusted first
    source: str = "run_dir"  # of ``now.result``
    warnings: list[str] = field(default_factory=list)

    @property
    def run_id(self) -> str:
        """Its id in W&B."""
        return f"{self.sweep}-{self.name}"

    def warn(self, lines: Iterable[str]) -> None:
        self.warnings += [f"{self.name}: {line}" for line in lines]

    @property
    def best_history(self) -> History:
        """The history of the first source that has one."""
        found = [self.history, *(one.history for one in self.logged)]
        return next((history for history in found if history.num_rows), self.history)


def run_row(cell: CellFiles) -> tuple[dict[str, Any], str | None]:
    """(row of RunRow's columns, reason to exclude it or None)."""
    if cell.now.result is None:
        _take_logged_result(cell)
    known = _planned_columns(cell) | _measured_columns(cell)
    if cell.now.result is not None:
        result, source = cell.now.result, cell.source
        final = {"loss": result.loss, "loss_se": result.loss_se, "source": source, "estimator": result.estimator}
        _cross_check(cell, final)
        reason = None if math.isfinite(result.loss) else f"its loss is {result.loss}"
        reason = reason or _foreign(cell, result, source)
        return dataclasses.asdict(RunRow(**{**known, **final})), reason
    final = _final_without_result(cell)
    if final:
        return dataclasses.asdict(RunRow(**{**known, **final})), None
    return dataclasses.asdict(RunRow(**known)), _reason(cell)


def _take_logged_result(cell: CellFiles) -> None:
    """Where the run directory has no result of the planned last step, W&B may have it."""
    if cell.now.state in (State.RUNNING, State.SUBMITTED) or read_result(cell.run_dir) is not None:
        return
    for one in cell.logged:
        result = one.result
        if result is not None and (result.cell_id, result.step) == (cell.name, cell.recipe.steps):
            cell.now = dataclasses.replace(cell.now, state=State.DONE, reason=None, result=result)
            cell.source = one.source
            return


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


def _cross_check(cell: CellFiles, final: Mapping[str, Any]) -> None:
    """Warn of every number that the sources do not agree on."""
    step = cell.recipe.steps
    named = [("metrics.jsonl", cell.history), *((one.where, one.history) for one in cell.logged)]
    first = "result.json" if final["source"] == "run_dir" else "the result in W&B"
    for name, history in named:
        loss, error = history.at(step)
        cell.warn(check_value(f"val/loss at step {step}", final["loss"], loss, first, name))
        cell.warn(check_value(f"val/loss_se at step {step}", final["loss_se"], error, first, name))
    if not cell.history.num_rows:
        return
    ours = cell.history.rows() if cell.logged else []
    for one in (one for one in cell.logged if one.read):
        cell.warn(check_history(ours, one.history.rows(), one.where))


def _final_without_result(cell: CellFiles) -> dict[str, Any]:
    """Where there is no result: the loss at the planned last step from metrics.jsonl, else from W&B, else {}."""
    if cell.now.state in (State.RUNNING, State.SUBMITTED) or read_result(cell.run_dir) is not None:
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


def _foreign(cell: CellFiles, result: Result, source: str) -> str | None:
    """Why a result is not of the cell it lies with: the config that it ran with must have the id of the cell."""
    where = "config.yaml" if source == "run_dir" else "config in W&B"
    known = cell.history.config_id if source == "run_dir" else None
    if known is None or known[0] != result.data_hash:
        try:
            config = _config_behind(cell, source)
            if not config:
                cell.warn([f"{where} is absent: that its result is of this cell was not checked"])
                return None
            known = [result.data_hash, cell_id(config, steps=derive(config).steps, data_hash=result.data_hash)]
        except (UserError, KeyError, TypeError, AttributeError) as error:
            cell.warn([f"{where} cannot be read ({error}): that its result is of this cell was not checked"])
            return None
        if source == "run_dir":
            cell.history.config_id = known
    if known[1] != cell.name:
        return f"another config: its {where} is that of {known[1]}, another run: move it away, then submit it again"
    return None


def _config_behind(cell: CellFiles, source: str) -> Any:
    """The config that the run had which gave the result; None where it is not there."""
    if source == "run_dir":
        path = cell.run_dir / "config.yaml"
        return load_yaml(path) if path.is_file() else None
    return next(one.run.config for one in cell.logged if one.source == source)


def _reason(cell: CellFiles) -> str:
    """Why a cell has no row in runs.csv, and what to do."""
    now = cell.now
    result = read_result(cell.run_dir) or next((one.result for one in cell.logged if one.result is not None), None)
    if result is not None:
        planned = f"{cell.name} at step {cell.recipe.steps}"
        short = "short: " if result.cell_id == cell.name and result.step < cell.recipe.steps else ""
        return f"{short}its result is of {result.cell_id} at step {result.step}, planned was {planned}: submit it again"
    last = cell.best_history.last_step
    step = now.status.step if now.status is not None else last
    progress = f", step {step} of {cell.recipe.steps}" if step is not None else ""
    said = f" ({now.reason})" if now.reason else ""
    advice = ADVICE.get(now.state, "submit it again")
    if now.state not in (State.RUNNING, State.SUBMITTED) and last is not None and last >= cell.recipe.steps:
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
