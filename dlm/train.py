"""train: one resolved config -> a trained, validated and recorded run. Called by launch.

The only file that knows module, data, callbacks and Trainer together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import platform
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from dlm import signals
from dlm.callbacks import callbacks_of, evenly
from dlm.callbacks.checkpoint import latest_whole, state_file
from dlm.callbacks.preemption import Preemption
from dlm.callbacks.record_writer import RecordWriter
from dlm.datamodules.prepare import ensure_data
from dlm.datamodules.slim_pajama import SlimPajamaDataModule
from dlm.errors import DivergedError, ExitCode, UserError, unknown
from dlm.files import Lease, read_json, write_atomic, write_json
from dlm.loggers import WandbLogger, end_wandb
from dlm.manifest import DataSet
from dlm.models.lightning_module import DiffusionLMLightningModule
from dlm.objectives import make_objective
from dlm.recipe import MIN_STEPS, Recipe, accumulation, derive
from dlm.record import (
    Result,
    State,
    Status,
    described,
    read_result,
    read_status,
    write_result,
    write_status,
    write_validation,
)

PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "wandb", "numpy")
NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in a plain RuntimeError
SLURM_FACTS = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_NODELIST", "JOB_PARTITION")
COMPUTED = {  # trainer keys that have another owner, and what to set instead
    "max_steps": "set training.budget or training.steps",
    "max_epochs": "set training.budget or training.steps",
    "accumulate_grad_batches": "set data.batch_size and data.micro_batch_size",
    "gradient_clip_val": "set optimizer.gradient_clip_val",
    "callbacks": "choose the group callbacks",
    "logger": "choose the group logger",
    "profiler": "set profiler=simple at the top level",
    "resume_from_checkpoint": "set ckpt_path=PATH",
    "val_check_interval": "set validation.times",
    "limit_val_batches": "set validation.num_sequences",
    "limit_train_batches": "set training.steps",
    "overfit_batches": "set training.steps",
}
OURS = ("threads", "attention", "compile", "activation_checkpointing")  # trainer keys that Lightning does not know
STRATEGIES = ("auto", "ddp", "fsdp2")
_BEGAN = time.time()
PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true")


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
    _quieten()
    threads = config["trainer"].get("threads")
    if threads is not None:
        torch.set_num_threads(int(threads))
    torch.set_float32_matmul_precision("high")
    L.seed_everything(config["seed"], verbose=False)
    trainer = make_trainer(config, recipe, run_dir)
    module, data = make_module_and_data(config, recipe, data_set, trainer.world_size)
    attempt = _write_environment(run_dir, trainer) if run_dir is not None and trainer.is_global_zero else {}
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


def _quieten() -> None:
    """Keep what Lightning says about itself out of the log; its warnings and errors stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # a profiler's table is what was asked for
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")  # ours seeks: FromOffset
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*srun. command is available.*")  # on a login node, or for a look
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated.*")  # its successor is too new
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist.*")  # it is reduced before
    warnings.filterwarnings("ignore", message=".*Experiment logs directory .* exists.*")


def make_module_and_data(
    config: Mapping[str, Any], recipe: Recipe, data_set: DataSet, world_size: int
) -> tuple[DiffusionLMLightningModule, SlimPajamaDataModule]:
    """The module and its data for ``world_size`` processes."""
    data, validation = config["data"], config["validation"]
    objective = make_objective(
        config["objective"],
        vocab_size=recipe.shape.vocab_size,
        bos_id=data_set.bos_id,
        estimator=validation["estimator"],
    )
    micro, accumulate = split_batch(config, recipe, world_size)
    return DiffusionLMLightningModule(recipe, objective, config), SlimPajamaDataModule(
        data_set,
        objective,
        block_size=recipe.block_size,
        stride=data["stride"],
        batch_size=recipe.global_batch_size,
        micro_batch_size=micro,
        accumulation=accumulate,
        steps=recipe.steps,
        seed=config["seed"],
        num_workers=data["num_workers"],
        num_sequences=validation["num_sequences"],
        draws=validation["draws"],
        validation_seed=validation["seed"],
    )


