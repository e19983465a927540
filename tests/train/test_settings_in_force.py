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
from dlm.train.models import cross_entropy, lightning_module
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


@pytest.mark.parametrize("name", ["auto", "dense", "chunked"])
def test_the_chosen_cross_entropy_is_used_in_training_and_validation(name, monkeypatch):
    used = []
    for way in ("auto", "dense", "chunked"):
        plain = getattr(cross_entropy, way)
        looking = lambda *given, way=way, plain=plain: used.append(way) or plain(*given)  # noqa: E731
        monkeypatch.setattr(cross_entropy, way, looking)
    module = set_up(make_module({"trainer.cross_entropy": name}))
    expected = ["auto", "dense"] if name == "auto" else [name]  # the logits are small
    module.training_step(make_batch(module.objective), 0)
    module.validation_terms = torch.zeros(4, 2, dtype=torch.float64)
    with torch.no_grad():
        module.validation_step({**make_batch(module.objective), "draws": 1, "sequence": torch.arange(4)}, 0)
    assert used == expected * 2


@pytest.mark.parametrize("name", ["liger", "cut"])
def test_the_package_of_a_cross_entropy_computes_the_losses_if_it_is_chosen(name, monkeypatch):
    """A stand-in for the package, which needs a GPU; the losses show that it is given the right tensors."""
    calls = []

    def package(hidden_MC, weight_VC, target_M, *, reduction, ignore_index, **others):
        calls.append((hidden_MC.dtype, weight_VC.dtype, others))
        return F.cross_entropy(hidden_MC @ weight_VC.T, target_M, reduction=reduction, ignore_index=ignore_index)

    functional = SimpleNamespace(liger_fused_linear_cross_entropy=package)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=package))
    monkeypatch.setattr(cross_entropy.util, "find_spec", lambda module: module)
    module, plain = set_up(make_module()), set_up(make_module())
    monkeypatch.setattr(cross_entropy, "fault_of", lambda *_: "")  # it computes on the GPU
    module.model.cross_entropy = cross_entropy.cross_entropy_named(name, torch.device("cuda"), precision="32-true")
    losses = [one.training_step(make_batch(one.objective), 0) for one in (module, plain)]
    torch.testing.assert_close(*losses)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(make_batch(module.objective), 0)
    assert loss.dtype == torch.float32
    kwargs = {"accum_dtype": torch.float32} if name == "liger" else {"filter_eps": None}
    assert calls == [(torch.float32, torch.float32, kwargs), (torch.bfloat16, torch.bfloat16, kwargs)]


def test_a_validation_after_the_training_keeps_the_kernels_of_the_training(monkeypatch):
    chosen = []
    monkeypatch.setattr(
        lightning_module, "working_kernels", lambda *_, **__: chosen.append("math") or ("math", nullcontext)
    )
    module = set_up(make_module())
    module.setup("validate")
    assert chosen == ["math"] and module.attention == "math"
