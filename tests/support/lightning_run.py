"""Train a small model with Lightning and its own W&B logger, as a project without dlm does: `... '{"id": ...}'`.

The argument is a JSON object: folder, id, group and config of the W&B run, steps, and the validation losses to log,
one at each tenth of the steps.
"""

import json
import sys

import lightning
import torch
from lightning.pytorch.loggers import WandbLogger


class Model(lightning.LightningModule):
    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weights = torch.nn.Linear(4, 1)
        self.losses = iter(losses)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = self.weights(batch).pow(2).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.log("val/loss", next(self.losses))

    def test_step(self, batch: torch.Tensor, _: int) -> None:
        self.log("test/loss", 9.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main() -> None:
    """Train, then test, which logs one step further."""
    given = json.loads(sys.argv[1])
    logger = WandbLogger(project="dlm", id=given["id"], group=given["group"], save_dir=given["folder"])
    logger.log_hyperparams(given["config"])
    steps = given["steps"]
    trainer = lightning.Trainer(
        max_steps=steps, val_check_interval=steps // 10, logger=logger, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10, num_sanity_val_steps=0,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(torch.randn(steps, 4))
    one = torch.utils.data.DataLoader(torch.randn(1, 4))
    model = Model(given["losses"])
    trainer.fit(model, batches, one)
    trainer.test(model, one, verbose=False)
    logger.experiment.finish()


if __name__ == "__main__":
    main()
