"""The columns of runs.csv and excluded.csv."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One row of runs.csv. None marks a missing value; missing values are never filled in.

    Only the columns that do not follow from the config of the run have a default.
    """

    run_id: str
    sweep: str
    objective: str
    model: str
    params: int  # N, non-embedding parameters
    params_total: int
    tokens: int  # D, training tokens
    flops: float  # actual training FLOPs, counted by ``convention``
    convention: str
    flops_6n: float
    flops_6n_total: float
    flops_full: float
    flops_full_masked_head: float
    budget: float | None  # target FLOPs, counted by ``convention``
    loss: float | None = None  # validation loss at the planned last step: NELBO or NLL, nats/token
    loss_se: float | None = None  # Monte Carlo standard error of ``loss``
    estimator: str = ""
    steps: int
    global_batch_size: int  # sequences
    block_size: int  # tokens
    learning_rate: float
    weight_decay: float
    dropout: float  # 0: dlm's models have none; tables of other runs may have it
    schedule: str
    parent: str | None  # the trunk of a branch: the run, or the path of the checkpoint, that it starts from
    seed: int
    unique_tokens: int | None = None  # distinct training tokens seen
    epochs: float | None = None
    data: str
    data_hash: str | None
    tokens_per_sec: float | None = None  # as in Result; without a result, as in Status
    device: str | None = None
    gpu_hours: float | None = None  # 0 on a machine without GPUs
    attempts: int = 0
    steps_redone: int = 0  # optimiser steps that were computed again after interruptions
    git_sha: str | None = None
    source: str = ""  # where ``loss`` was read from: run_dir, wandb (local files) or wandb_api
    status: str
    # proof: the run tests the law of its sweep, and no law is fitted to it; tune: it varies the recipe.
    role: str | None = None


RUN_COLUMNS = tuple(field.name for field in dataclasses.fields(RunRow))
EXCLUDED_COLUMNS = (*RUN_COLUMNS, "cause", "reason")  # a cause is a State or a Cause, a reason a sentence
