"""What finds a run in W&B knows it by the id under which the run was logged."""

from omegaconf import OmegaConf

from dlm.core.paths import configs_dir
from dlm.record import run_id


def test_the_id_of_a_run_in_wandb_is_that_of_the_logger_config():
    logger = OmegaConf.load(configs_dir() / "logger" / "wandb.yaml")
    config = OmegaConf.create({"sweep": "demo", "cell_id": "mdm-8k-1e12-0a1b2c3d", "logger": logger})
    assert run_id("demo", "mdm-8k-1e12-0a1b2c3d") == config.logger.id
