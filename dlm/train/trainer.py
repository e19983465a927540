"""Build the Lightning trainer of one run from its config."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.strategies import DDPStrategy

from dlm.core.checks import SHARDED, whole
from dlm.core.errors import UserError
from dlm.core.memory import micro_batch_limit
from dlm.core.objectives import objective_info
from dlm.core.recipe import Recipe, accumulation
from dlm.train.callbacks import evenly
from dlm.train.callbacks.record_writer import RecordWriter
from dlm.train.instantiate import made
from dlm.train.sharding import ShardedStrategy

OURS = (  # trainer keys that Lightning does not know
    "threads", "attention", "cross_entropy", "compile", "activation_checkpointing", "fsdp_wrap", "fsdp_shard_over",
    "process_group_timeout",
)  # fmt: skip
IGNORED_WARNINGS = (
    "isinstance.treespec, LeafSpec",
    "dataloader is not resumable",  # dlm's is resumable: FromOffset starts at the current step
    "does not have many workers",
    "srun. command is available",  # true on every login node
    "broadcast_buffers. is deprecated",  # its replacement is missing in the oldest PyTorch that dlm supports
    "recommended to use `self.log.*sync_dist",  # the value is reduced before it is logged
    "Experiment logs directory .* exists",
)


def quieten_lightning() -> None:
    """Hide Lightning's informational messages and IGNORED_WARNINGS; its other warnings and its errors are shown."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # a profiler logs its table at this level
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def make_trainer(config: Mapping[str, Any], recipe: Recipe, run_dir: Path | None) -> L.Trainer:
    """Build Lightning's Trainer.

    Args:
        config: The complete config of the run.
        recipe: The recipe that was derived from ``config``.
        run_dir: The run directory; None for a fast_dev_run, which has neither callbacks nor a logger.

    Raises:
        UserError: The batch cannot be divided over the devices, or Lightning rejects an argument.
    """
    options = {key: value for key, value in config["trainer"].items() if key not in OURS}
    for key in ("devices", "num_nodes"):
        options[key] = whole(f"trainer.{key}", options[key])
    world_size = options["devices"] * options["num_nodes"]
    _, accumulate = accumulation(
        batch_size=recipe.global_batch_size,
        micro_batch_size=config["data"]["micro_batch_size"],
        world_size=world_size,
        limit=micro_batch_limit(
            recipe.shape,
            objective_info(config["objective"]["name"]),
            config["trainer"],
            block_size=recipe.block_size,
            memory_bytes=gpu_memory(options["accelerator"]),
        ),
    )
    options["strategy"] = _strategy(config["trainer"], devices=options["devices"], num_nodes=options["num_nodes"])
    options["precision"] = resolved_precision(options["precision"], options["accelerator"])
    options["log_every_n_steps"] = options["log_every_n_steps"] or evenly(recipe.steps, 100)
    logger = run_dir is not None and _logger(config)
    callbacks = [] if run_dir is None else _callbacks(config, logs=bool(logger))
    try:
        return L.Trainer(
            max_steps=recipe.steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            val_check_interval=evenly(recipe.steps, config["validation"]["times"]) * accumulate,
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
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"Lightning refuses the trainer: {' '.join(str(error).split())}") from error


def _strategy(how: Mapping[str, Any], *, devices: int, num_nodes: int) -> Any:
    """Return the argument ``strategy`` of Lightning's Trainer.

    Args:
        how: The config node ``trainer``.
        devices: The number of processes on each node.
        num_nodes: The number of nodes.
    """
    name, seconds = how["strategy"], how.get("process_group_timeout")
    timeout: Any = {} if seconds is None else {"timeout": timedelta(seconds=seconds)}
    world_size = devices * num_nodes
    if name == "ddp" or (name == "auto" and world_size > 1):
        # The only buffers are the rotary tables, which are the same in every process. Every parameter gets a gradient,
        # so find_unused_parameters stays off: it would search the graph at every step.
        return DDPStrategy(broadcast_buffers=False, **timeout)
    if name in SHARDED:
        over = how.get("fsdp_shard_over", "auto")
        inside_nodes = over == "node" or (over == "auto" and devices > 1)
        return ShardedStrategy(world_size, copies=num_nodes if inside_nodes else 1, **timeout)
    return name


def gpu_memory(accelerator: str) -> int | None:
    """Return the memory of a GPU of this node in bytes; None if the run is not on GPUs of CUDA."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def resolved_precision(precision: str, accelerator: str) -> str:
    """Return the precision to train in. ``auto`` becomes bf16-mixed on a GPU with bfloat16, else 32-true.

    Raises:
        UserError: The device does not support the requested precision.
    """
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16-mixed" if has_bf16 else "32-true"
    if on_gpu and precision.startswith("bf16") and not has_bf16:
        raise UserError(f"trainer.precision {precision} needs a device with bfloat16, this one has none: set 32-true")
    return precision


def _callbacks(config: Mapping[str, Any], *, logs: bool) -> list[L.Callback]:
    """Return the configured callbacks, without Lightning's LearningRateMonitor if the run has no logger.

    Raises UserError if the one that keeps the record of the run is not among them.
    """
    callbacks = [made(node, f"callbacks.{name}") for name, node in config["callbacks"].items() if node is not None]
    if not any(isinstance(callback, RecordWriter) for callback in callbacks):
        raise UserError("callbacks.record is missing: it writes metrics.jsonl and the result, so leave it as it is")
    return [callback for callback in callbacks if logs or not isinstance(callback, LearningRateMonitor)]


def _logger(config: Mapping[str, Any]) -> Any:
    """Return the configured logger; False, which disables logging in Lightning, if the config names no class."""
    return made(config["logger"], "logger") if config["logger"].get("_target_") else False
