"""Measure a row: a function for each kind takes the bench and returns the record."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.card.bench import Bench, alone, in_turn, make_config, make_module, ours, spread, warm_up, window
from benchmarks.card.estimates import WINDOWS
from benchmarks.side_by_side import ROOT
from dlm.core.errors import ExitCode
from dlm.core.files import read_json, read_jsonl
from dlm.data.manifest import Manifest, write_manifest
from dlm.data.packed import write_packed
from dlm.train.callbacks.monitors import peak_flops
from dlm.train.models.attention import kernels

SIDE = {"card": 8192, "medium": 1024, "toy": 256}  # of the square matrices
# The relative errors that are rounding: of the loss, and of all gradients together.
ROUNDING = {"fp32": (1e-5, 1e-3), "tf32": (1e-3, 1e-2), "bf16": (1e-2, 5e-2)}


def product(bench: Bench) -> dict[str, Any]:
    """Measure the product of two matrices of random numbers in bfloat16, and a copy within the memory."""
    size = SIDE[bench.scale.name]
    rates = product_rates(bench.device, size)
    source = torch.randn(size, size, 4, device=bench.device)
    target = torch.empty_like(source)
    copies = [_seconds(bench.device, lambda: target.copy_(source), 10) for _ in range(WINDOWS + 1)][1:]
    peak = peak_flops(bench.device)
    rate = statistics.median(rates)
    return {
        "flops_per_sec": rate,
        "flops_per_sec_spread": spread(rates),
        "mfu": None if peak is None else rate / peak,
        "copy_bytes_per_sec": 2 * source.numel() * 4 / statistics.median(copies),
        "side": size,
    }


def product_rates(
    device: torch.device, size: int, *, dtype: torch.dtype = torch.bfloat16, windows: int = WINDOWS
) -> list[float]:
    """Return FLOP/s of products of two square matrices, for each window of ten after one that does not count."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [_seconds(device, lambda: a @ b, 10) for _ in range(windows + 1)]
    return [2 * size**3 / one for one in seconds[1:]]


def _seconds(device: torch.device, work: Callable[[], Any], times: int) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


def numbers(bench: Bench) -> dict[str, Any]:
    """Compare loss and gradients on the device with those on the CPU in float32 by PyTorch's plain attention."""
    precision, kernel = bench.row.options["precision"], bench.row.options["kernel"]
    loss, gradients = _loss_and_gradients(bench, bench.device, precision, kernel, bench.row.overrides)
    bench.reach("the device's numbers")
    right_loss, right = _truth(bench)
    squares = {name: float((gradients[name] - right[name]).square().sum()) for name in right}
    norms = {name: float(right[name].square().sum()) for name in right}
    worst = max(right, key=lambda name: squares[name] / max(norms[name], 1e-30))
    errors = abs(loss / right_loss - 1), (sum(squares.values()) / sum(norms.values())) ** 0.5
    limits = ROUNDING[precision]
    return {
        "loss": loss,
        "loss_cpu": right_loss,
        "loss_relative_error": errors[0],
        "gradient_relative_error": errors[1],
        "worst_parameter": worst,
        "worst_relative_error": (squares[worst] / max(norms[worst], 1e-30)) ** 0.5,
        "limits": limits,
        "is_rounding": all(error <= limit for error, limit in zip(errors, limits, strict=True)),  # NaN is not
    }


_known: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}


def _truth(bench: Bench) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients on the CPU, computed once."""
    if bench.row.size not in _known:
        _known[bench.row.size] = _loss_and_gradients(bench, torch.device("cpu"), "fp32", "math")
    return _known[bench.row.size]


def _loss_and_gradients(
    bench: Bench, device: torch.device, precision: str, kernel: str, more: Mapping[str, Any] | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Compute a micro-batch with the same first weights; the kernel is used even if it fails dlm's own check."""
    name = "bf16-mixed" if precision == "bf16" else "32-true"
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        overrides = {"trainer.precision": name, "trainer.compile": False, "trainer.attention": "math", **(more or {})}
        if device.type != bench.device.type:
            overrides["trainer.accelerator"] = device.type
        module = make_module(bench, make_config(bench, overrides), device=device)
        module.kernels = kernels(kernel, device, precision=name)
        module.model.use_flash_attn(kernel == "flash_attn")
        (batch, *_) = bench.batches(module.objective, device)
        with module.trainer.precision_plugin.forward_context():
            loss = module.training_step(dict(batch), 0)
        module.backward(loss)
        found = {name: p.grad.double().cpu() for name, p in module.model.named_parameters() if p.grad is not None}
        return float(loss.detach()), found
    finally:
        torch.set_float32_matmul_precision("high")


