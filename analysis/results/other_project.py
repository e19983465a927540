"""Train the runs of results/other_project: a project that does not know dlm, with Lightning and its W&B logger.

    python analysis/results/other_project.py FOLDER

The model predicts the next byte from the 16 bytes before it, with one hidden layer. The text is the source code of the
Python standard library. Each run becomes one .wandb file in FOLDER, as W&B writes it without a server. Of the 22 runs,
one stops early and one is trained on shuffled bytes, so that there is something to leave out.
"""

import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import lightning
import numpy as np
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger

CONTEXT, EMBEDDING, BATCH = 16, 8, 256
SIZES = (2, 4, 8, 16, 32)  # units of the hidden layer
STEPS = (80, 200, 500, 1250)
LEAST_BYTES = 4096  # of a .wandb file that holds a run
VALIDATION = 20_000  # bytes at the end of the text


class NextByte(lightning.LightningModule):
    """One hidden layer between the embeddings of the bytes before and the scores of the next byte."""

    def __init__(self, hidden: int, steps: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, EMBEDDING)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(CONTEXT * EMBEDDING, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, 256)
        )
        self.steps = steps

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the last byte of each window, in nats."""
        scores = self.layers(self.embed(windows[:, :-1]).flatten(1))
        return torch.nn.functional.cross_entropy(scores, windows[:, -1])

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = self.loss(batch[0])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("val/loss", self.loss(batch[0]))

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=self.steps),
                "interval": "step",
            },
        }


def text() -> np.ndarray:
    """Return the bytes of the modules of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return np.frombuffer(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))), dtype=np.uint8)


def windows(text: np.ndarray) -> torch.utils.data.TensorDataset:
    """Return every window of CONTEXT + 1 bytes."""
    every = np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1)
    return torch.utils.data.TensorDataset(torch.from_numpy(every.astype(np.int64)))


def train(folder: Path, *, hidden: int, steps: int, dataset: str = "stdlib", stop: int | None = None) -> None:
    """Train one run, and copy its .wandb file into the folder."""
    lightning.seed_everything(hidden * 10_000 + steps, verbose=False)
    whole = text()
    if dataset == "shuffled":
        whole = np.random.default_rng(0).permutation(whole)
    model = NextByte(hidden, steps)
    name = f"mlp-{hidden}-{steps}" + ("" if dataset == "stdlib" else f"-{dataset}") + ("-stopped" if stop else "")
    quiet = wandb.Settings(x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, console="off",
                           host="", disable_git=True, program="", root_dir="", silent=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        logger = WandbLogger(name=name, id=name, project="next-byte", save_dir=scratch, offline=True, settings=quiet)
        weights = sum(weight.numel() for weight in model.layers.parameters())
        logger.experiment.config.update(
            {
                "net": {"hidden": hidden, "context": CONTEXT, "weights_without_embedding": weights},
                "optim": {"max_steps": steps, "batch_size": BATCH, "lr": 1e-2},
                "dataset": dataset,
            }
        )
        trainer = lightning.Trainer(
            max_steps=stop or steps, logger=logger, val_check_interval=steps // 10, log_every_n_steps=steps // 20,
            accelerator="cpu", devices=1, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        batches = torch.utils.data.DataLoader(windows(whole[:-VALIDATION]), batch_size=BATCH, shuffle=True)
        held = torch.utils.data.DataLoader(windows(whole[-VALIDATION:]), batch_size=VALIDATION)
        trainer.fit(model, batches, held)
        wandb.finish(exit_code=1 if stop else 0)
        for found in Path(scratch).rglob("*.wandb"):
            if found.stat().st_size < LEAST_BYTES:
                raise RuntimeError(f"W&B wrote only {found.stat().st_size} bytes of {name}: start again")
            shutil.copy(found, folder / f"{name}.wandb")


def main() -> None:
    """Train all runs."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for hidden in SIZES:
        for steps in STEPS:
            train(folder, hidden=hidden, steps=steps)
    train(folder, hidden=16, steps=1250, stop=750)
    train(folder, hidden=8, steps=500, dataset="shuffled")


if __name__ == "__main__":
    main()
