"""Build the Lightning trainer, the module and the data of one run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from dlm.core.errors import UserError, unknown
from dlm.core.recipe import Recipe, accumulation
from dlm.data.manifest import DataSet
from dlm.train.batches import SlimPajamaDataModule
from dlm.train.callbacks import evenly
from dlm.train.models.lightning_module import DiffusionLMLightningModule
from dlm.train.objectives import make_objective

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


PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true")


def quieten_lightning() -> None:
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
