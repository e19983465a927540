"""Say what to write instead of a key that Lightning, Hydra's templates or older scripts have and dlm has not."""

from __future__ import annotations

from dlm.core.errors import UserError

STEPS = "set training.budget or training.steps"
BATCH = "set data.batch_size and data.micro_batch_size"
VALIDATION_SET = "set validation.num_sequences"
CHUNKS = "a folder of `dlm prepare` knows its files; set data.data_dir, or data.sources for a mixture"

# A key, or a choice of a group as GROUP=CHOICE, and what to write instead. A node stands for all keys below it.
INSTEAD = {
    "trainer.max_steps": STEPS,
    "trainer.max_epochs": STEPS,
    "trainer.limit_train_batches": "set training.steps",
    "trainer.overfit_batches": "set training.steps",
    "trainer.accumulate_grad_batches": BATCH,
    "trainer.gradient_clip_val": "set optimizer.gradient_clip_val",
    "trainer.callbacks": "choose the group callbacks",
    "trainer.logger": "choose the group logger",
    "trainer.profiler": "set profiler=simple at the top level",
    "trainer.resume_from_checkpoint": "set ckpt_path=PATH",
    "trainer.val_check_interval": "set validation.times",
    "trainer.limit_val_batches": VALIDATION_SET,
    "training.flops_budget": "set training.budget",
    "training.model_params": "choose the model, model=170M",
    "training.tokens_per_batch": "set data.batch_size, in sequences of data.block_size tokens",
    "training.global_batch_size": "set data.batch_size",
    "training.block_size": "set data.block_size",
    "training.max_steps": STEPS,
    "training.gradient_accumulation_steps": BATCH,
    "data.global_batch_size": "set data.batch_size",
    "data.train_prefix": CHUNKS,
    "data.val_prefix": CHUNKS,
    "data.train_chunks": CHUNKS,
    "data.val_chunks": VALIDATION_SET,
    "scheduler.warmup_steps": "set scheduler.warmup_fraction",
    "scheduler.min_lr": "set scheduler.min_ratio, a share of optimizer.lr",
    "scheduler.max_steps": STEPS,
    "model_config": "choose the model, model=170M, and set its keys as model.KEY",
    "optimizer_config": "set optimizer.KEY, for example optimizer.lr",
    "scheduler_config": "set scheduler.KEY, for example scheduler.min_ratio",
    "trainer.strategy_config": "set trainer.strategy, trainer.fsdp_wrap or trainer.activation_checkpointing",
    "strategy_config": "set trainer.strategy, trainer.fsdp_wrap or trainer.activation_checkpointing",
    "experiment_name": "set sweep=NAME for the folder and the group in W&B, logger.name=NAME for the run in W&B",
    "project_name": "set logger.project",
    "output_dir": "set paths.run_dir",
    "callbacks.model_checkpoint": "set callbacks.checkpoint.KEY",
    "callbacks.learning_rate_monitor": "set callbacks.lr_monitor.KEY",
    "callbacks.speed_monitor.log_interval": "set trainer.log_every_n_steps",
    "callbacks.speed_monitor.flops_available": "set callbacks.speed_monitor.peak_flops_per_device",
    "callbacks.gradient_monitor.log_interval": "set trainer.log_every_n_steps",
    "model=default": "choose a size, for example model=170M",
    "data=default": "choose data=slim_pajama or the folder of your own text with data.data_dir",
    "optimizer=default": "choose optimizer=adamw",
    "scheduler=default": "choose scheduler=cosine",
    "logger=default": "choose logger=wandb",
}

# Names of models in other projects, and the same model here.
MODELS = {"diffusion_llama_170M": "170M"}


def instead_of(key: str) -> UserError | None:
    """Make the error that says what replaces a key, a key below it or a choice; None if dlm knows no replacement."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        known = ".".join(parts[:length])
        if known in INSTEAD:
            return UserError(f"{key} is no {'choice' if '=' in key else 'key'} of dlm: {INSTEAD[known]}")
    return None
