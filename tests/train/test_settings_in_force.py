"""What the config says of the computation reaches the computation."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.modules import make_batch, make_module, set_up
from support.runs import DEBUG

from dlm.core.configs import load_choice
from dlm.train.models import lightning_module
from dlm.train.models.lightning_module import DiffusionLMLightningModule
from dlm.train.trainer import make_trainer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_block_is_computed_again_with_activation_checkpointing(checkpointing):
    module = set_up(make_module({"trainer.activation_checkpointing": checkpointing}))
    computed = []
    for block in module.model.blocks:
        block.register_forward_pre_hook(lambda block, _: computed.append(block))
    module.backward(module.training_step(make_batch(module.objective), 0))
    first, second = module.model.blocks
    assert computed == [first, second, *((second, first) if checkpointing else ())]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["math", "flash"])
def test_the_chosen_kernels_attend_in_training_and_validation(backend, checkpointing, monkeypatch):
    used = []
    plain = F.scaled_dot_product_attention

    def look(*given, **named):
        names = {"math": torch._C._get_math_sdp_enabled(), "flash": torch._C._get_flash_sdp_enabled()}
        used.append([name for name, enabled in names.items() if enabled])
        return plain(*given, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    changes = {"trainer.attention": backend, "trainer.activation_checkpointing": checkpointing}
    module = set_up(make_module(changes))
    module.backward(module.training_step(make_batch(module.objective), 0))
    assert used == [[backend]] * (4 if checkpointing else 2)  # a block that is computed again uses the same kernels
    used.clear()
    module.eval()
    module.validation_terms = torch.zeros(4, 2, dtype=torch.float64)
    with torch.no_grad():
        module.validation_step({**make_batch(module.objective), "draws": 1, "sequence": torch.arange(4)}, 0)
    assert used == [[backend]] * 2


@pytest.mark.parametrize("backend", ["flash_attn", "auto"])
def test_the_package_flash_attn_attends_in_every_layer_if_it_is_chosen(backend, monkeypatch):
    """A stand-in for the package, which needs a GPU; the loss shows that it is given the right tensors."""
    calls = []

    def flash_attn_func(q_BTHD, k_BTHD, v_BTHD, *, causal):
        calls.append(causal)
        q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=causal).transpose(1, 2)

    plain = set_up(make_module())
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(lightning_module, "working_kernels", lambda *_, **__: (backend, nullcontext))
    module = set_up(make_module({"trainer.attention": backend}))
    losses = [one.training_step(make_batch(one.objective), 0) for one in (module, plain)]
    assert calls == ([False] * 2 if backend == "flash_attn" else [])
    torch.testing.assert_close(*losses)


@pytest.fixture
def torch_settings():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def test_a_run_multiplies_in_tf32_with_the_threads_that_it_is_given(launch, torch_settings, monkeypatch):
    seen = []
    plain = DiffusionLMLightningModule.training_step

    def look(self, batch, batch_idx):
        seen.append((torch.get_float32_matmul_precision(), torch.get_num_threads()))
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionLMLightningModule, "training_step", look)
    torch.set_float32_matmul_precision("highest")  # PyTorch's default
    assert launch(*DEBUG, "trainer.fast_dev_run=1", "trainer.threads=3").code == 0
    assert seen == [("high", 3)]


def test_lightning_does_not_requeue_a_job_of_slurm(monkeypatch):
    """dlm continues its jobs itself; Lightning would also save a checkpoint of its own and requeue the job."""
    for name, value in {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 7, "JOB_NAME": "dlm"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    for name in ("NTASKS_PER_NODE", "NNODES"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    module = make_module()
    config = {**module.config, "trainer": load_choice("trainer", "cpu"), "profiler": None}
    environment = make_trainer(config, module.recipe, None)._accelerator_connector.cluster_environment
    assert environment.detect() and environment.auto_requeue is False
