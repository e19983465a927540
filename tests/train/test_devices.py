"""What depends on the device, with the GPU faked: its peak, its precision, its memory."""

from types import SimpleNamespace

import pytest
import torch
from support.modules import make_module

from dlm.core.configs import load_choice
from dlm.core.errors import UserError
from dlm.core.memory import GIB
from dlm.train import trainer as trainer_module
from dlm.train.batches import PackedDataModule
from dlm.train.callbacks.monitors import SpeedMonitor, peak_flops
from dlm.train.trainer import gpu_memory, make_trainer, resolved_precision


@pytest.mark.parametrize(
    ("name", "peak"),  # the makers' data sheets, dense bf16
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_the_peak_is_that_of_the_exact_card(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("devices", [1, 4])
def test_mfu_is_a_share_of_the_peak_of_all_devices(devices):
    module = make_module({"training.steps": 10})
    trainer = SimpleNamespace(global_step=0, max_steps=10, log_every_n_steps=5, world_size=devices)
    monitor = SpeedMonitor(peak_flops_per_device=1e12)
    monitor.on_train_start(trainer, module)
    trainer.global_step = 5
    monitor.on_step_end(trainer, module, validates=False)
    flops_per_sec = module.recipe.flops["full_masked_head"] / 10 / module.observed["step_time"]
    assert module.observed["mfu"] == pytest.approx(flops_per_sec / (devices * 1e12), rel=1e-9)


@pytest.fixture
def gpu(monkeypatch):
    def fake(*, there: bool, bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )

    return fake


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_auto_precision_is_bf16_where_the_device_has_it(accelerator, gpu):
    gpu(there=True, bf16=True)
    assert [resolved_precision(name, accelerator) for name in ("auto", "bf16-true", "32-true")] == [
        "bf16-mixed", "bf16-true", "32-true"
    ]  # fmt: skip
    assert resolved_precision("auto", "cpu") == "32-true"
    gpu(there=True, bf16=False)  # PyTorch would emulate it, slowly
    assert resolved_precision("auto", accelerator) == "32-true"
    for name in ("bf16-mixed", "bf16-true"):
        with pytest.raises(UserError, match=rf"trainer\.precision {name} needs a device with bfloat16.*: set 32-true"):
            resolved_precision(name, accelerator)
    gpu(there=False, bf16=False)
    assert resolved_precision("auto", accelerator) == "32-true"


def test_a_run_in_float32_refuses_16_bit_attention_at_its_setup():
    module = make_module({"trainer.attention": "flash_attn"})
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    module.trainer = SimpleNamespace(strategy=strategy, precision="32-true")
    with pytest.raises(UserError, match=r"flash_attn computes in 16 bits, trainer\.precision is 32-true"):
        module.setup("fit")
    module.trainer.precision = "bf16-mixed"
    with pytest.raises(UserError, match="needs the package flash-attn"):  # the next thing to look for
        module.setup("fit")


def test_a_gpu_computes_as_many_sequences_at_once_as_fit_into_its_memory(monkeypatch):
    changes = {"training.steps": 40, "data.batch_size": 1200, "data.block_size": 128}

    def micro_batches(memory, micro=None):
        module = make_module({**changes, "data.micro_batch_size": micro})
        trainer = {**load_choice("trainer", "cpu"), "devices": 2, "strategy": "ddp"}
        monkeypatch.setattr(trainer_module, "gpu_memory", lambda accelerator: memory)
        config = {**module.config, "trainer": trainer, "profiler": None}
        return make_trainer(config, module.recipe, None).accumulate_grad_batches

    assert micro_batches(None) == 600 // 30  # SMDM's 32 sequences; 30 divides the 600 of a device
    assert micro_batches(79 * GIB) == 600 // 300  # 65,536 tokens are 512 sequences
    assert 2 < micro_batches(GIB / 16) < 20
    assert micro_batches(GIB / 16, micro=600) == 1


def test_the_memory_is_that_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=79 * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [gpu_memory(name) for name in ("auto", "gpu", "cuda", "cpu")] == [79 * GIB] * 3 + [None]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_memory("auto") is None


@pytest.mark.parametrize("others", [[4, 4], [4, 2]])
def test_devices_that_would_choose_different_micro_batches_are_refused(others):
    strategy = SimpleNamespace(all_gather=lambda one: torch.tensor(others), root_device=torch.device("cpu"))
    data = PackedDataModule.__new__(PackedDataModule)
    data.trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=4)  # type: ignore[assignment]
    if others == [4, 4]:
        data.setup("fit")
        return
    with pytest.raises(UserError, match=r"differ in memory, .* set data\.micro_batch_size"):
        data.setup("fit")
