"""A training step is compiled whole and only once, and never waits for a value from the device."""

import pytest
import torch
import torch._dynamo
from support.modules import make_batch, make_module, objective_named, set_up
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dlm.core.configs import load_choice
from dlm.train.optim import make_optimizer

MICRO_BATCHES = 2  # of one step


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def take_step(module, optimizer, *, step, precision):
    for part in range(MICRO_BATCHES):
        with autocast(precision):
            loss = module.training_step(make_batch(module.objective, step=MICRO_BATCHES * step + part), part)
        module.backward(loss / MICRO_BATCHES)
    module.configure_gradient_clipping()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("objective", "precision", "checkpointing"),
    [
        ("masked_diffusion", "32-true", False),
        ("masked_diffusion", "bf16-mixed", True),
        ("autoregressive", "32-true", True),
        ("autoregressive", "bf16-mixed", False),
    ],
)
def test_a_training_step_is_one_graph_and_is_not_compiled_again(objective, precision, checkpointing, monkeypatch):
    plain, backend = torch.compile, CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", lambda loss, **how: plain(loss, **how, backend=backend, fullgraph=True))
    changes = {"trainer.compile": True, "trainer.activation_checkpointing": checkpointing, "model.n_layer": 1}
    module = set_up(make_module(changes, objective_named(objective)))
    module.configure_model()
    optimizer = make_optimizer(module.model, module.config["optimizer"], module.recipe.shape)

    def validate():
        module.eval()
        with torch.no_grad(), autocast(precision):
            module.compute_loss(module.model, make_batch(module.objective, sequences=8))
        module.train()

    take_step(module, optimizer, step=0, precision=precision)
    assert backend.frame_count == 1
    validate()  # this is compiled too, because its batches have another size and it needs no gradients
    take_step(module, optimizer, step=1, precision=precision)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2, 5):
            take_step(module, optimizer, step=step, precision=precision)
            validate()
    assert backend.frame_count == 2 and not counters["graph_break"]


@pytest.mark.parametrize(
    ("objective", "optimizer", "precision"),
    [
        ("masked_diffusion", "adamw", "bf16-mixed"),
        ("masked_diffusion", "muon", "32-true"),
        ("autoregressive", "adamw", "32-true"),
        ("autoregressive", "muon", "bf16-mixed"),
    ],
)
def test_a_training_step_waits_for_no_value_from_the_device(objective, optimizer, precision):
    """Fake tensors have no values, so .item(), .nonzero() and `if tensor` raise."""
    with FakeTensorMode():
        module = set_up(make_module({"model.n_layer": 1}, objective_named(objective)))
        config = {**load_choice("optimizer", optimizer), "lr": 1e-3}
        stepper = make_optimizer(module.model, config, module.recipe.shape)
        for step in range(2):
            take_step(module, stepper, step=step, precision=precision)
        assert module.grad_norm.shape == module.loss_sum.shape == ()
        with pytest.raises(DataDependentOutputException):
            module.loss_sum.item()
