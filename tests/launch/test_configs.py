"""The Hydra groups: every experiment with every trainer, the overrides of the README, and what plan reads of them."""

import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from omegaconf import OmegaConf

from dlm.core.configs import choices, load_base, load_choice
from dlm.core.paths import configs_dir
from dlm.core.recipe import Recipe, derive, fill
from dlm.plan.grid import DECIDING
from dlm.train.trainer import make_trainer


def recipe_of(config) -> Recipe:
    nodes = ("model", "data", "objective", "optimizer", "scheduler", "training", "validation")
    plain = {name: OmegaConf.to_container(config[name], resolve=True) for name in nodes}
    return derive(fill({**plain, "recipe": config.recipe}))


TRAINERS = [name for name in choices("trainer") if name != "default"]


def test_the_groups_have_the_choices_of_the_readme():
    assert set(TRAINERS) == {"cpu", "single_gpu", "multi_gpu", "fsdp2", "multi_node"}
    assert {"debug", "scaling_6M", "scaling_170M", "scaling_1B"} <= set(choices("experiment"))
    assert {"stdlib", "slim_pajama", "slim_star"} <= set(choices("data"))
    assert set(choices("objective")) == {"masked_diffusion", "autoregressive"}
    assert {"submitit_local", "submitit_slurm"} <= set(choices("hydra/launcher"))


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes_with_every_trainer(experiment, trainer, compose):
    config = compose(f"experiment={experiment}", f"trainer={trainer}")
    recipe = recipe_of(config)
    expected = {"debug": 200, "scaling_6M": 505007, "scaling_170M": 18710, "scaling_1B": 3093}[experiment]
    assert recipe.steps == expected  # training.md's published steps at 1e19
    assert config.trainer.accelerator == ("cpu" if trainer == "cpu" else "gpu")
    assert config.trainer.devices * config.trainer.num_nodes == {
        "cpu": 1, "single_gpu": 1, "multi_gpu": 8, "fsdp2": 8, "multi_node": 16,
    }[trainer]  # fmt: skip


def test_the_overrides_of_the_readme_compose(compose):
    config = compose("data.batch_size=512", "trainer.devices=8", "optimizer.lr=3e-4")
    assert (config.data.batch_size, config.trainer.devices, config.optimizer.lr) == (512, 8, 3e-4)
    assert recipe_of(config).global_batch_size == 512
    assert compose("profiler=simple").profiler == "simple"
    assert compose("experiment=debug", "trainer.fast_dev_run=10").trainer.fast_dev_run == 10
    assert compose("ckpt_path=/some/where").ckpt_path == "/some/where"
    assert compose("+trainer.detect_anomaly=true").trainer.detect_anomaly is True
    launched = compose("hydra/launcher=submitit_local", "experiment=scaling_170M", "objective=autoregressive")
    assert launched.objective.name == "autoregressive" and launched.model.name == "170M"
    assert compose("callbacks=early_stopping").callbacks.early_stopping.monitor == "val/loss"


def test_an_experiment_wins_over_the_base_and_the_command_line_over_both(compose):
    assert load_base()["training"]["steps"] is None
    assert compose("experiment=debug").training.steps == 200
    assert compose("experiment=debug", "training.steps=40").training.steps == 40


def test_the_directory_of_a_run_is_stable(compose, workdir):
    first, again = (compose("experiment=debug") for _ in range(2))
    assert first.paths.run_dir == again.paths.run_dir == f"{workdir}/adhoc/runs/{first.cell_id}"
    assert first.logger.id == f"adhoc-{first.cell_id}" and first.logger.offline is True
    assert compose("experiment=debug", "seed=1").paths.run_dir != first.paths.run_dir
    for other in ("trainer.threads=2", "data.micro_batch_size=2", "data.num_workers=3", "logger=none",
                  "callbacks=early_stopping", "validation.times=2"):  # fmt: skip
        assert compose("experiment=debug", other).cell_id == first.cell_id, other


@pytest.mark.parametrize("group", DECIDING)
def test_a_group_that_plans_read_is_plain_and_is_what_hydra_composes(group, compose):
    for choice in choices(group):
        text = (configs_dir() / group / f"{choice}.yaml").read_text()
        assert "@package" not in text and "defaults" not in yaml.safe_load(text)
        read = load_choice(group, choice)
        interpolated = [key for key, value in read.items() if "${" in str(value)]
        folders = ["sources" if "sources" in read else "data_dir"]
        assert interpolated == (folders if group == "data" else [])
        if choice not in [*choices(group)[:12], *choices(group)[12::4]]:  # there are many models; composing takes 0.2 s
            continue
        config = compose(f"{group}={choice}", "training.budget=1e22")
        assert OmegaConf.to_container(config[group], resolve=False) == read  # numbers as numbers: 1e-3 is no text
        assert config[group].name == choice
        config.model.block_size = 4096
        assert recipe_of(config).steps > 0


def test_the_base_that_plan_reads_is_what_hydra_composes(compose):
    composed = OmegaConf.to_container(compose(), resolve=False)
    for key, value in load_base().items():
        assert composed[key] == value


def test_several_gpus_shard_the_model_and_wait_as_long_as_asked(compose):
    words = ("experiment=debug", "trainer=multi_gpu", "trainer.accelerator=cpu", "trainer.devices=2")
    for name, kind in {"fsdp": ModelParallelStrategy, "fsdp2": ModelParallelStrategy, "auto": DDPStrategy}.items():
        config = compose(*words, "trainer.process_group_timeout=90", f"trainer.strategy={name}")
        plain = fill(OmegaConf.to_container(config, resolve=True))
        strategy = make_trainer(plain, recipe_of(config), None).strategy
        assert isinstance(strategy, kind) and strategy._timeout.total_seconds() == 90
    assert compose(*words).trainer.strategy == "fsdp"


def test_every_node_has_a_copy_of_a_sharded_model_unless_it_has_a_single_device(compose):
    words = ("experiment=debug", "trainer.accelerator=cpu", "trainer.strategy=fsdp")
    copies = {}
    for nodes, devices, over in [(1, 2, "auto"), (2, 2, "auto"), (2, 1, "auto"), (2, 2, "all"), (2, 1, "node")]:
        config = compose(*words, f"trainer.num_nodes={nodes}", f"trainer.devices={devices}",
                         f"trainer.fsdp_shard_over={over}")  # fmt: skip
        plain = fill(OmegaConf.to_container(config, resolve=True))
        copies[nodes, devices, over] = make_trainer(plain, recipe_of(config), None).strategy.copies
    assert copies == {(1, 2, "auto"): 1, (2, 2, "auto"): 2, (2, 1, "auto"): 1, (2, 2, "all"): 1, (2, 1, "node"): 2}
