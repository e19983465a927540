"""Train runs on two processes and record what they send to each other."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlm import launch
from dlm.core.shape import ModelShape
from dlm.train.models.encoder import TransEncoder
from dlm.train.optim import make_optimizer
from support.two_processes import SECONDS, two_processes

CALLBACK = "+callbacks.collectives._target_=support.collectives.Collectives"
SHAPE = ModelShape(name="x", n_layer=1, n_head=2, n_embd=32, intermediate_size=48, vocab_size=64, block_size=32)
MUON = {"name": "muon", "lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "decay": "all",
        "momentum": 0.95}  # fmt: skip


class Collectives(L.Callback, TorchDispatchMode):
    """Writes one row per micro-batch to collectives.jsonl: every collective operation and every call of a block.

    An operation is [name, bytes, type of its numbers]. The call of block 0 is ["block", 0, types], with the types of
    the residual stream and of the rotary tables. The first row describes the run.

    Args:
        run_dir: The folder of the file.
        stop_after: The number of micro-batches after which the training stops; None for no such stop.
    """

    def __init__(self, run_dir, stop_after=None):
        TorchDispatchMode.__init__(self)
        self.file, self.events, self.stop_after = Path(run_dir) / "collectives.jsonl", [], stop_after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:  # its own operations follow
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            given = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            if given:
                largest = max(given, key=lambda tensor: tensor.nbytes)
                name = func._schema.name.split("::")[1].strip("_")
                self.events.append([name, largest.nbytes, str(largest.dtype)])
        return func(*args, **(kwargs or {}))

    def on_train_start(self, trainer, module):
        parameters = sum(parameter.numel() for parameter in module.parameters())
        self._write(trainer, {"parameters": parameters, "accumulates": trainer.accumulate_grad_batches})
        for number, block in enumerate(module.model.blocks):
            block.register_forward_pre_hook(
                lambda block, inputs, number=number: self.events.append(
                    ["block", number, f"{inputs[0].dtype} {inputs[1].dtype}"]
                )
            )

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.events = []
        self.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.__exit__(None, None, None)
        self._write(trainer, self.events)
        trainer.should_stop = trainer.should_stop or batch_idx + 1 == self.stop_after

    def _write(self, trainer, row):
        if trainer.is_global_zero:
            with self.file.open("a") as file:
                print(json.dumps(row), file=file)


def train_and_record(folder, runs):
    """Train each run on the same two processes; then compare Muon on shards with Muon.

    A run is a name and its overrides.

    ``folder`` has one folder per run, and muon.json with the difference relative to the update, of the matrix where
    it is largest.
    """
    with two_processes("support.collectives", json.dumps([str(folder), runs])) as processes:
        assert [process.wait(SECONDS) for process in processes] == [0, 0]


def _train(folder, runs):
    rank = os.environ["LOCAL_RANK"]
    for name, overrides in runs:
        on_two_nodes = "trainer.num_nodes=2" in overrides
        os.environ.update({"LOCAL_RANK": "0", "NODE_RANK": rank} if on_two_nodes else {"LOCAL_RANK": rank})
        where = (f"paths.run_dir={folder}/{name}", f"paths.workdir={folder}")
        counted = (CALLBACK, f"+callbacks.collectives.run_dir={folder}/{name}")
        sys.argv = ["dlm.launch", "--allow-target", "support", *overrides, *where, *counted]
        code = launch.main()
        if code:
            return code
        os.environ.pop("NODE_RANK", None)
    _compare_muon(Path(folder) / "muon.json", rank)
    return 0


def _muon_updates(mesh):
    """Return how three steps of Muon change the matrices of a model, sharded over ``mesh`` or whole if it is None.

    The gradients are the same in both cases.
    """
    model = TransEncoder(SHAPE, causal=False)
    model.init_weights(torch.Generator().manual_seed(0))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer, noise = make_optimizer(model, MUON, SHAPE), torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=noise)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()
    after = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: after[name].detach() - before[name] for name in before if name.startswith("blocks.")}


def _compare_muon(file, rank):
    whole, sharded = _muon_updates(None), _muon_updates(init_device_mesh("cpu", (2,)))
    difference = max(((sharded[name] - whole[name]).norm() / whole[name].norm()).item() for name in whole)
    if rank == "0":
        file.write_text(json.dumps(difference))


if __name__ == "__main__":
    sys.exit(_train(*json.loads(sys.argv[1])))
