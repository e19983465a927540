"""Turn one resolved config into a trained, validated and recorded run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_only

from dlm.core import signals
from dlm.core.checks import whole
from dlm.core.errors import ExitCode, UserError
from dlm.core.files import patiently, write_atomic
from dlm.core.lease import Lease
from dlm.core.names import inside
from dlm.core.recipe import Recipe
from dlm.data.manifest import DataSet
from dlm.record.outcomes import State
from dlm.record.run import (
    Result,
    Status,
    checkpoint_folder,
    read_result,
    read_status,
    write_result,
    write_status,
    write_validation,
)
from dlm.record.wandb import described
from dlm.train.attempt import device_name, write_environment
from dlm.train.batches import PackedDataModule
from dlm.train.callbacks import callbacks_of
from dlm.train.callbacks.preemption import Preemption
from dlm.train.callbacks.record_writer import RecordWriter
from dlm.train.checkpoint_files import damage, latest_whole, load_state, state_file
from dlm.train.endings import DONE, STOPPED, Ending, disk_full, ending_of
from dlm.train.models.lightning_module import DiffusionLMLightningModule
from dlm.train.objectives import make_objective
from dlm.train.trainer import make_trainer, quieten_lightning
from dlm.train.wandb_logger import WandbLogger, end_wandb


def run(config: Mapping[str, Any], recipe: Recipe, data_set: DataSet) -> ExitCode:
    """Train, validate and record a run that is not done, or resume it from its newest checkpoint.

    In a run on several devices, every process calls this function.

    Args:
        config: The composed config, resolved and filled (dlm.core.recipe.fill).
        recipe: The recipe that was derived from ``config``, and
        data_set: the data that it names (dlm.train.before.checked).

    Returns:
        The exit code that states how the run ended.

    Raises:
        UserError: The config does not describe a valid run.
    """
    started = time.time()
    run_dir = Path(config["paths"]["run_dir"])
    if config["trainer"]["fast_dev_run"]:
        _fit(config, recipe, data_set, None)
        print(f"fast_dev_run: {int(config['trainer']['fast_dev_run'])} steps ran, nothing was kept")
        return ExitCode.DONE
    if _rank():
        code = _beside_the_first(config, recipe, data_set, run_dir, started)
    else:
        with Lease(run_dir):
            code = _recorded(config, recipe, data_set, run_dir, started)
    if code is ExitCode.PREEMPTED:
        _wait_for_all()
    return code


def _wait_for_all() -> None:
    """Wait until every rank has come here, because srun kills the other ranks once one has left with an exit code."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # a rank that has gone already cannot be waited for
            torch.distributed.barrier()


def _rank() -> int:
    """Return the rank of this process in the run. Rank 0 holds the lease and keeps the record."""
    return getattr(rank_zero_only, "rank", 0)


