"""Check the keys and values of a config; the error names the wrong key."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dlm.core import schedule
from dlm.core.errors import UserError, shown, unknown
from dlm.core.identity import SWEEP_NAME, SWEEP_NAME_WORDS
from dlm.core.objectives import OBJECTIVES
from dlm.core.replaced_keys import instead_of

SHARDED = ("fsdp", "fsdp2")  # names of one strategy, PyTorch's FSDP2

# The lowest and the highest allowed value of each number.
RANGES: dict[str, tuple[float, float]] = {
    "optimizer.lr": (1e-12, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.momentum": (0, 0.99999),
    "optimizer.eps": (0, 1),
    "optimizer.gradient_clip_val": (0, math.inf),
    "model.norm_eps": (0, 1),
    "model.rotary_percentage": (0, 1),
    "scheduler.warmup_fraction": (0, 1),
    "scheduler.warmup_min_steps": (0, math.inf),
    "scheduler.warmup_tokens_per_param": (0, 1e12),
    "scheduler.min_ratio": (0, 1),
    "scheduler.decay_fraction": (1e-6, 1),
    "objective.eps": (1e-9, 0.999),
    "callbacks.record.spike": (0, math.inf),
}


# The allowed names of each choice. A test has the training code take every one of them.
NAMES = {
    "recipe": ("smdm", "power_law"),
    "role": ("tune",),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.decay": ("all", "matrices"),
    "scheduler.name": tuple(schedule.SHAPES),
    "objective.weight": ("elbo", "low_var", "realised_fraction"),
    "validation.estimator": ("mc", "exact_count"),
    "trainer.strategy": ("auto", "ddp", *SHARDED),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.fsdp_wrap": ("block", "model"),
    "trainer.fsdp_shard_over": ("auto", "node", "all"),
    "trainer.precision": ("auto", "32-true", "bf16-mixed", "bf16-true", "64-true"),
    "trainer.attention": ("auto", "math", "efficient", "flash", "cudnn", "flash_attn", "fa3", "fa4"),
    "trainer.cross_entropy": ("auto", "dense", "chunked", "liger", "cut"),
    "trainer.gradient_clip_algorithm": ("norm", "value"),
    "profiler": ("simple", "advanced", "pytorch"),
    "callbacks.checkpoint.mode": ("min", "max"),
    "callbacks.early_stopping.mode": ("min", "max"),
    "callbacks.lr_monitor.logging_interval": ("step", "epoch"),
}


# The lowest allowed value of each whole number.
WHOLE = {
    "seed": 0,
    "validation.seed": 0,
    "validation.num_sequences": 1,
    "validation.draws": 2,  # one draw has no standard error
    "validation.times": 1,
    "data.block_size": 1,
    "data.stride": 1,
    "data.batch_size": 1,
    "data.unique_tokens": 1,
    "data.micro_batch_size": 1,
    "data.num_workers": 0,
    "trainer.threads": 1,
    "trainer.process_group_timeout": 1,
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.log_every_n_steps": 1,
    "callbacks.checkpoint.times": 1,
    "callbacks.checkpoint.every_n_steps": 1,
    "callbacks.checkpoint.save_top_k": 0,
}


MOST = 2**63 - 1  # what 64 bits hold, the highest allowed value of every whole number except these
MOST_OF = {
    "seed": 2**32 - 1, "validation.seed": 2**32 - 1,  # Lightning's seeds have 32 bits
    "--max-document": 2**40,  # MiB, whose bytes fit into 64 bits too
}  # fmt: skip


# The values that may be null, because dlm then finds them itself, or leaves something out.
NULLS = (
    "optimizer.lr", "optimizer.gradient_clip_val", "scheduler.warmup_tokens_per_param", "callbacks.record.spike",
    "data.batch_size", "data.micro_batch_size", "data.unique_tokens", "trainer.threads",
    "trainer.process_group_timeout", "trainer.log_every_n_steps", "trainer.gradient_clip_algorithm", "profiler", "role",
    "callbacks.checkpoint.times", "callbacks.checkpoint.every_n_steps", "callbacks.lr_monitor.logging_interval",
)  # fmt: skip


TEXTS = ("model.name", "data.name", "data.data_dir", "objective.name")


SWITCHES = ("trainer.compile", "trainer.activation_checkpointing", "callbacks.checkpoint.asynchronous")

_ABSENT = object()

TOP_LEVEL = (
    "model", "data", "objective", "optimizer", "scheduler", "trainer", "callbacks", "logger", "paths", "hydra", "sweep",
    "recipe", "training", "validation", "seed", "ckpt_path", "parent", "branch_step", "keep_steps", "profiler",
    "planned_cell_id", "cell_id", "forecast", "role",
)  # fmt: skip

OBJECTIVE_KEYS = list(dict.fromkeys(key for info in OBJECTIVES.values() for key in info.keys))

# The allowed keys of each config group, except ``model``, whose keys are the fields of ModelShape.
KEYS = {
    "objective": ("name", *OBJECTIVE_KEYS),
    "optimizer": ("name", "lr", "betas", "eps", "weight_decay", "decay", "gradient_clip_val", "momentum"),
    "scheduler": (
        "name", "warmup_fraction", "warmup_min_steps", "warmup_tokens_per_param", "min_ratio", "decay_fraction",
    ),
    "data": (
        "name", "data_dir", "sources", "prepare", "hub", "block_size", "stride", "unique_tokens", "batch_size",
        "micro_batch_size", "num_workers",
    ),
    "training": ("budget", "convention", "steps"),
    "validation": ("num_sequences", "estimator", "draws", "seed", "times"),
    "paths": ("workdir", "data_dir", "run_dir"),
    "trainer": (  # dlm's own keys, and the arguments of lightning.Trainer
        "threads", "attention", "cross_entropy", "compile", "activation_checkpointing", "fsdp_wrap", "fsdp_shard_over",
        "process_group_timeout",
        "accelerator", "strategy", "devices", "num_nodes", "precision", "fast_dev_run",
        "min_epochs", "min_steps", "max_time", "limit_test_batches", "limit_predict_batches",
        "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "enable_checkpointing",
        "enable_progress_bar", "enable_model_summary", "gradient_clip_algorithm", "deterministic", "benchmark",
        "inference_mode", "use_distributed_sampler", "detect_anomaly", "barebones", "plugins", "sync_batchnorm",
        "reload_dataloaders_every_n_epochs", "default_root_dir", "enable_autolog_hparams", "model_registry",
    ),
}  # fmt: skip

# For each choice of a group, the keys of the group that this choice does not read.
UNREAD = {
    **{name: tuple(key for key in OBJECTIVE_KEYS if key not in info.keys) for name, info in OBJECTIVES.items()},
    "adamw": ("momentum",),
    "cosine": ("decay_fraction",),
    "linear": ("decay_fraction",),
}

# The arguments of the callbacks and the logger that dlm ships, by ``_target_``. Other classes check theirs themselves.
# Of the classes of dlm, configs may name those that are listed here, and no others (dlm.core.classes).
ARGUMENTS = {
    "dlm.train.callbacks.monitors.SpeedMonitor": ("peak_flops_per_device",),
    "dlm.train.callbacks.monitors.GradientMonitor": (),
    "dlm.train.callbacks.monitors.ProgressBar": ("refresh_rate",),
    "dlm.train.callbacks.preemption.Preemption": (),
    "dlm.train.callbacks.record_writer.RecordWriter": ("run_dir", "spike"),
    "dlm.train.callbacks.checkpoint.Checkpoint": (
        "run_dir", "times", "every_n_steps", "asynchronous", "save_top_k", "monitor", "mode",
    ),
    "lightning.pytorch.callbacks.LearningRateMonitor": ("logging_interval", "log_momentum", "log_weight_decay"),
    "lightning.pytorch.callbacks.EarlyStopping": (
        "monitor", "min_delta", "patience", "verbose", "mode", "strict", "check_finite", "stopping_threshold",
        "divergence_threshold", "check_on_train_epoch_end", "log_rank_zero_only",
    ),
    "dlm.train.wandb_logger.WandbLogger": (  # arguments of Lightning's logger, and those it passes to wandb.init
        "name", "save_dir", "version", "offline", "dir", "id", "anonymous", "project", "log_model", "experiment",
        "prefix", "checkpoint_name", "add_file_policy", "entity", "notes", "tags", "config", "config_exclude_keys",
        "config_include_keys", "allow_val_change", "group", "job_type", "mode", "force", "reinit", "resume",
        "resume_from", "fork_from", "save_code", "tensorboard", "sync_tensorboard", "monitor_gym", "settings",
    ),
}  # fmt: skip


def check_keys(config: Mapping[str, Any]) -> None:
    """Raise UserError for a key that no part of dlm reads, because it is misspelt or belongs to another choice.

    Args:
        config: The complete config of a run, or only some of its groups. Interpolations may be unresolved.
    """
    for group, node in config.items():
        if group == "experiment":
            raise UserError("the experiment's file does not begin with '# @package _global_': add this line at its top")
        if group not in TOP_LEVEL:
            raise instead_of(group) or unknown("key", group, TOP_LEVEL)
        if group in KEYS:
            unread = UNREAD.get(str(node.get("name")), ()) if isinstance(node, Mapping) else ()
            _check_node(group, node, [key for key in KEYS[group] if key not in unread])
    _check_arguments("logger", config.get("logger"))
    for name, node in (config.get("callbacks") or {}).items():
        is_whole = isinstance(node, Mapping) and "_target_" in node  # a callback of the user, with any name
        if not is_whole and (error := instead_of(f"callbacks.{name}")) is not None:
            raise error
        _check_arguments(f"callbacks.{name}", node)


def dotted_keys() -> list[str]:
    """Return every key of KEYS with its group, for example 'optimizer.lr'."""
    return [f"{group}.{key}" for group, keys in KEYS.items() for key in keys]


def takes(node: Any, key: str) -> bool:
    """Return whether a callback or the logger, a node of the config with a ``_target_``, has an argument ``key``."""
    return isinstance(node, Mapping) and key in ARGUMENTS.get(str(node.get("_target_")), ())


def _check_arguments(where: str, node: Any) -> None:
    """Check the arguments of a node whose ``_target_`` is in ARGUMENTS."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if isinstance(target, str) and target in ARGUMENTS:
        _check_node(where, node, ["_target_", *ARGUMENTS[target]])


