"""slim_pajama: prepared tokens -> batches with their noise, as a LightningDataModule. Built by train.

Micro-batch k of a run is a pure function of (seed, k): the global batch of step s holds samples s B .. s B + B - 1,
every rank and micro-batch takes a contiguous part of it, and a resume starts at any k without reading what is before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from dlm.core.errors import UserError
from dlm.data.manifest import DataSet
from dlm.data.mixture import Mixture, open_mixture
from dlm.data.noise import stratified_t, uniforms
from dlm.train.objectives import Batch, Objective

VALIDATION_TOKENS = 16384  # tokens of one validation batch


class TrainingBatches(Dataset[Batch]):
    """Item k is the k-th micro-batch of this rank, noise included."""

    def __init__(
        self,
        tokens: Mixture,
        objective: Objective,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.tokens, self.objective, self.seed = tokens, objective, seed
        self.batch_size, self.micro, self.rank = batch_size, micro_batch_size, rank
        self.accumulation = batch_size // world_size // micro_batch_size

    def __getitem__(self, k: int) -> Batch:
        step, part = divmod(k, self.accumulation)
        first = (self.rank * self.accumulation + part) * self.micro
        position_B = np.arange(first, first + self.micro)
        index_B = step * self.batch_size + position_B
        rows_BT = self.tokens.text(self.tokens.order(int(index_B[0]), self.micro, seed=self.seed))
        t_B = stratified_t(self.seed, step, position_B)
        uniform_BT = uniforms(self.seed, int(index_B[0]), *rows_BT.shape)
        return self.objective.corrupt(rows_BT, t_B, uniform_BT)


class ValidationBatches(Dataset[Batch]):
    """Fixed sequences spread over the split, each drawn ``draws`` times with fixed noise; a part per rank."""

    def __init__(
        self,
        tokens: Mixture,
        objective: Objective,
        *,
        seed: int,
        num_sequences: int,
        draws: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.tokens, self.objective, self.seed = tokens, objective, seed
        self.draws = 1 if objective.estimator == "exact" else draws
        self.rows = tokens.validation_rows(num_sequences)
        size = max(VALIDATION_TOKENS // (tokens.block_size * self.draws), 1)
        if len(self.rows) < world_size:
            raise UserError(
                f"{len(self.rows)} validation sequences for {world_size} devices: raise validation.num_sequences, or "
                "prepare more validation data"
            )
        shares = np.array_split(np.arange(len(self.rows)), world_size)
        mine = shares[rank]
        self.parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        # A sharded model is gathered in every forward pass, so all ranks need as many: the last sequence once more.
        self.parts += [mine[-1:]] * (-(-len(shares[0]) // size) - len(self.parts))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, k: int) -> Batch:
        if k >= len(self.parts):
            raise IndexError(k)
        sequence_S = self.parts[k]  # contiguous, so their draws are too
        draw_B = (sequence_S[:, None] * self.draws + np.arange(self.draws)).ravel()
        rows_BT = self.tokens.text(np.repeat(self.rows[sequence_S], self.draws))
        uniform_BT = uniforms(self.seed, int(draw_B[0]), *rows_BT.shape)
        batch = self.objective.probe(rows_BT, stratified_t(self.seed, 0, draw_B), uniform_BT)
        return {**batch, "sequence": sequence_S, "draws": self.draws}


class FromOffset(Sampler[int]):
    """Counts micro-batches from where the run stands; its length is that of the whole run, as Lightning counts."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class SlimPajamaDataModule(L.LightningDataModule):
    """Any packed data, alone or mixed, SlimPajama the first of them; the world size is the trainer's."""

    def __init__(
        self,
        data: DataSet,
        objective: Objective,
        *,
        block_size: int,
        stride: int,
        batch_size: int,
        micro_batch_size: int,
        accumulation: int,
        steps: int,
        seed: int,
        num_workers: int,
        num_sequences: int,
        draws: int,
        validation_seed: int,
    ) -> None:
        super().__init__()
        self.objective, self.seed, self.steps, self.num_workers = objective, seed, steps, num_workers
        self.batch_size, self.micro, self.accumulation = batch_size, micro_batch_size, accumulation
        self.validation = {"seed": validation_seed, "num_sequences": num_sequences, "draws": draws}
        self.train_tokens, self.validation_tokens = (
            open_mixture(data, split, block_size=block_size, stride=stride) for split in ("train", "validation")
        )

    def _place(self) -> dict[str, int]:
        assert self.trainer is not None
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _loader(self, dataset: Dataset[Batch], **options: Any) -> DataLoader[Batch]:
        """One item a batch; in pinned memory where it goes to a GPU, so that the copy need not wait for the device."""
        assert self.trainer is not None
        pinned = self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(dataset, batch_size=None, pin_memory=pinned, **options)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The micro-batches of this rank, from the trainer's current step on."""
        assert self.trainer is not None
        dataset = TrainingBatches(
            self.train_tokens,
            self.objective,
            seed=self.seed,
            batch_size=self.batch_size,
            micro_batch_size=self.micro,
            **self._place(),
        )
        start = self.trainer.global_step * self.accumulation
        sampler = FromOffset(start, self.steps * self.accumulation)
        return self._loader(dataset, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The fixed validation set with its fixed noise."""
        dataset = ValidationBatches(self.validation_tokens, self.objective, **self.validation, **self._place())
        return self._loader(dataset)

    @property
    def num_validation_sequences(self) -> int:
        """Sequences of the fixed validation set, over all ranks."""
        return len(self.validation_tokens.validation_rows(self.validation["num_sequences"]))

    def unigram_entropy(self) -> float:
        """Entropy of the token frequencies of the validation sequences, nats/token: what counting alone reaches."""
        rows = self.validation_tokens.validation_rows(self.validation["num_sequences"])
        counts = np.bincount(self.validation_tokens.rows(rows).ravel())
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())