def split_batch(config: Mapping[str, Any], recipe: Recipe, world_size: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of a run on ``world_size`` devices."""
    return accumulation(
        batch_size=recipe.global_batch_size,
        micro_batch_size=config["data"]["micro_batch_size"],
        world_size=world_size,
        num_params=recipe.shape.num_params,
    )


def make_trainer(config: Mapping[str, Any], recipe: Recipe, run_dir: Path | None) -> L.Trainer:
    """Lightning's Trainer with what the recipe computes. Raises UserError for devices that are not there."""
    options = {key: value for key, value in config["trainer"].items() if key not in OURS}
    for key in COMPUTED:
        if key in options:
            raise UserError(f"trainer.{key} is computed by dlm: {COMPUTED[key]}")
    _, accumulate = split_batch(config, recipe, _world_size(options))
    interval = evenly(recipe.steps, config["validation"]["times"]) * accumulate
    options["strategy"] = _strategy(options["strategy"], _world_size(options))
    options["precision"] = _precision(options["precision"], options["accelerator"])
    options["log_every_n_steps"] = options["log_every_n_steps"] or evenly(recipe.steps, 100)
    logger = _logger(config, run_dir)
    callbacks = [] if run_dir is None else _instantiate_all(config["callbacks"], logs=bool(logger))
    try:
        return L.Trainer(
            max_steps=recipe.steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            val_check_interval=interval,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_checkpointing=run_dir is not None,
            enable_model_summary=False,
            enable_progress_bar=any("progress" in type(callback).__name__.lower() for callback in callbacks),
            logger=logger,
            callbacks=callbacks,
            default_root_dir=run_dir,
            plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
            profiler=config["profiler"],
            **options,
        )
    except Exception as error:
        if type(error).__name__ == "MisconfigurationException" or isinstance(error, (TypeError, ValueError)):
            raise UserError(f"Lightning refuses the trainer: {' '.join(str(error).split())}") from error
        raise


def _world_size(options: Mapping[str, Any]) -> int:
    devices = options["devices"]
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"trainer.devices is {devices!r}: it must be a whole number of at least 1")
    return devices * int(options["num_nodes"])


def _strategy(name: str, world_size: int) -> Any:
    """Lightning's strategy by name. Raises UserError for a name that is not among STRATEGIES."""
    if name not in STRATEGIES:
        raise unknown("trainer.strategy", name, STRATEGIES)
    if name == "ddp":  # the only buffers are the rotary tables, the same everywhere
        return DDPStrategy(broadcast_buffers=False)
    if name == "fsdp2":  # one whole file for a checkpoint, so that it loads under any strategy and world size
        return ModelParallelStrategy(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return name


def _precision(precision: str, accelerator: str) -> str:
    """bf16 where the device has it, when ``auto``. Raises UserError for what there is not."""
    if precision not in PRECISIONS:
        raise unknown("trainer.precision", precision, PRECISIONS)
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16-mixed" if has_bf16 else "32-true"
    if on_gpu and precision.startswith("bf16") and not has_bf16:
        raise UserError(f"trainer.precision {precision} needs a device with bfloat16, this one has none: set 32-true")
    if precision == "16-mixed" and not on_gpu:  # Lightning would take bf16-mixed instead
        raise UserError("trainer.precision 16-mixed needs a GPU: set bf16-mixed or 32-true")
    return precision


def _instantiate_all(nodes: Mapping[str, Any], *, logs: bool) -> list[L.Callback]:
    """The configured callbacks; without a logger Lightning's LearningRateMonitor has nowhere to write."""
    callbacks = [hydra.utils.instantiate(node) for node in nodes.values() if node is not None]
    return [callback for callback in callbacks if logs or not isinstance(callback, LearningRateMonitor)]


def _logger(config: Mapping[str, Any], run_dir: Path | None) -> Any:
    """The configured logger; False for none and for a development run."""
    if run_dir is None or not config["logger"].get("_target_"):
        return False
    return hydra.utils.instantiate(config["logger"])


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


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def _write_environment(run_dir: Path, trainer: L.Trainer) -> dict[str, Any]:
    """env.json: where and with what each attempt ran, oldest first. Returns what of it goes to W&B as well."""
    path = run_dir / "env.json"
    attempts = read_json(path)["attempts"] if path.is_file() else []
    attempts.append(
        {
            "started": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "submission": os.environ.get("DLM_SUBMISSION"),
            "code": os.environ.get("DLM_CODE"),  # the snapshot; None: the live code
            "slurm": {name: os.environ[f"SLURM_{name}"] for name in SLURM_FACTS if f"SLURM_{name}" in os.environ},
            "device": device_name(trainer.strategy.root_device),
            "num_devices": trainer.world_size,
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in PACKAGES},
            "command": sys.argv,
            **_git(),
        }
    )
    write_json(path, {"attempts": attempts})
    return {"attempt": len(attempts), **{key: attempts[-1][key] for key in ("git_sha", "device")}}


def _git() -> dict[str, Any]:
    """The commit that this code is of, and whether it was changed; nothing where there is no repository."""
    if "DLM_GIT_SHA" in os.environ:  # a submitted job runs a copy, whose origin the submitter knows
        return {"git_sha": os.environ["DLM_GIT_SHA"], "git_dirty": os.environ.get("DLM_GIT_DIRTY") == "1"}
    root = Path(__file__).resolve().parents[1]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        sha = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output(["git", "status", "--porcelain", "dlm", "configs"], cwd=root, text=True)
        return {"git_sha": sha.strip(), "git_dirty": bool(changed.strip())}
    return {"git_sha": None, "git_dirty": None}
