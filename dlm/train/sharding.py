"""Shard a model over the devices of a run (PyTorch's FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dlm.train.models.encoder import TransEncoder


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with two changes: hybrid sharding, and one reduction per optimiser step.

    A checkpoint is a single file, which any strategy and any number of devices can load.

    Args:
        world_size: The number of processes.
        copies: The number of copies of the model. Each copy is sharded over ``world_size / copies`` processes with
            consecutive ranks; gradients are then averaged over the copies.
        options: Other arguments of ModelParallelStrategy.
    """

    def __init__(self, world_size: int, *, copies: int = 1, **options: Any) -> None:
        super().__init__(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False, **options
        )
        self.copies = copies

    def setup_environment(self) -> None:
        """Start the process group, and arrange the processes: one row per copy of the model if there are several."""
        super().setup_environment()
        self.shard_mesh = self.device_mesh["data_parallel"]
        if self.copies > 1:
            rows = (self.copies, self.world_size // self.copies)
            self.shard_mesh = init_device_mesh(self.root_device.type, rows, mesh_dim_names=("replicate", "shard"))

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep the gradients of a micro-batch on this device, whole and in float32, without reducing them.

        Lightning enters this context for every micro-batch of an optimiser step except the last one.
        """
        assert self.model is not None
        units = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)


def shard(model: TransEncoder, mesh: DeviceMesh, *, wrap: str, precision: str) -> None:
    """Shard a model in place.

    While a unit computes, the parameters of the next one are gathered.

    Args:
        model: The model, with the same parameters in every process.
        mesh: The processes: one dimension to shard over, or (copies, processes of a copy).
        wrap: The unit whose parameters are gathered at once, ``block`` or ``model``. The embedding, the last norm and
            the head belong to the unit of the model.
        precision: The precision of Lightning's trainer.
    """
    policy = _policy(precision)
    blocks: list[Any] = list(model.blocks) if wrap == "block" else []
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    root: Any = model
    for unit, following in zip([root, *blocks], blocks, strict=False):
        unit.set_modules_to_forward_prefetch([following])  # PyTorch prefetches in the backward pass by itself


def _policy(precision: str) -> MixedPrecisionPolicy:
    """Return in which types parameters are gathered and gradients are reduced.

    Under bf16-mixed, autocast rounds the matrices to bfloat16 anyway, so gathering them in bfloat16 changes only where
    this happens. Block inputs are not cast, because that would round the rotary tables.
    """
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=torch.float32 if precision.startswith("bf16") else None,
        cast_forward_inputs=False,
    )
