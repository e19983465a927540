"""List what the card script measures, in the order of worth, and the sizes that stand for a card on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dlm.core.shape import ModelShape, load_shape


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is: as on a card, or small enough for a CPU."""

    name: str
    models: Mapping[str, str] = field(default_factory=dict)  # size of a row -> the model that stands for it
    length: int = 2048  # tokens of a sequence
    divisor: int = 1  # micro-batches are divided by this
    steps: int = 20  # steps of a window where two sides are compared
    seconds: float = 1.0  # least duration of a window of one side alone
    precision: str = "bf16-mixed"  # trainer.precision
    backend: str | None = None  # of torch.compile; None: PyTorch's own
    threads: int | None = None  # of a CPU
    patience: float = 4.0  # a row is stopped after so many times its estimate

    def shape(self, size: str) -> ModelShape:
        """Return the shape of the model that stands for a size."""
        return load_shape(self.model(size))

    def model(self, size: str) -> str:
        """Return the name of the model that stands for a size."""
        return self.models.get(size, size)

    def micro_batch(self, sequences: int) -> int:
        """Return the micro-batch that stands for one of ``sequences`` on a card."""
        return max(sequences // self.divisor, 1)


SIZES = ("6M", "85M", "170M", "268M", "472M", "666M", "1028M")
SCALES = {
    scale.name: scale
    for scale in (
        Scale(name="card"),
        Scale(name="medium", models=dict(zip(SIZES, ("197k", "410k", *["885k"] * 5), strict=True)), length=256,
              divisor=4, steps=4, seconds=0.5, precision="32-true"),
        Scale(name="toy", models=dict.fromkeys(SIZES, "8k"), length=32, divisor=4, steps=2, seconds=0.0,
              backend="eager", threads=1, patience=300.0),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement."""

    name: str  # its first part is the name of the group, for --rows
    kind: str  # how it is measured: the name of a function in benchmarks/card/kinds.py or against.py
    size: str = "6M"
    micro_batch: int = 1
    overrides: Mapping[str, Any] = field(default_factory=dict)  # config keys of our side: another axis is another key
    options: Mapping[str, Any] = field(default_factory=dict)  # what else its kind needs

    @property
    def compiled(self) -> bool:
        """Whether our side is compiled."""
        return bool(self.overrides.get("trainer.compile", True))

    @property
    def group(self) -> str:
        """The name for --rows."""
        return self.name.split("/")[0]

    def halved(self, times: int) -> Row:
        """Return the row with its micro-batch halved so many times; it holds at least one sequence."""
        return dataclasses.replace(self, micro_batch=max(self.micro_batch >> times, 1))


BF16_KERNELS = ("math", "flash", "cudnn", "efficient", "fa3", "flash_attn", "fa4")
CROSS_ENTROPY = ("chunked", "liger", "cut")  # values of trainer.cross_entropy, each beside dense


def _numbers() -> Iterator[Row]:
    for precision, kernels in (("fp32", ("math", "efficient")), ("tf32", ("math",)), ("bf16", BF16_KERNELS)):
        for kernel in kernels:
            yield Row(name=f"numbers/6M/{precision}/{kernel}", kind="numbers", micro_batch=2,
                      options={"precision": precision, "kernel": kernel})  # fmt: skip
    for name in CROSS_ENTROPY:
        yield Row(name=f"numbers/6M/bf16/{name}", kind="numbers", micro_batch=2,
                  overrides={"trainer.cross_entropy": name},
                  options={"precision": "bf16", "kernel": "flash"})  # fmt: skip


def _steps() -> Iterator[Row]:
    for compiled in (True, False):
        for micro_batch in (32, 8):
            for kernel in ("flash", "cudnn", "fa3"):
                word = "compiled" if compiled else "eager"
                yield Row(name=f"steps/170M/x{micro_batch}/{word}/{kernel}", kind="step", size="170M",
                          micro_batch=micro_batch,
                          overrides={"trainer.compile": compiled, "trainer.attention": kernel})  # fmt: skip


def _sized(group: str, kind: str, sizes: Mapping[str, int], **options: Any) -> Iterator[Row]:
    for size, micro_batch in sizes.items():
        yield Row(name=f"{group}/{size}", kind=kind, size=size, micro_batch=micro_batch, options=options)


def all_rows() -> list[Row]:
    """Return every measurement, in the order of worth. On a card, all of them should fit 80 GB."""
    return [
        Row(name="product", kind="product"),
        *_numbers(),
        *_steps(),
        *_sized("smdm", "against", {"6M": 32, "170M": 8}, peer="smdm"),
        *_sized("mfu", "step", {"6M": 32, "85M": 32, "472M": 16, "1028M": 16}),
        *_sized("launch", "launch", {"170M": 8, "6M": 32}),
        *_sized("compile", "first_step", {"170M": 8}),
        *_sized("head", "head", {"6M": 32}),
        *(Row(name=f"cross_entropy/6M/{name}", kind="cross_entropy", micro_batch=32,
              overrides={"trainer.cross_entropy": name}) for name in CROSS_ENTROPY),
        *_sized("nanochat", "against", {"85M": 32, "268M": 16, "666M": 8}, peer="nanochat"),
        *_sized("litgpt", "against", {"170M": 16, "1028M": 8}, peer="litgpt"),
        *_sized("modernbert", "against", {"170M": 16}, peer="modernbert"),
        *_sized("smdm", "against", {"1028M": 4}, peer="smdm"),
    ]  # fmt: skip