def step(bench: Bench) -> dict[str, Any]:
    """Measure dlm's training step alone."""
    return alone(bench, ours(bench))


def head(bench: Bench) -> dict[str, Any]:
    """Compare the head on masked positions with the head on all: speed, peak memory, loss and gradients in float32."""
    facts = _masked_against_dense(bench)
    bench.reach("loss and gradients")
    memory, sides = {}, []
    for name, change in (("masked", None), ("dense", _use_dense_head)):
        before = bench.allocated()
        sides.append(ours(bench, change=change))
        memory[name] = _peak_beyond(bench, sides[-1], before)
    return {**in_turn(bench, *sides), "peak_bytes_beyond_the_other": memory, **facts}


def _use_dense_head(module: Any) -> None:
    module.compute_loss = torch.compile(dense_loss, dynamic=False)


def dense_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the loss of MaskedDiffusion from the logits of all positions."""
    logits = model(batch["tokens"])
    target = torch.full_like(batch["tokens"], -100)
    weight = torch.zeros(target.shape, device=target.device)
    target.view(-1).index_copy_(0, batch["index"].flip(0), batch["target"].flip(0))  # the real ones come last
    weight.view(-1).index_add_(0, batch["index"], batch["weight"])
    ce = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    return (ce.view_as(weight) * weight).sum(dim=1)


def _masked_against_dense(bench: Bench) -> dict[str, float]:
    """Return how far apart both losses and their gradients are in float32, for two sequences."""
    bench = dataclasses.replace(bench, row=dataclasses.replace(bench.row, micro_batch=2))
    torch.set_float32_matmul_precision("highest")
    found = []
    for change in (None, dense_loss):
        overrides = {"trainer.precision": "32-true", "trainer.compile": False, "trainer.attention": "math"}
        module = make_module(bench, make_config(bench, overrides), device=bench.device)
        (batch, *_) = bench.batches(module.objective)
        with module.kernels():
            value = (change or module.objective.loss)(module.model, batch).mean()
        module.backward(value)
        found.append(
            (float(value.detach()), [p.grad.double() for p in module.model.parameters() if p.grad is not None])
        )
    torch.set_float32_matmul_precision("high")
    (loss, gradients), (right_loss, right) = found
    off = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(gradients, right, strict=True)
    )
    return {"loss_relative_difference": abs(loss / right_loss - 1), "gradient_relative_difference": off}


def _peak_beyond(bench: Bench, side: Any, before: int) -> int | None:
    """Return the peak memory of a window beyond ``before``; None on a CPU."""
    warm_up(bench, side)
    if bench.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(bench.device)
    window(bench, side, 2)
    return torch.cuda.max_memory_allocated(bench.device) - before


def cross_entropy(bench: Bench) -> dict[str, Any]:
    """Compare a way to compute the cross-entropy with the one that holds all logits."""
    memory, sides = {}, []
    for name, overrides in (("ours", bench.row.overrides), ("peer", {"trainer.cross_entropy": "dense"})):
        before = bench.allocated()
        sides.append(ours(bench, overrides))
        memory[name] = _peak_beyond(bench, sides[-1], before)
    return {**in_turn(bench, *sides), "peer_is": "dense", "peak_bytes_beyond_the_other": memory}


def launch(bench: Bench) -> dict[str, Any]:
    """Run `python -m dlm.launch` from start to end, and compare its steps with those of a bare loop."""
    steps = bench.scale.steps
    overrides = {"trainer.compile": bench.scale.backend is None, **bench.row.overrides}
    side = ours(bench, overrides)
    warm = warm_up(bench, side)
    bare = [window(bench, side, steps)["step_sec"] for _ in range(WINDOWS)]
    bench.reach("bare loop")
    with tempfile.TemporaryDirectory() as folder:
        total = (WINDOWS + 2) * steps  # the first window compiles, and the last one writes a checkpoint
        wall, run_dir = _launched(bench, Path(folder), overrides, total)
        rows = [row["step_time"] for row in read_jsonl(run_dir / "metrics.jsonl") if "step_time" in row]
        result = read_json(run_dir / "result.json")
    bench.reach("dlm.launch")
    bare += [window(bench, side, steps)["step_sec"] for _ in range(WINDOWS)]
    run_step, bare_step = statistics.median(rows[1:-1]), statistics.median(bare)
    return {
        "overhead": run_step / bare_step - 1,
        "run_step_sec": run_step,
        "run_step_sec_spread": spread(rows[1:-1]),
        "first_window_step_sec": rows[0],
        "bare_step_sec": bare_step,
        "bare_step_sec_spread": spread(bare),
        "tokens_per_sec": bench.tokens / run_step,
        "flops_per_sec": side.flops / run_step,
        "wall_sec": wall,
        "outside_of_steps_sec": wall - total * run_step,
        "steps": total,
        "loss": result["loss"],
        **warm,
        **side.about,
    }


def _launched(bench: Bench, folder: Path, overrides: dict[str, Any], steps: int) -> tuple[float, Path]:
    """Train on random tokens; return the seconds of the process and the run directory."""
    data = folder / "data"
    data.mkdir()
    shape, stride = bench.shape, bench.scale.length + 1
    rng = np.random.default_rng(0)
    splits = {
        split: (write_packed(data / f"{split}_0.bin", rng.integers(0, shape.vocab_size, count).astype(np.uint16)),)
        for split, count in (("train", (steps + 1) * bench.micro_batch * stride), ("validation", 16 * stride))
    }
    write_manifest(
        data, Manifest(name="random", tokenizer="none", vocab_size=shape.vocab_size, bos_id=0, splits=splits)
    )
    words = {
        "model": bench.scale.model(bench.row.size), "data": "slim_pajama", "data.data_dir": data,
        "data.block_size": bench.scale.length, "data.stride": stride, "data.batch_size": bench.micro_batch,
        "data.micro_batch_size": bench.micro_batch, "training.steps": steps, "training.budget": "null",
        "validation.num_sequences": 8, "validation.draws": 2, "validation.times": 1, "callbacks.checkpoint.times": 1,
        "trainer": "single_gpu" if bench.device.type == "cuda" else "cpu", "trainer.precision": bench.scale.precision,
        "trainer.threads": bench.scale.threads or "null", "trainer.log_every_n_steps": bench.scale.steps,
        "logger": "none", "paths.workdir": folder / "workdir", **overrides,
    }  # fmt: skip
    command = [sys.executable, "-m", "dlm.launch", *(f"{key}={_word(value)}" for key, value in words.items())]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    wall = time.perf_counter() - began
    print(done.stderr, file=sys.stderr)
    if done.returncode == ExitCode.OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(done.stderr[-500:])
    if done.returncode:
        raise RuntimeError(f"dlm.launch ended with {done.returncode}: {done.stderr[-1000:]}")
    (run_dir,) = (folder / "workdir" / "adhoc" / "runs").iterdir()
    return wall, run_dir


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def first_step(bench: Bench) -> dict[str, Any]:
    """Measure the first step, which compiles, in a new process: with an empty cache, and with the one that it left."""
    settings = {"device": bench.device.type, "scale": bench.scale.name, "peers": str(bench.peers)}
    row = dataclasses.asdict(dataclasses.replace(bench.row, kind="compiling"))
    command = [sys.executable, "-m", "benchmarks.card.child", json.dumps(settings), json.dumps(row)]
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        places = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        for name in ("cold", "warm"):
            done = subprocess.run(
                command, env={**os.environ, **places}, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"the process ended with {done.returncode}, see log.txt")
            found[f"{name}_sec"] = json.loads(done.stdout.splitlines()[-1])["measured"]["first_step_sec"]
            bench.reach(name)
    return found


def compiling(bench: Bench) -> dict[str, Any]:
    """Run the first steps of dlm's training step."""
    return dict(warm_up(bench, ours(bench)))


KINDS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    function.__name__: function
    for function in (product, numbers, step, head, cross_entropy, launch, first_step, compiling)
}
