"""The columns of runs.csv and excluded.csv."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One row of runs.csv. None is a missing value; it is never filled in.

    A column has a default where the config of a run does not state the value.
    """

    run_id: str
    sweep: str
    objective: str
    model: str
    params: int  # N, non-embedding
    params_total: int
    tokens: int  # D
    flops: float  # actual, in ``convention``
    convention: str
    flops_6n: float
    flops_6n_total: float
    flops_full: float
    flops_full_masked_head: float
    budget: float | None  # target FLOPs, in ``convention``
    loss: float | None = None  # of validation at the planned last step: NELBO or NLL, nats/token
    loss_se: float | None = None  # its Monte Carlo standard error
    estimator: str = ""
    steps: int
    global_batch_size: int  # sequences
    block_size: int  # tokens
    learning_rate: float
    schedule: str
    parent: str | None  # the run whose checkpoint this run started from
    seed: int
    unique_tokens: int | None = None  # distinct training tokens seen
    epochs: float | None = None
    data: str
    data_hash: str | None
    tokens_per_sec: float | None = None  # as in Result, or in Status where there is no result
    device: str | None = None
    gpu_hours: float | None = None  # 0 on a machine without GPUs
    attempts: int = 0
    steps_redone: int = 0  # optimiser steps that interruptions caused to be computed again
    git_sha: str | None = None
    source: str = ""  # where ``loss`` was read: run_dir, wandb (local files) or wandb_api
    status: str


RUN_COLUMNS = tuple(field.name for field in dataclasses.fields(RunRow))
EXCLUDED_COLUMNS = (*RUN_COLUMNS, "reason")
