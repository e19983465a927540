"""Make dlm's training step from a config as a run does, and measure windows of steps.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.card.estimates import WARM_STEPS, WINDOWS
from benchmarks.card.rows import Row, Scale
from benchmarks.peers import Absent
from benchmarks.side_by_side import alternate, compared
from dlm.core.configs import load_choice, merge, nest
from dlm.core.flops import flops_per_token
from dlm.core.recipe import derive, fill
from dlm.core.shape import ModelShape
from dlm.data.noise import stratified_t, uniforms
from dlm.plan.grid import cell_config
from dlm.train.callbacks.monitors import peak_flops
from dlm.train.models.lightning_module import DiffusionLMLightningModule
from dlm.train.objectives import Batch, Objective, make_objective
from dlm.train.optim import make_optimizer
from dlm.train.trainer import make_trainer

BATCHES = 4  # different micro-batches, which a window uses in turn


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The device, how large everything is on it, and the row that is being measured."""

    device: torch.device
    scale: Scale
    peers: Path
    row: Row
    smdm: Path | None = None  # its checkout, if it is not in ``peers``
    reach: Callable[[str], None] = field(default=lambda text: None)  # says how far the measurement has come

    @property
    def shape(self) -> ModelShape:
        """The shape of the model."""
        return self.scale.shape(self.row.size)

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch."""
        return self.scale.micro_batch(self.row.micro_batch)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.scale.length

    def synchronise(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes that the GPU holds for this process; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def autocast(self) -> torch.autocast:
        """Autocast of a peer: to bfloat16, unless everything is computed in float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.scale.precision == "bf16-mixed")

    def texts(self) -> np.ndarray:
        """Random tokens, (BATCHES, B, T + 1)."""
        size = (BATCHES, self.micro_batch, self.scale.length + 1)
        return np.random.default_rng(0).integers(0, self.shape.vocab_size, size)

    def given_and_next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The input of an autoregressive peer: the tokens, and the token that follows each; (BATCHES, B, T) each."""
        text = torch.from_numpy(self.texts()).to(self.device)
        return text[:, :, :-1].contiguous(), text[:, :, 1:].contiguous()

    def batches(self, objective: Objective, device: torch.device | None = None) -> list[Batch]:
        """Micro-batches as an objective makes them, on the device."""
        place, result = np.arange(self.micro_batch), []
        for step, text in enumerate(self.texts()):
            noise = uniforms(0, step * len(place), len(place), self.scale.length)
            made = objective.corrupt(text[:, :-1], stratified_t(0, step, place), noise)
            result.append({key: torch.as_tensor(value).to(device or self.device) for key, value in made.items()
                           if key != "overflow"})  # fmt: skip
        return result


@dataclass(frozen=True, kw_only=True)
class Side:
    """A training step that can be measured."""

    step: Callable[[int], None]  # takes the number of the step
    tokens: int
    flops: float  # of a step; attention counts whole, also where it is causal
    about: Mapping[str, Any] = field(default_factory=dict)


def counted_flops(shape: ModelShape, objective: Objective, *, length: int) -> float:
    """Return the training FLOPs of a token: full_masked_head, but with causal attention counted whole.

    nanochat counts its causal attention whole too, so its MFU and ours compare.
    """
    per_token = flops_per_token(shape, convention="full_masked_head", block_size=length, objective=objective.info)
    return float(per_token) + (6 * shape.n_layer * shape.n_embd * length if objective.info.causal else 0)


def make_config(bench: Bench, overrides: Mapping[str, Any], *, objective: str = "masked_diffusion") -> dict[str, Any]:
    """Compose the config of a run on one device, as Hydra does. Raises Absent for a key that dlm does not have."""
    groups = {"model": bench.scale.model(bench.row.size), "data": "slim_pajama", "objective": objective,
              "optimizer": "adamw", "scheduler": "cosine"}  # fmt: skip
    sizes = {"data.block_size": bench.scale.length, "data.batch_size": bench.micro_batch,
             "data.micro_batch_size": bench.micro_batch, "training.steps": 1000}  # fmt: skip
    base = load_choice("trainer", "single_gpu" if bench.device.type == "cuda" else "cpu")
    ours = {"trainer.precision": bench.scale.precision, "trainer.compile": True, **overrides}
    chosen = nest({key: value for key, value in ours.items() if key.startswith("trainer.")})["trainer"]
    if unknown := chosen.keys() - base.keys():
        raise Absent(f"this dlm has no trainer.{', trainer.'.join(sorted(unknown))}")
    trainer = merge(base, chosen)
    config = fill(cell_config(groups, {**sizes, **ours}))
    return {**config, "trainer": trainer, "profiler": None, "cell_id": "benchmark"}


def make_module(bench: Bench, config: Mapping[str, Any], *, device: torch.device) -> DiffusionLMLightningModule:
    """Make the Lightning module of a run on a device, set up by a trainer, and compiled if the config says so."""
    recipe = derive(config)
    module = DiffusionLMLightningModule(
        recipe, make_objective(config, vocab_size=recipe.shape.vocab_size, bos_id=0), config
    )
    module.trainer = make_trainer(config, recipe, None)
    assert module.trainer.strategy.root_device.type == device.type
    module.setup("fit")
    module.configure_model()
    return module.to(device)


def ours(bench: Bench, overrides: Mapping[str, Any] | None = None, *, objective: str = "masked_diffusion",
         change: Callable[[DiffusionLMLightningModule], None] | None = None) -> Side:  # fmt: skip
    """Make dlm's training step: the methods that Lightning calls, in a bare loop.

    Args:
        bench: The bench.
        overrides: Config keys; by default those of the row.
        objective: The objective.
        change: Is called with the module before the first step.
    """
    config = make_config(bench, bench.row.overrides if overrides is None else overrides, objective=objective)
    module = make_module(bench, config, device=bench.device)
    if change is not None:
        change(module)
    batches = bench.batches(module.objective)
    optimizer = make_optimizer(module.model, config["optimizer"], module.recipe.shape)
    context = module.trainer.precision_plugin.forward_context

    def step(number: int) -> None:
        with context():
            loss = module.training_step(dict(batches[number % BATCHES]), number)
        module.backward(loss)
        module.configure_gradient_clipping()
        optimizer.step()
        optimizer.zero_grad()

    flops = counted_flops(bench.shape, module.objective, length=bench.scale.length) * bench.tokens
    asked = config["trainer"]["attention"]
    return Side(step=step, tokens=bench.tokens, flops=flops,
                about={"attention": module.attention, "attention_fell_back": asked not in ("auto", module.attention),
                       "compiled": config["trainer"]["compile"]})  # fmt: skip


def window(bench: Bench, side: Side, steps: int) -> dict[str, float]:
    """Run steps and return what they took."""
    bench.synchronise()
    began = time.perf_counter()
    for number in range(steps):
        side.step(number)
    bench.synchronise()
    seconds = (time.perf_counter() - began) / steps
    return {"step_sec": seconds, "tokens_per_sec": side.tokens / seconds, "flops_per_sec": side.flops / seconds}


def warm_up(bench: Bench, side: Side) -> dict[str, float]:
    """Run the first steps. The first one compiles; the last one tells how long a step takes."""
    first = window(bench, side, 1)["step_sec"]
    bench.reach("first step")
    rest = [window(bench, side, 1)["step_sec"] for _ in range(WARM_STEPS - 1)]
    return {"first_step_sec": first, "warm_up_sec": first + sum(rest), "warm_step_sec": rest[-1]}


def alone(bench: Bench, side: Side) -> dict[str, Any]:
    """Measure one side: medians of five windows of at least ``Scale.seconds`` or as many steps as ``Scale.steps``."""
    before = bench.allocated()
    warm = warm_up(bench, side)
    least = math.ceil(bench.scale.seconds / max(warm["warm_step_sec"], 1e-6))
    steps = min(max(least, 3), bench.scale.steps)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    windows = [window(bench, side, steps) for _ in range(WINDOWS)]
    peak = torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda" else None
    medians = {key: statistics.median(one[key] for one in windows) for key in windows[0]}
    return {
        **medians,
        "step_sec_spread": spread(one["step_sec"] for one in windows),
        **mfu(bench, medians["flops_per_sec"]),
        **warm,
        "steps_of_a_window": steps,
        "peak_bytes": peak,
        "allocated_before_bytes": before,
        **side.about,
    }


def mfu(bench: Bench, flops_per_sec: float) -> dict[str, float | None]:
    """Return the share of the device's peak; None if the peak is not known."""
    peak = peak_flops(bench.device)
    return {"mfu": None if peak is None else flops_per_sec / peak}


def spread(values: Any) -> list[float]:
    """Return the least and the largest value."""
    found = sorted(values)
    return [found[0], found[-1]]


def in_turn(bench: Bench, left: Side, right: Side) -> dict[str, Any]:
    """Measure two sides in turn, A B A B: five windows of each after the warm-up of both."""
    warm = {name: warm_up(bench, side) for name, side in (("ours", left), ("peer", right))}
    bench.reach("warm-up of both")
    peaks: dict[str, int | None] = {}

    def windows(name: str, side: Side) -> dict[str, float]:
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        measured = window(bench, side, bench.scale.steps)
        peaks[name] = torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda" else None
        return measured

    rows = compared(*alternate(lambda: windows("ours", left), lambda: windows("peer", right), WINDOWS))
    shares = {name: mfu(bench, rows["flops_per_sec"][name])["mfu"] for name in ("ours", "peer")}
    return {**rows, "mfu": shares, "warm_up": warm, "peak_bytes": peaks,
            "about": {"ours": dict(left.about), "peer": dict(right.about)}}  # fmt: skip
