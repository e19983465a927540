"""train: one resolved config -> a trained, validated and recorded run. Called by launch.

The only file that knows module, data, callbacks and Trainer together.
"""

from __future__ import annotations

import dataclasses
import errno
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
from lightning.pytorch.utilities import rank_zero_only

from dlm.core import signals
from dlm.core.errors import DivergedError, ExitCode, UserError
from dlm.core.files import write_atomic
from dlm.core.lease import Lease
from dlm.core.recipe import MIN_STEPS, Recipe, derive
from dlm.data.manifest import DataSet
from dlm.data.prepare.command import ensure_data
from dlm.record.outcomes import State
from dlm.record.run import Result, Status, read_result, read_status, write_result, write_status, write_validation
from dlm.record.wandb import described
from dlm.train.attempt import device_name, write_environment
from dlm.train.batches import SlimPajamaDataModule
from dlm.train.callbacks import callbacks_of
from dlm.train.callbacks.checkpoint import latest_whole, state_file
from dlm.train.callbacks.preemption import Preemption
from dlm.train.callbacks.record_writer import RecordWriter
from dlm.train.models.lightning_module import DiffusionLMLightningModule
from dlm.train.trainer import make_module_and_data, make_trainer, quieten_lightning
from dlm.train.wandb_logger import WandbLogger, end_wandb

NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in a plain RuntimeError


_BEGAN = time.time()


def run(config: Mapping[str, Any]) -> ExitCode:
    """Train, validate and record the run of ``config`` (resolved), or go on with it; says how it ended.

    Raises UserError before anything is written where the config makes no run.
    """
    recipe = derive(config)
    if config["training"]["steps"] is None and recipe.steps < MIN_STEPS:
        raise UserError(
            f"training.budget {config['training']['budget']:g} gives {recipe.steps} steps of "
            f"{recipe.tokens_per_step} tokens, fewer than {MIN_STEPS}: raise training.budget, lower data.batch_size "
            "or choose a smaller model"
        )
    training = config["training"]
    if training["steps"] is not None and training["budget"] is not None:
        print(f"training.steps {recipe.steps} counts, training.budget {training['budget']:g} does not")
    data_set = check_data(config, recipe)
    run_dir = Path(config["paths"]["run_dir"])
    if config["trainer"]["fast_dev_run"]:
        _fit(config, recipe, data_set, None)
        print(f"fast_dev_run: {int(config['trainer']['fast_dev_run'])} steps ran, nothing was kept")
        return ExitCode.DONE
    result = read_result(run_dir)
    if result is not None and (result.cell_id, result.step) == (config["cell_id"], recipe.steps):
        print(f"{run_dir.name} is done: {result.loss:.4f} nats/token, nothing to train")
        return ExitCode.DONE
    if getattr(rank_zero_only, "rank", 0):  # another process of the run: the first holds the lease and keeps the record
        return _beside_the_first(config, recipe, data_set, run_dir)
    with Lease(run_dir):
        return _recorded(config, recipe, data_set, run_dir)


def _beside_the_first(config: Mapping[str, Any], recipe: Recipe, data_set: DataSet, run_dir: Path) -> ExitCode:
    """What all processes come to, the first says. Memory can run out in one alone, and then that one says it."""
    try:
        _fit(config, recipe, data_set, run_dir)
    except DivergedError:
        pass
    except Exception as error:
        reason = out_of_memory(error)
        if reason is None:
            raise
        _last_word(run_dir, recipe, State.OUT_OF_MEMORY, ExitCode.OUT_OF_MEMORY, reason)
        return ExitCode.OUT_OF_MEMORY
    return ExitCode.DONE


def out_of_memory(error: BaseException) -> str | None:
    """What an exception says of memory that ran out; None when it is of something else."""
    line = str(error).split("\n")[0]
    torchs = isinstance(error, RuntimeError) and any(words in line for words in NO_MEMORY)
    return line or "MemoryError" if torchs or isinstance(error, (torch.OutOfMemoryError, MemoryError)) else None