def _recorded(config: Mapping[str, Any], recipe: Recipe, data_set: DataSet, run_dir: Path, started: float) -> ExitCode:
    """Run rank 0 while it holds the lease, and write to status.json how the attempt ended, even after an error."""
    write_atomic(run_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    ending = Ending(state=State.FAILED, reason="ended by an error of dlm, see log.txt", is_raised=True)
    stopped_at = None
    try:
        stopped_at = _fit(config, recipe, data_set, run_dir)
        ending = DONE if stopped_at is None else STOPPED
    except BaseException as error:
        ending = ending_of(error, run_dir)
        if disk_full(error):
            logging.raiseExceptions = False  # W&B's log cannot be written either and would print a traceback
        if ending.complaint is not None:
            print(f"dlm: {ending.complaint}", file=sys.stderr)
        if ending.is_raised:
            raise
    finally:
        _record_ending(run_dir, recipe, ending, started, stopped_at)
        end_wandb(ending.exit_code)
        signals.forget()
    return ending.exit_code


def _beside_the_first(
    config: Mapping[str, Any], recipe: Recipe, data_set: DataSet, run_dir: Path, started: float
) -> ExitCode:
    """Run a process with a rank above 0.

    Rank 0 records the outcomes that all ranks share. Memory can run out on a single rank; that rank then records the
    outcome itself.
    """
    try:
        is_stopped = _fit(config, recipe, data_set, run_dir) is not None
    except Exception as error:
        ending = ending_of(error, run_dir)
        if ending.state is State.OUT_OF_MEMORY:
            _record_ending(run_dir, recipe, ending, started)
            return ending.exit_code
        if ending.state is not State.DIVERGED:
            raise
        is_stopped = False
    return STOPPED.exit_code if is_stopped else ExitCode.DONE


def _record_ending(
    run_dir: Path, recipe: Recipe, ending: Ending, started: float, stopped_at: int | None = None
) -> None:
    """Write to status.json how this attempt, which began at ``started``, ended, and where a signal stopped it."""
    now = time.time()
    status = read_status(run_dir) or Status(
        state=ending.state, step=0, steps=recipe.steps, attempts=1, started=now, updated=now
    )
    submission = os.environ.get("DLM_SUBMISSION")
    if (status.state, status.submission) == (State.OUT_OF_MEMORY, submission) and status.started >= started:
        return  # another rank ran out of memory, which caused this ending, and has recorded it
    if ending.state is State.DONE and (result := read_result(run_dir)):
        status = dataclasses.replace(status, step=result.step, loss=result.loss, gpu_hours=result.gpu_hours)
    if stopped_at is not None:
        status = dataclasses.replace(status, step=stopped_at)
    reason = f"stopped at step {status.step:,} of {status.steps:,}" if ending is STOPPED else ending.reason
    status = dataclasses.replace(
        status,
        state=ending.state,
        exit_code=int(ending.exit_code),
        reason=reason,
        phase=None,
        submission=submission,
        updated=now,
    )
    try:
        patiently(run_dir, lambda: write_status(run_dir, status))
    except OSError as error:  # the exit code still states the outcome
        print(f"dlm: {run_dir / 'status.json'} cannot be written ({error})", file=sys.stderr)


def _fit(config: Mapping[str, Any], recipe: Recipe, data_set: DataSet, run_dir: Path | None) -> int | None:
    """Train to the last step, from a checkpoint if there is one, and write the result.

    Returns the step at which a signal stopped the run, or None if it is done.
    """
    _set_up_torch(config)
    trainer = make_trainer(config, recipe, run_dir)
    objective = make_objective(config, vocab_size=recipe.shape.vocab_size, bos_id=data_set.bos_id)
    module = DiffusionLMLightningModule(recipe, objective, config)
    data = PackedDataModule(data_set, objective, recipe, config)
    attempt = write_environment(run_dir, trainer) if run_dir is not None and trainer.is_global_zero else {}
    start = _start_from(config, run_dir)
    if start is not None:
        module.check_checkpoint(load_state(start, device="meta"), data_hash=data_set.hash)
    preemptions = [callback for callback in callbacks_of(trainer) if isinstance(callback, Preemption)]
    for preemption in preemptions:
        preemption.take_signals()
    try:
        if trainer.logger is not None and trainer.is_global_zero:
            trainer.logger.log_hyperparams(described(config, recipe, data_hash=data_set.hash, **attempt))
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    finally:
        for preemption in preemptions:
            preemption.return_signals()
    if any(preemption.requested for preemption in preemptions) and trainer.global_step < recipe.steps:
        return trainer.global_step
    if run_dir is not None:
        if module.validated_step != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
        if trainer.is_global_zero:
            _write_result(trainer, module, data, run_dir)
    return None


def _set_up_torch(config: Mapping[str, Any]) -> None:
    quieten_lightning()
    threads = config["trainer"].get("threads")
    if threads is not None:
        torch.set_num_threads(int(threads))
    torch.set_float32_matmul_precision("high")
    L.seed_everything(config["seed"], verbose=False)


def _start_from(config: Mapping[str, Any], run_dir: Path | None) -> Path | None:
    """Return the checkpoint to start from; None to start from nothing.

    This is the newest complete checkpoint of this run, else ``ckpt_path``, else that of the trunk, if it is complete.
    """
    own = None if run_dir is None else latest_whole(run_dir)
    if own is not None:
        if not _rank():
            print(f"going on from {own.name}")
        return state_file(own)
    if config["ckpt_path"] is not None:
        return state_file(Path(config["ckpt_path"]))
    return None if run_dir is None or config.get("parent") is None else _branch_point(config, run_dir)


def _branch_point(config: Mapping[str, Any], run_dir: Path) -> Path | None:
    """Return the checkpoint of the trunk to start from; None if it is missing or damaged.

    From nothing, a branch takes longer and ends with the same losses. Raises UserError for a schedule other than wsd.
    """
    if config["scheduler"]["name"] != "wsd":
        raise UserError(
            f"parent is {config['parent']} and scheduler.name is {config['scheduler']['name']}: only a wsd run can "
            "start from a checkpoint of a longer run and end as it would from nothing; set parent=null"
        )
    trunk, step = inside(run_dir.parent, config["parent"]), whole("branch_step", config["branch_step"])
    checkpoint = checkpoint_folder(trunk, step)
    reason = damage(checkpoint) if checkpoint.is_dir() else _why_missing(trunk)
    if not _rank():
        what = f"the checkpoint of its trunk {trunk.name} at step {step}"
        print(f"starting from {what}" if reason is None else f"starting from nothing instead of {what}: {reason}")
    return state_file(checkpoint) if reason is None else None


def _why_missing(trunk: Path) -> str:
    result = read_result(trunk)
    if result is not None and result.stopped_early:
        return f"the trunk stopped early, at step {result.step}"
    return "it does not exist"


def _write_result(
    trainer: L.Trainer, module: DiffusionLMLightningModule, data: PackedDataModule, run_dir: Path
) -> None:
    """Write validation.csv and result.json, also for a run that a callback has stopped before its planned last step.

    Raises UserError if the time of ``trainer.max_time`` is over, because such a run may go on.
    """
    recipe, seed, step = module.recipe, module.config["seed"], trainer.global_step
    if step != recipe.steps and any(isinstance(one, Timer) and _is_over(one) for one in callbacks_of(trainer)):
        raise UserError(
            f"trainer.max_time ended the run at step {step} of {recipe.steps}: no result is written; start it again to "
            "go on"
        )
    record = next(callback for callback in callbacks_of(trainer) if isinstance(callback, RecordWriter))
    loss, error = module.validation_loss
    print(f"{run_dir.name}: {loss:.4f} +- {error:.4f} nats/token after {step} steps, {record.wall_sec:.0f} s")
    if step != recipe.steps:
        print(f"{run_dir.name} stopped early, at step {step} of {recipe.steps}: laws leave it out")
    seen, tokens = step * recipe.global_batch_size, step * recipe.tokens_per_step
    patiently(run_dir, lambda: write_validation(run_dir, *module.validation_terms.T.tolist()))
    result = Result(
        cell_id=module.config["cell_id"],
        step=step,
        tokens=tokens,
        loss=loss,
        loss_se=error,
        estimator=module.objective.estimator,
        wall_sec=record.wall_sec,
        tokens_per_sec=tokens / record.training_sec,
        device=device_name(module.device),
        num_devices=trainer.world_size,
        gpu_hours=record.gpu_hours,
        attempts=record.attempts,
        steps_redone=record.steps_redone,
        unique_tokens=data.train_tokens.unique_tokens(seen, seed=seed),
        epochs=data.train_tokens.epochs(seen, seed=seed),
        data_hash=data.data_set.hash,
        unigram_entropy=data.unigram_entropy(),
        finished=time.time(),
        stopped_early=step != recipe.steps,
    )
    patiently(run_dir, lambda: write_result(run_dir, result))
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_result(dataclasses.asdict(result))


def _is_over(timer: Timer) -> bool:
    left = timer.time_remaining()
    return left is not None and left <= 0
