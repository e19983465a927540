"""The overrides and resources that the job of a planned cell gets."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from support.submissions import GROUPS, make_cell

from dlm.core.configs import load_choice
from dlm.core.errors import UserError
from dlm.core.memory import GIB, micro_batch_limit
from dlm.core.objectives import OBJECTIVES
from dlm.core.shape import load_shape
from dlm.submit.job import SlurmSettings
from dlm.submit.overrides import cell_overrides, quote, trainer_overrides
from dlm.submit.resources import cell_resources, largest_micro_batch, smaller_micro_batch, time_limit_min


def test_overrides_of_a_planned_cell(tmp_path):
    overrides = cell_overrides(
        "mdm-33k-1e12-ab", sweep_dir=tmp_path / "my sweep", data_dir=tmp_path, extra=["logger=none"]
    )
    parsed = {item.key_or_group: item.value() for item in OverridesParser.create().parse_overrides(list(overrides))}
    assert parsed == {
        "cell": "mdm-33k-1e12-ab",
        "hydra.searchpath": [f"file://{tmp_path}/my sweep"],
        "sweep": "my sweep",
        "paths.workdir": str(tmp_path),
        "paths.data_dir": str(tmp_path),
        "logger": "none",
    }


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20))
@example("a\\'b")
@example("ends in \\\\")
@example("null")
def test_any_path_survives_hydras_grammar(text):
    if "${" in text:
        with pytest.raises(UserError):
            quote(text)
        return
    (item,) = OverridesParser.create().parse_overrides([f"paths.workdir={quote(text)}"])
    (inside,) = OverridesParser.create().parse_overrides([f"hydra.searchpath=[{quote(text)}]"])
    assert item.value() == text and inside.value() == [text]


def test_resources_come_from_the_plan_unless_the_launcher_says(tmp_path):
    cell = make_cell("a", nodes=2, gpus_per_node=8, hours=1.0)
    need = cell_resources(cell)
    assert (need.nodes, need.gpus_per_node, need.tasks_per_node, need.time_min) == (2, 8, 8, 120)
    need = cell_resources(cell, SlurmSettings(nodes=1, gpus_per_node=4, timeout_min=30, mem_gb=64, cpus_per_task=6))
    assert (need.nodes, need.gpus_per_node, need.tasks_per_node, need.time_min) == (1, 4, 4, 30)
    assert (need.mem_gib, need.cpus_per_task) == (64, 6)
    loading = make_cell("a", overrides={"data.num_workers": 3})  # processes that load data need cores of their own
    assert cell_resources(loading).cpus_per_task == 4
    assert cell_resources(loading, extra=["data.num_workers=7"]).cpus_per_task == 8
    with pytest.raises(UserError, match=r"--override data.num_workers=x: give a whole number"):
        cell_resources(loading, extra=["data.num_workers=x"])
    need = cell_resources(make_cell("a"))  # nothing was estimated
    assert (need.nodes, need.gpus_per_node, need.tasks_per_node, need.time_min) == (1, 0, 1, None)


@given(st.floats(1e-4, 1e4))
def test_time_limits_leave_room_and_are_few(hours):
    limit = time_limit_min(hours)
    assert 1.5 * hours * 60 + 10 <= limit <= max(30, 2 * (1.5 * hours * 60 + 10)) + 1e-6
    assert limit % 30 == 0 and (limit // 30).bit_count() == 1


def test_time_limits_stay_within_the_partitions(monkeypatch):
    cell = make_cell("a", hours=10.0)
    assert cell_resources(cell, max_time_min=240).time_min == 240  # and goes on in the next job
    assert cell_resources(make_cell("a"), max_time_min=240).time_min == 240  # not known: all that there is
    assert cell_resources(make_cell("a")).time_min is None
    with pytest.raises(UserError, match=r"timeout_min is 600, the partition \(default\) allows 240"):
        cell_resources(cell, SlurmSettings(timeout_min=600), max_time_min=240)


def test_host_memory_comes_from_the_plan():
    assert cell_resources(make_cell("a", memory_gib=0.1)).mem_gib == 3  # two for the process, rounded up
    on_gpu = make_cell("a", gpus_per_node=8, memory_gib=40.0, num_params_total=10**9)
    assert cell_resources(on_gpu).mem_gib == 96  # 8 x 8, and the state twice
    assert cell_resources(on_gpu, SlurmSettings(mem_gb=500)).mem_gib == 500
    assert cell_resources(on_gpu, SlurmSettings(mem_gb=0)).mem_gib == 0  # all memory of the node


def test_the_trainer_follows_the_devices_unless_the_definition_chose_one():
    words = [trainer_overrides(cell_resources(make_cell("a", nodes=n, gpus_per_node=g)), t)
             for n, g, t in [(1, 0, "cpu"), (1, 1, "cpu"), (1, 4, "cpu"), (2, 8, "cpu"), (2, 8, "fsdp")]]  # fmt: skip
    assert words == [
        (),
        ("trainer=single_gpu", "trainer.devices=1", "trainer.num_nodes=1"),
        ("trainer=multi_gpu", "trainer.devices=4", "trainer.num_nodes=1"),
        ("trainer=multi_node", "trainer.devices=8", "trainer.num_nodes=2"),
        ("trainer.devices=8", "trainer.num_nodes=2"),
    ]


@pytest.mark.parametrize(("device", "gib"), [("L40S", 44), ("H200", 139), ("RTX4090", 79)])
def test_after_out_of_memory_a_gpu_computes_half_of_what_training_chose(device, gib):
    cell = make_cell("a", global_batch_size=2048, device=device, groups={**GROUPS, "model": "170M"}, block_size=2048)
    resources = cell_resources(cell, SlurmSettings(gpus_per_node=1))
    allowed = micro_batch_limit(
        load_shape("170M"),
        OBJECTIVES["masked_diffusion"],
        load_choice("trainer", "single_gpu"),
        block_size=2048,
        memory_bytes=gib * GIB,
    )
    chosen = largest_micro_batch(cell, resources)
    assert chosen == max(size for size in range(1, allowed + 1) if 2048 % size == 0)
    assert smaller_micro_batch(cell, resources, None) == chosen // 2


def test_after_out_of_memory_a_cpu_computes_half_of_smdms_sequences():
    cell = make_cell("a", global_batch_size=2048, device="cpu")
    assert [smaller_micro_batch(cell, cell_resources(cell), before) for before in (None, 16)] == [16, 8]
