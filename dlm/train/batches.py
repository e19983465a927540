"""Turn prepared tokens into training and validation batches with their noise.

Micro-batch k of a run is a pure function of (seed, k): the global batch of step s holds samples s B to s B + B - 1, and
every rank and every micro-batch takes a contiguous part of it. A resumed run can therefore start at any k without
reading the earlier micro-batches.

Legend: B sequences of a batch, T tokens of a sequence, S validation sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dlm.core.errors import UserError
from dlm.core.recipe import Recipe
from dlm.data.manifest import DataSet, unique_of
from dlm.data.mixture import Mixture, open_mixture
from dlm.data.noise import stratified_t, uniforms
from dlm.train.objectives import Batch, Objective

VALIDATION_TOKENS = 16384  # target size of one validation batch


@dataclass(eq=False)
class TrainingBatches(Dataset[Batch]):
    """A dataset whose item k is the k-th micro-batch of one rank, noise included.

    Args:
        tokens: The training split.
        objective: The training objective, which corrupts the text.
        seed: The seed of the order of the data and of the noise.
        batch_size: Sequences of an optimiser step, over all ranks.
        micro_batch_size: Sequences of one item.
        rank: The rank of this process, from 0.
        world_size: Number of processes.
    """

    tokens: Mixture
    objective: Objective
    _: KW_ONLY
    seed: int
    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __getitem__(self, k: int) -> Batch:
        accumulation = self.batch_size // self.world_size // self.micro_batch_size
        step, part = divmod(k, accumulation)
        first = (self.rank * accumulation + part) * self.micro_batch_size
        position_B = np.arange(first, first + self.micro_batch_size)  # positions in the global batch
        first_sample = step * self.batch_size + first
        rows_BT = self.tokens.text(self.tokens.order(first_sample, self.micro_batch_size, seed=self.seed))
        t_B = stratified_t(self.seed, step, position_B)
        uniform_BT = uniforms(self.seed, first_sample, *rows_BT.shape)
        return self.objective.corrupt(rows_BT, t_B, uniform_BT)


@dataclass(eq=False)
class ValidationBatches(Dataset[Batch]):
    """A dataset of one rank's share of a fixed set of sequences, each with several draws of fixed noise.

    An item is the batch that ``Objective.probe`` makes of S sequences, with all draws of a sequence in consecutive
    rows. It has two more entries: ``sequence``, the (S,) positions of the sequences in the fixed set, and ``draws``,
    the number of draws per sequence.

    Args:
        tokens: The validation split.
        objective: The training objective, which corrupts the text. If its loss is exact, only one draw is made.
        seed: The seed of the noise.
        num_sequences: Size of the fixed set, which is spread evenly over the split.
        draws: Noise draws per sequence.
        rank: The rank of this process, from 0.
        world_size: Number of processes.

    Raises:
        UserError: The fixed set has fewer sequences than there are processes.
    """

    tokens: Mixture
    objective: Objective
    _: KW_ONLY
    seed: int
    num_sequences: int
    draws: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        self.draws = self.draws if self.objective.info.is_bound else 1
        self.rows = self.tokens.validation_rows(self.num_sequences)
        if len(self.rows) < self.world_size:
            raise UserError(
                f"{len(self.rows)} validation sequences for {self.world_size} devices: raise validation.num_sequences, "
                "or prepare more validation data"
            )
        shares = np.array_split(np.arange(len(self.rows)), self.world_size)
        mine = shares[self.rank]
        size = max(VALIDATION_TOKENS // (self.tokens.block_size * self.draws), 1)
        self.parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        # Every forward pass of a sharded model involves all ranks, so all ranks need the same number of batches. A rank
        # with fewer batches repeats its last sequence, which gives the same loss again.
        self.parts += [mine[-1:]] * (-(-len(shares[0]) // size) - len(self.parts))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, k: int) -> Batch:
        sequence_S = self.parts[k]  # consecutive numbers, so the draws are numbered consecutively too
        draw_B = (sequence_S[:, None] * self.draws + np.arange(self.draws)).ravel()
        rows_BT = self.tokens.text(np.repeat(self.rows[sequence_S], self.draws))
        uniform_BT = uniforms(self.seed, int(draw_B[0]), *rows_BT.shape)
        batch = self.objective.probe(rows_BT, stratified_t(self.seed, 0, draw_B), uniform_BT)
        return {**batch, "sequence": sequence_S, "draws": self.draws}


@dataclass(eq=False)
class FromOffset(Sampler[int]):
    """A sampler of the micro-batches from ``start`` to ``total`` - 1.

    Its length is ``total``, because Lightning also counts the micro-batches before ``start``.
    """

    start: int
    total: int

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class PackedDataModule(L.LightningDataModule):
    """The training and validation batches of one run, for the rank and the world size of its trainer.

    Args:
        data_set: The prepared data, of one source or mixed from several.
        objective: The training objective, which corrupts the text.
        recipe: The recipe, which gives the number of steps, the batch size and the block size.
        config: The complete config; this class reads the nodes data and validation and the seed.
    """

    trainer: L.Trainer  # type: ignore[assignment]  # Lightning sets it before it asks for a loader

    def __init__(self, data_set: DataSet, objective: Objective, recipe: Recipe, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.data_set, self.objective, self.recipe, self.config = data_set, objective, recipe, config
        lengths = {"block_size": recipe.block_size, "stride": config["data"]["stride"]}
        self.train_tokens = open_mixture(data_set, "train", **lengths, unique=unique_of(config["data"]))
        self.validation_tokens = open_mixture(data_set, "validation", **lengths)

    def setup(self, stage: str) -> None:
        """Check that all processes divide the batch alike. Raises UserError if their devices differ in memory."""
        strategy = self.trainer.strategy
        times = strategy.all_gather(torch.tensor(self.trainer.accumulate_grad_batches, device=strategy.root_device))
        if len(times.unique()) > 1:
            raise UserError(
                "the devices of this run differ in memory, so they would choose different micro-batches: set "
                "data.micro_batch_size"
            )

    def _place(self) -> dict[str, int]:
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _loader(self, dataset: Dataset[Batch], **options: Any) -> DataLoader[Batch]:
        """Make a loader of single items; for a GPU with pinned memory, so that copying does not wait for the device."""
        pinned = self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(dataset, batch_size=None, pin_memory=pinned, **options)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the micro-batches of this rank from the trainer's current step on."""
        accumulation = self.trainer.accumulate_grad_batches
        dataset = TrainingBatches(
            self.train_tokens,
            self.objective,
            seed=self.config["seed"],
            batch_size=self.recipe.global_batch_size,
            micro_batch_size=self.recipe.global_batch_size // self.trainer.world_size // accumulation,
            **self._place(),
        )
        sampler = FromOffset(self.trainer.global_step * accumulation, self.recipe.steps * accumulation)
        return self._loader(dataset, sampler=sampler, num_workers=self.config["data"]["num_workers"])

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's share of the fixed validation set."""
        options = {key: self.config["validation"][key] for key in ("seed", "num_sequences", "draws")}
        return self._loader(ValidationBatches(self.validation_tokens, self.objective, **options, **self._place()))

    def validation_rows(self) -> np.ndarray:
        """Return the rows of the validation split that form the fixed validation set, for all ranks."""
        return self.validation_tokens.validation_rows(self.config["validation"]["num_sequences"])

    def unigram_entropy(self) -> float:
        """Return the entropy of the token frequencies in the validation set, nats/token.

        It is the loss of a model that predicts these frequencies without using context.
        """
        counts = np.bincount(self.validation_tokens.rows(self.validation_rows()).ravel())
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())