def disk_full(error: BaseException | None) -> bool:
    """Whether that is behind an exception."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_data(config: Mapping[str, Any], recipe: Recipe) -> DataSet:
    """The run's data. Raises UserError when they are not prepared or have another vocabulary."""
    data_set = ensure_data(config["data"])
    if data_set.vocab_size != recipe.shape.vocab_size:
        raise UserError(
            f"model.vocab_size {recipe.shape.vocab_size} is not the {data_set.vocab_size} of the data "
            f"{config['data']['name']}: choose another model or data, or set model.vocab_size={data_set.vocab_size}"
        )
    return data_set


def _recorded(config: Mapping[str, Any], recipe: Recipe, data_set: DataSet, run_dir: Path) -> ExitCode:
    """Run under the lease, and leave a last word in status.json however it ends."""
    write_atomic(run_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    reason: str | None
    code, reason, state = ExitCode.BUG, "ended by an error of dlm, see log.txt", State.FAILED
    try:
        preempted = _fit(config, recipe, data_set, run_dir)
        code, reason, state = ExitCode.DONE, None, State.DONE
        if preempted:
            code, reason, state = ExitCode.PREEMPTED, "stopped by a signal, to be continued", State.PREEMPTED
    except UserError as error:
        code, reason, state = ExitCode.USER_ERROR, str(error), State.BAD_CONFIG
        raise
    except DivergedError as error:
        code, reason, state = ExitCode.DIVERGED, str(error), State.DIVERGED
        print(f"dlm: {error}", file=sys.stderr)
    except BaseException as error:
        reason = out_of_memory(error)
        if reason is not None:
            code, state = ExitCode.OUT_OF_MEMORY, State.OUT_OF_MEMORY
            print(f"dlm: out of memory: {reason}: lower data.micro_batch_size", file=sys.stderr)
        elif disk_full(error):
            reason = f"no space left on the disk of {run_dir}: make room and start it again, whole checkpoints stay"
            print(f"dlm: {reason}", file=sys.stderr)
            logging.raiseExceptions = False  # W&B's own log has no room either, and would say so at length
        elif isinstance(error, ConnectionError) and signals.asked_to_stop():
            code, state, reason = ExitCode.PREEMPTED, State.PREEMPTED, "stopped by a signal while it started"
            # by W&B's process, which took the signal to heart before ours could take a step
        else:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise
    finally:
        _last_word(run_dir, recipe, state, code, reason)
        end_wandb(code)
        signals.forget()
    return code


def _last_word(run_dir: Path, recipe: Recipe, state: State, code: ExitCode, reason: str | None) -> None:
    now = time.time()
    status = read_status(run_dir) or Status(
        state=state, step=0, steps=recipe.steps, attempts=1, started=now, updated=now
    )
    result = read_result(run_dir) if state is State.DONE else None
    known: dict[str, Any] = {}
    if result is not None:
        known = {"step": result.step, "loss": result.loss, "gpu_hours": result.gpu_hours}
    submission = os.environ.get("DLM_SUBMISSION")
    if (status.state, status.submission) == (State.OUT_OF_MEMORY, submission) and status.started >= _BEGAN:
        return  # another process of this run knew the cause, and ours is only what came of it
    word = dataclasses.replace(
        status, state=state, exit_code=int(code), reason=reason, submission=submission, updated=now, **known
    )
    try:
        write_status(run_dir, word)
    except OSError as error:  # the exit code says it too
        print(f"dlm: {run_dir / 'status.json'} cannot be written ({error})", file=sys.stderr)


def _fit(config: Mapping[str, Any], recipe: Recipe, data_set: DataSet, run_dir: Path | None) -> bool:
    """Train from the newest whole checkpoint to the last step and write the result. True when preempted."""
    quieten_lightning()
    threads = config["trainer"].get("threads")
    if threads is not None:
        torch.set_num_threads(int(threads))
    torch.set_float32_matmul_precision("high")
    L.seed_everything(config["seed"], verbose=False)
    trainer = make_trainer(config, recipe, run_dir)
    module, data = make_module_and_data(config, recipe, data_set, trainer.world_size)
    attempt = write_environment(run_dir, trainer) if run_dir is not None and trainer.is_global_zero else {}
    start = _start_from(config, run_dir)
    if start is not None:
        module.check_checkpoint(torch.load(start, map_location="meta", weights_only=True))
    preemptions = [callback for callback in callbacks_of(trainer) if isinstance(callback, Preemption)]
    for preemption in preemptions:
        preemption.take_signals()
    try:
        _describe(config, recipe, data_set, trainer, attempt)
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    finally:
        for preemption in preemptions:
            preemption.return_signals()
    if any(preemption.requested for preemption in preemptions) and trainer.global_step < recipe.steps:
        return True
    if run_dir is not None:
        if module.validated_step != recipe.steps:
            trainer.validate(module, datamodule=data, verbose=False)
        if trainer.is_global_zero:
            _write_result(config, recipe, data_set, trainer, module, data, run_dir)
    return False


def _describe(
    config: Mapping[str, Any], recipe: Recipe, data_set: DataSet, trainer: L.Trainer, attempt: Mapping[str, Any]
) -> None:
    """Tell the logger what runs: all that a run directory says of it before its first step."""
    if trainer.logger is not None and trainer.is_global_zero:
        trainer.logger.log_hyperparams(described(config, recipe, data_hash=data_set.hash, **attempt))


def _start_from(config: Mapping[str, Any], run_dir: Path | None) -> Path | None:
    """The checkpoint to go on from: the run's own newest whole one, else ``ckpt_path``, else none."""
    if run_dir is not None:
        own = latest_whole(run_dir)
        if own is not None:
            if getattr(rank_zero_only, "rank", 0) == 0:
                print(f"going on from {own.name}")
            return state_file(own)
    return None if config["ckpt_path"] is None else state_file(Path(config["ckpt_path"]))


def _write_result(
    config: Mapping[str, Any],
    recipe: Recipe,
    data_set: DataSet,
    trainer: L.Trainer,
    module: DiffusionLMLightningModule,
    data: SlimPajamaDataModule,
    run_dir: Path,
) -> None:
    """result.json, when the planned last step was reached."""
    record = next(callback for callback in callbacks_of(trainer) if isinstance(callback, RecordWriter))
    if trainer.global_step != recipe.steps:
        raise UserError(f"stopped at step {trainer.global_step} of {recipe.steps}: no result is written, see callbacks")
    loss, error = module.validation_loss
    print(f"{run_dir.name}: {loss:.4f} +- {error:.4f} nats/token after {recipe.steps} steps, {record.wall_sec:.0f} s")
    seen = recipe.steps * recipe.global_batch_size
    losses, variances = module.validation_terms.T.tolist()
    write_validation(run_dir, losses, variances)
    result = Result(
        cell_id=config["cell_id"],
        step=recipe.steps,
        tokens=recipe.tokens,
        loss=loss,
        loss_se=error,
        estimator=module.objective.estimator,
        wall_sec=record.wall_sec,
        tokens_per_sec=recipe.tokens / record.training_sec,
        device=device_name(module.device),
        num_devices=trainer.world_size,
        gpu_hours=record.gpu_hours,
        attempts=record.attempts,
        steps_redone=record.steps_redone,
        unique_tokens=data.train_tokens.unique_tokens(seen, seed=config["seed"]),
        epochs=data.train_tokens.epochs(seen, seed=config["seed"]),
        data_hash=data_set.hash,
        unigram_entropy=data.unigram_entropy(),
        finished=time.time(),
    )
    write_result(run_dir, result)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_result(dataclasses.asdict(result))