def _check_node(where: str, node: Any, allowed: list[str]) -> None:
    if not isinstance(node, Mapping):
        raise UserError(f"{where} is {shown(node)}: it must hold the keys {', '.join(allowed)}")
    for key in node:
        if key not in allowed:
            raise instead_of(f"{where}.{key}") or unknown(f"key of {where}", key, allowed)


def check_values(config: Mapping[str, Any]) -> None:
    """Raise UserError, which names the key and the allowed values, for a value that no run can use."""
    for key, value in _given(config, RANGES):
        low, high = RANGES[key]
        if not (_is_number(value) and low <= value <= high):
            top = f"to {high:g}" if math.isfinite(high) else "up"
            raise UserError(f"{key} is {shown(value)}: it must be a number from {low:g} {top}")
    for key, value in _given(config, WHOLE):
        whole(key, value, WHOLE[key])
    for key, value in _given(config, NAMES):
        if value not in NAMES[key]:
            raise unknown(key, value, NAMES[key])
    for key, value in _given(config, TEXTS):
        if not isinstance(value, str):
            raise UserError(f"{key} is {shown(value)}: it must be text")
    for key, value in _given(config, ["model.name"]):  # it is a part of the names of run directories
        if not re.fullmatch(SWEEP_NAME, value):
            raise UserError(f"{key} is {shown(value)}: {SWEEP_NAME_WORDS}")
    for key, value in _given(config, SWITCHES):
        if not isinstance(value, bool):  # "no" and 1 would both count as true
            raise UserError(f"{key} is {shown(value)}: allowed are true and false")
    for key, value in _given(config, ["optimizer.betas"]):
        if not (isinstance(value, Sequence) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)):
            raise UserError(f"{key} is {shown(value)}: it must be a list of two numbers from 0 to below 1")


def _given(config: Mapping[str, Any], keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The dotted ``keys`` that are set in the config, with their values, except those that are and may be null."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is not _ABSENT and not (value is None and key in NULLS):
            yield key, value


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # NaN is not, nor is 10**400, which no float holds


def whole(key: str, value: object, minimum: int = 1) -> int:
    """Return ``value`` as an int. Raises UserError about ``key`` unless it is a whole number from ``minimum`` up."""
    most = MOST_OF.get(key, MOST)
    if not _is_number(value) or value != int(value) or value < minimum:  # type: ignore[call-overload, operator]
        raise UserError(f"{key} is {shown(value)}: it must be a whole number of at least {minimum}")
    if value > most:  # type: ignore[operator]
        raise UserError(f"{key} is {shown(value)}: it must be a whole number from {minimum} to {most}")
    return int(value)  # type: ignore[call-overload, no-any-return]
