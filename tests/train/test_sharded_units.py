"""How a model is divided and compiled for several devices, on a process group whose collectives do nothing."""

import pytest
import torch
from support.modules import make_batch, make_module
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from dlm.core.configs import load_choice
from dlm.train.trainer import make_trainer


@pytest.fixture
def two_ranks():
    """This process is the first of two; the other one does not exist."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


def trainer_of_two(module, strategy):
    trainer = {**load_choice("trainer", "cpu"), "devices": 2, "strategy": strategy}
    return make_trainer({**module.config, "trainer": trainer, "profiler": None}, module.recipe, None)


def sharded(**trainer):
    module = make_module({f"trainer.{key}": value for key, value in {"strategy": "fsdp", **trainer}.items()})
    module.trainer = trainer_of_two(module, "fsdp")
    module.trainer.strategy.connect(module)
    module.trainer.strategy.setup_environment()  # it finds the process group of two_ranks
    module.configure_model()
    module.setup("fit")
    return module


@pytest.mark.parametrize(("wrap", "is_unit"), [("block", True), ("model", False)])
def test_the_units_of_fsdp_are_the_blocks_or_the_model(wrap, is_unit, two_ranks):
    model = sharded(fsdp_wrap=wrap).model
    assert [isinstance(block, FSDPModule) for block in model.blocks] == [is_unit] * 2
    assert isinstance(model, FSDPModule)


@pytest.mark.parametrize("compiles", [False, True])
def test_each_block_is_compiled_under_fsdp_if_asked(compiles, two_ranks, monkeypatch):
    calls = []

    def look(function, **how):
        return lambda *given, **named: calls.append(function.__self__) or function(*given, **named)

    monkeypatch.setattr(torch, "compile", look)
    module = sharded(compile=compiles)
    module.backward(module.training_step(make_batch(module.objective), 0))
    assert calls == (list(module.model.blocks) if compiles else [])


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_ddp_does_not_search_for_unused_parameters(strategy, two_ranks):
    """The search walks the graph at every step, and every parameter is used."""
    module = make_module()
    wrapped = trainer_of_two(module, strategy).strategy._setup_model(module.model)
    assert not wrapped.find_unused_parameters and not wrapped.broadcast_buffers
