"""Measure dlm's training step beside its peers' on one GPU. The result is a JSON file of rows.

    python benchmarks/gpu.py --peers DIR --out results.json [--rows G1,G5]

The script runs from a plain checkout with torch, numpy, lightning and transformers. DIR holds checkouts SMDM/,
nanochat/ and litgpt/; Liger and cut-cross-entropy are measured if they are installed. Rows that are in the file
already are kept, so you can measure a few rows at a time. A peer that is absent is reported with the cause, and a row
that fails does not stop the later ones; the next call tries both again. All rows use bf16 autocast, sequences of
2,048 random tokens, a vocabulary of 32,000 and about 64 k tokens in a micro-step. dlm and the peer are measured in
turn, and results are medians. Without a GPU, or with --device cpu, every row runs at a toy size. That shows that the
script works and measures nothing ("measured": false).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import SHIMS, Absent, smdm
from benchmarks.side_by_side import Side, alternate, commit, compared
from dlm.core.flops import flops_per_token
from dlm.core.objectives import OBJECTIVES
from dlm.core.shape import ModelShape, load_shape
from dlm.data.noise import stratified_t, uniforms
from dlm.train.callbacks.monitors import peak_flops
from dlm.train.models.attention import kernels
from dlm.train.models.encoder import TransEncoder
from dlm.train.objectives import Objective
from dlm.train.objectives.autoregressive import Autoregressive
from dlm.train.objectives.masked_diffusion import MaskedDiffusion

Loss = Callable[[int], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Bench:
    """The device, and how large everything is on it."""

    device: torch.device
    peers: Path
    real: bool  # False: toy sizes on a CPU

    @property
    def steps(self) -> int:
        """The number of steps in a window."""
        return 20 if self.real else 2

    @property
    def length(self) -> int:
        """The number of tokens in a sequence."""
        return 2048 if self.real else 32

    def batch(self, shape: ModelShape) -> int:
        """Sequences of a micro-step: 64 k tokens, half of that above 600 M parameters."""
        return 2 if not self.real else 32 if shape.num_params < 600e6 else 16

    def shape(self, name: str) -> ModelShape:
        """The shape of a model size, or of a toy."""
        return load_shape(name) if self.real else dataclasses.replace(load_shape("8k"), name=f"toy for {name}")

    def sizes(self, *names: str) -> tuple[str, ...]:
        """The sizes of a row; on a CPU one toy stands for all of them."""
        return names if self.real else names[:1]

    def synchronise(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes that the GPU holds for this process; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def peak_bytes(self, window: Side, before: int) -> int | None:
        """The peak memory of a second window beyond ``before``, the memory of the other side; None on a CPU."""
        window()
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        window()
        return torch.cuda.max_memory_allocated(self.device) - before

    def autocast(self) -> torch.autocast:
        """Autocast to bfloat16."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def windows(self, model: nn.Module, loss: Loss, flops_per_step: float, tokens: int, *, slow: bool = False) -> Side:
        """A window of training steps. ``slow`` copies the loss off the device in every step, as SMDM does."""
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)

        def window() -> dict[str, float]:
            self.synchronise()
            began = time.perf_counter()
            for step in range(self.steps):
                with self.autocast():
                    value = loss(step)
                value.backward()
                if slow:
                    value.item()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            self.synchronise()
            seconds = time.perf_counter() - began
            return {
                "tokens_per_sec": self.steps * tokens / seconds,
                "flops_per_sec": self.steps * flops_per_step / seconds,
            }

        return window

    def texts(self, shape: ModelShape) -> np.ndarray:
        """Random tokens: one micro-batch for each step of a window, with one token more than a sequence."""
        size = (self.steps, self.batch(shape), self.length + 1)
        return np.random.default_rng(0).integers(0, shape.vocab_size, size)

    def batches(self, shape: ModelShape, objective: Objective) -> list[dict[str, Any]]:
        """The micro-batches of a window, on the device."""
        place, result = np.arange(self.batch(shape)), []
        for step, text in enumerate(self.texts(shape)):
            noise = stratified_t(0, step, place), uniforms(0, step * len(place), len(place), self.length)
            batch = objective.corrupt(text[:, :-1], *noise)
            result.append({key: torch.as_tensor(value).to(self.device) for key, value in batch.items()
                           if key != "overflow"})  # fmt: skip
        return result

    def flops(self, shape: ModelShape, *, causal: bool) -> float:
        """True training FLOPs of a micro-step, with the head on masked positions only."""
        objective = OBJECTIVES["autoregressive" if causal else "masked_diffusion"]
        per_token = flops_per_token(shape, convention="full_masked_head", block_size=self.length, objective=objective)
        return float(per_token) * self.batch(shape) * self.length

    def ours(self, shape: ModelShape, *, causal: bool = False) -> Side:
        """dlm's step, compiled as with trainer.compile=true."""
        model, loss = self.compiled(shape, causal=causal)
        return self.windows(model, loss, self.flops(shape, causal=causal), self.batch(shape) * self.length)

    def compiled(self, shape: ModelShape, *, causal: bool = False) -> tuple[nn.Module, Loss]:
        """dlm's model, and a function from the number of a micro-batch to its loss."""
        objective: Objective = Autoregressive(bos_id=0) if causal else MaskedDiffusion(vocab_size=shape.vocab_size)
        model = TransEncoder(shape, causal=causal)
        model.init_weights(torch.Generator().manual_seed(0))
        model.to(self.device)
        compute, batches = torch.compile(objective.loss, dynamic=False), self.batches(shape, objective)
        attention = kernels("auto", self.device)

        def loss(step: int) -> torch.Tensor:
            with attention():
                return compute(model, batches[step % len(batches)]).mean()

        return model, loss

    def given_and_next(self, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor]:
        """The input of an autoregressive peer: the tokens, and the token that follows each."""
        text = torch.from_numpy(self.texts(shape)).to(self.device)
        return text[:, :, :-1].contiguous(), text[:, :, 1:].contiguous()


def g1(bench: Bench) -> Iterator[tuple[str, Any]]:
    """SMDM: its TransEncoder and the body of its training loop (pretrain/train_mdm.py), eager."""
    package = smdm(bench.peers)
    diffmodel = sys.modules["lit_gpt.diffmodel"]
    for name in bench.sizes("6M", "170M", "1028M"):
        shape = bench.shape(name)
        config = package.Config(
            block_size=bench.length, vocab_size=shape.vocab_size, padding_multiple=1, n_layer=shape.n_layer,
            n_head=shape.n_head, n_embd=shape.n_embd, rotary_percentage=1.0, parallel_residual=False, bias=False,
            _norm_class="FusedRMSNorm", norm_eps=1e-5, _mlp_class="LLaMAMLP", intermediate_size=shape.intermediate_size
        )  # fmt: skip
        model = diffmodel.TransEncoder(config).to(bench.device)
        data, _ = bench.given_and_next(shape)

        def loss(step: int, model: Any = model, data: Any = data, mask_id: int = shape.vocab_size) -> torch.Tensor:
            text = data[step]
            p = (1 - 1e-3) * torch.rand(len(text), 1, device=text.device) + 1e-3
            masked = torch.rand(text.shape, device=text.device) < p
            logits = model(torch.where(masked, mask_id, text))
            ce = nn.functional.cross_entropy(logits[masked], text[masked], reduction="none")
            return (ce / p.expand_as(masked)[masked]).sum() / text.numel()

        tokens = bench.batch(shape) * bench.length
        theirs = bench.windows(model, loss, bench.flops(shape, causal=False), tokens, slow=True)
        yield name, {"shims": SHIMS["smdm"], **compared(*alternate(bench.ours(shape), theirs))}


def imported(bench: Bench, peer: str, module: str) -> Any:
    """Import a module of a peer's checkout. Raises Absent."""
    sys.path.insert(0, str(bench.peers / peer))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"import {module} from {bench.peers / peer}: {error}") from error


def g2(bench: Bench) -> Iterator[tuple[str, Any]]:
    """nanochat's GPT, compiled, with full attention windows: true FLOP/s at about equal size."""
    gpt = imported(bench, "nanochat", "nanochat.gpt")
    for depth, name in ((12, "85M"), (18, "268M"), (24, "666M"))[: 3 if bench.real else 1]:
        shape, width = bench.shape(name), 64 * depth if bench.real else 32
        layers, heads = (depth, depth // 2) if bench.real else (2, 2)
        config = gpt.GPTConfig(sequence_len=bench.length, vocab_size=shape.vocab_size, n_layer=layers, n_head=heads,
                               n_kv_head=heads, n_embd=width, window_pattern="L")  # fmt: skip
        with torch.device("meta"):
            model = gpt.GPT(config)
        model.to_empty(device=bench.device)
        model.init_weights()
        data, targets = bench.given_and_next(shape)
        compiled = torch.compile(model, dynamic=False)
        tokens = bench.batch(shape) * bench.length
        per_token = 6 * (layers * 12 * width**2 + shape.vocab_size * width) + 6 * layers * width * bench.length
        theirs = bench.windows(model, lambda step, c=compiled, d=data, t=targets: c(d[step], t[step]),
                               per_token * tokens, tokens)  # fmt: skip
        yield f"d{depth}", {"ours_is": shape.name, **compared(*alternate(bench.ours(shape, causal=True), theirs))}


def g3(bench: Bench) -> Iterator[tuple[str, Any]]:
    """litgpt's GPT with our own shape, so that FLOPs per token are equal."""
    model_of = imported(bench, "litgpt", "litgpt.model")
    config_of, utils = importlib.import_module("litgpt.config"), importlib.import_module("litgpt.utils")
    for name in bench.sizes("170M", "1028M"):
        shape = bench.shape(name)
        config = config_of.Config(
            name="ours", block_size=bench.length, vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size,
            n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, rotary_percentage=1.0, bias=False,
            parallel_residual=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
            intermediate_size=shape.intermediate_size
        )  # fmt: skip
        model = model_of.GPT(config).to(bench.device)
        compiled = torch.compile(model, dynamic=False)
        data, targets = bench.given_and_next(shape)
        theirs = bench.windows(
            model, lambda step, c=compiled, d=data, t=targets: utils.chunked_cross_entropy(c(d[step]), t[step]),
            bench.flops(shape, causal=True), bench.batch(shape) * bench.length
        )  # fmt: skip
        yield name, compared(*alternate(bench.ours(shape, causal=True), theirs))


def g4(bench: Bench) -> Iterator[tuple[str, Any]]:
    """ModernBERT of transformers, compiled, with its head on masked tokens only."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise Absent(f"import transformers: {error}") from error
    shape = bench.shape("170M")
    config = transformers.ModernBertConfig(
        vocab_size=shape.vocab_size + 1, hidden_size=shape.n_embd, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.n_layer, num_attention_heads=shape.n_head, max_position_embeddings=bench.length,
        global_attn_every_n_layers=1, sparse_prediction=True, pad_token_id=0, attn_implementation="sdpa"
    )  # fmt: skip
    model = transformers.ModernBertForMaskedLM(config).to(bench.device)
    compiled = torch.compile(model, dynamic=False)
    masked = []
    for batch in bench.batches(shape, MaskedDiffusion(vocab_size=shape.vocab_size)):
        labels = torch.full_like(batch["tokens"], -100)
        labels.view(-1)[batch["index"][batch["target"] >= 0]] = batch["target"][batch["target"] >= 0]
        masked.append({"input_ids": batch["tokens"], "labels": labels})
    theirs = bench.windows(model, lambda step: compiled(**masked[step]).loss, bench.flops(shape, causal=False),
                           bench.batch(shape) * bench.length)  # fmt: skip
    yield "170M", compared(*alternate(bench.ours(shape), theirs))


def g5(bench: Bench) -> Iterator[tuple[str, Any]]:
    """For each size, the share of the device's peak and of the speed that a matrix product reaches in this call."""
    size = 8192 if bench.real else 256
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(6):
        bench.synchronise()
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        bench.synchronise()
        rates.append(10 * 2 * size**3 / (time.perf_counter() - began))
    product, peak = float(np.median(rates[1:])), peak_flops(bench.device)
    yield "matrix_product_flops_per_sec", product
    for name in bench.sizes("6M", "85M", "170M", "472M", "1028M"):
        shape = bench.shape(name)
        window = bench.ours(shape)
        window()
        measured = [window() for _ in range(5)]
        rate = float(np.median([one["flops_per_sec"] for one in measured]))
        yield (
            name,
            {
                "tokens_per_sec": float(np.median([one["tokens_per_sec"] for one in measured])),
                "mfu": None if peak is None else rate / peak,
                "of_matrix_product": rate / product,
            },
        )


def g6(bench: Bench) -> Iterator[tuple[str, Any]]:
    """A step under Lightning's Trainer beside a bare loop over the same compiled loss."""
    for name in bench.sizes("6M", "170M"):
        shape = bench.shape(name)
        model, loss = bench.compiled(shape)
        tokens = bench.batch(shape) * bench.length
        bare = bench.windows(model, loss, 1.0, tokens)
        yield name, compared(*alternate(under_lightning(bench, model, loss, tokens), bare))


def under_lightning(bench: Bench, model: nn.Module, loss: Loss, tokens: int) -> Side:
    """Windows of training steps by Lightning's Trainer, without its set-up."""
    import lightning

    on_gpu = bench.device.type == "cuda"

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
            return loss(number)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu)

        def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)  # Lightning's own refuses fused optimisers

        def on_train_start(self) -> None:
            bench.synchronise()
            self.began = time.perf_counter()

        def on_train_end(self) -> None:
            bench.synchronise()
            self.seconds = time.perf_counter() - self.began

    def window() -> dict[str, float]:
        module = Module()
        trainer = lightning.Trainer(
            max_steps=bench.steps, accelerator="gpu" if on_gpu else "cpu", devices=1, precision="bf16-mixed",
            logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(bench.steps, 1)))
        return {"tokens_per_sec": bench.steps * tokens / module.seconds}

    return window


def g7(bench: Bench) -> Iterator[tuple[str, Any]]:
    """The head on masked positions beside the dense head, at 6M: speed, peak memory, loss and gradients in float32."""
    shape = bench.shape("6M")
    objective = MaskedDiffusion(vocab_size=shape.vocab_size)
    batches = bench.batches(shape, objective)

    def dense_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(batch["tokens"])
        target = torch.full_like(batch["tokens"], -100)
        weight = torch.zeros(target.shape, device=target.device)
        target.view(-1).index_copy_(0, batch["index"].flip(0), batch["target"].flip(0))  # the real ones come last
        weight.view(-1).index_add_(0, batch["index"], batch["weight"])
        ce = nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
        return (ce.view_as(weight) * weight).sum(dim=1)

    sides, memory, exact = [], [], []
    for compute in (objective.loss, dense_loss):
        before = bench.allocated()
        model = TransEncoder(shape, causal=False)
        model.init_weights(torch.Generator().manual_seed(0))
        model.to(bench.device)
        with kernels("math", bench.device)():
            value = compute(model, batches[0]).mean()
            value.backward()
        exact.append((value.item(), [parameter.grad.clone() for parameter in model.parameters()]))  # type: ignore[union-attr]
        model.zero_grad()
        compiled = torch.compile(compute, dynamic=False)
        window = bench.windows(model, lambda step, c=compiled, m=model: c(m, batches[step]).mean(),
                               bench.flops(shape, causal=False), bench.batch(shape) * bench.length)  # fmt: skip
        memory.append(bench.peak_bytes(window, before))
        sides.append(window)
    gradients = max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
        for a, b in zip(exact[0][1], exact[1][1], strict=True)
    )
    yield (
        "6M",
        {
            **compared(*alternate(*sides)),
            "peak_bytes": dict(zip(("masked", "dense"), memory, strict=True)),
            "loss_relative_difference": abs(exact[0][0] / exact[1][0] - 1),
            "gradient_relative_difference": gradients,
        },
    )


def liger() -> tuple[str, Callable[..., torch.Tensor]]:
    """Liger's name and its fused head and loss: (M, C) hidden, (V, C) weights and (M,) targets to (M,) nats."""
    call = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return "liger-kernel", lambda hidden_MC, weight_VC, target_M: call(hidden_MC, weight_VC, target_M, reduction="none")


def cut_cross_entropy() -> tuple[str, Callable[..., torch.Tensor]]:
    """The name of cut-cross-entropy and its fused head and loss, as for Liger."""
    call = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return "cut-cross-entropy", lambda hidden_MC, weight_VC, target_M: call(
        hidden_MC, weight_VC, target_M, reduction="none"
    )


def g7_liger(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Our head and loss on masked positions, compiled, beside Liger's fused kernel on the same rows, at 6M."""
    yield from fused(bench, liger)


def g7_cut(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Our head and loss on masked positions, compiled, beside cut-cross-entropy on the same rows, at 6M."""
    yield from fused(bench, cut_cross_entropy)


def fused(bench: Bench, package: Callable[[], tuple[str, Callable[..., torch.Tensor]]]) -> Iterator[tuple[str, Any]]:
    """Our head and loss beside a package's fused ones, both behind our compiled trunk. Raises Absent."""
    try:
        name, linear_cross_entropy = package()
    except ImportError as error:
        raise Absent(f"{package.__name__}: {type(error).__name__}: {error}") from error
    shape = bench.shape("6M")
    batches = bench.batches(shape, MaskedDiffusion(vocab_size=shape.vocab_size))
    before = bench.allocated()
    ours, our_loss = bench.compiled(shape)
    per_step, tokens = bench.flops(shape, causal=False), bench.batch(shape) * bench.length
    our_window = bench.windows(ours, our_loss, per_step, tokens)
    with bench.autocast(), torch.no_grad():
        values = [our_loss(0).item()]
    memory = {"ours": bench.peak_bytes(our_window, before)}

    before = bench.allocated()
    model = TransEncoder(shape, causal=False)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(bench.device)
    weight_VC, model.head = model.head.weight, nn.Identity()  # type: ignore[assignment]
    model.register_parameter("head_weight", weight_VC)
    trunk = torch.compile(model, dynamic=False)
    attention = kernels("auto", bench.device)

    def their_loss(step: int) -> torch.Tensor:
        batch = batches[step % len(batches)]
        with attention():
            hidden_MC = trunk(batch["tokens"], batch["index"])
        # a package's kernels take what they are given: autocast would have cast both for our own head
        ce_M = linear_cross_entropy(hidden_MC.bfloat16(), weight_VC.bfloat16(), batch["target"])
        return (ce_M.float() * batch["weight"]).sum() / bench.batch(shape)

    with bench.autocast(), torch.no_grad():
        values.append(their_loss(0).item())
    their_window = bench.windows(model, their_loss, per_step, tokens)
    memory["peer"] = bench.peak_bytes(their_window, before)
    yield "package", f"{name} {metadata.version(name)}"
    yield (
        "6M",
        {
            **compared(*alternate(our_window, their_window)),
            "peak_bytes": memory,
            "loss_relative_difference_bf16": abs(values[0] / values[1] - 1),
        },
    )


def g9(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Seconds of compiling the step of 170M in a new process, with an empty and with a filled cache."""
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            command = [sys.executable, __file__, "--compile-once", "--device", bench.device.type]
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"--compile-once ended with {done.returncode}: {done.stderr[-500:]}")
            yield name, float(done.stdout.split()[-1])


def compile_once(bench: Bench) -> None:
    """Print the seconds until the first step is done."""
    _, loss = bench.compiled(bench.shape("170M"))
    bench.synchronise()
    began = time.perf_counter()
    with bench.autocast():
        value = loss(0)
    value.backward()
    bench.synchronise()
    print(time.perf_counter() - began)


ROWS = {"G1": g1, "G2": g2, "G3": g3, "G4": g4, "G5": g5, "G6": g6, "G7": g7, "G7_liger": g7_liger, "G7_cut": g7_cut,
        "G9": g9}  # fmt: skip
AGAIN = {"absent", "failed"}  # what a row has that the next call tries again
PEER_OF = {"G1": "SMDM", "G2": "nanochat", "G3": "litgpt"}


def measured_row(bench: Bench, name: str) -> dict[str, Any]:
    """Measure one row. If it fails, the result holds what was measured before."""
    began, peer = time.perf_counter(), PEER_OF.get(name)
    found: dict[str, Any] = {}
    try:
        for key, value in ROWS[name](bench):
            found[key] = value
    except Absent as error:
        found["absent"] = str(error)
    except Exception as error:  # memory, a compiler, a peer's own mistake: the later rows are worth measuring
        found["failed"] = f"{type(error).__name__}: {error}"[:2000]
    if "failed" in found:
        with contextlib.suppress(Exception):  # after an illegal access the device answers nothing any more
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
    return {
        "what": str(ROWS[name].__doc__),
        "measured": bench.real and not found.keys() & AGAIN,
        "peer_commit": commit(bench.peers / peer) if peer and (bench.peers / peer).is_dir() else None,
        "seconds": round(time.perf_counter() - began, 1),
        **found,
    }


def main() -> None:
    """Measure the rows that were asked for and are not in the file yet; write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=Path, default=Path("peers"))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--compile-once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if strange := set(options.rows.split(",")) - ROWS.keys():
        parser.error(f"--rows {', '.join(sorted(strange))}: allowed are {', '.join(ROWS)}")
    bench = Bench(torch.device(options.device), options.peers.resolve(), real=options.device == "cuda")
    torch.set_float32_matmul_precision("high")
    if options.compile_once:
        compile_once(bench)
        return
    rows: dict[str, Any] = json.loads(options.out.read_text())["rows"] if options.out.is_file() else {}
    for name in options.rows.split(","):
        if name in rows and not rows[name].keys() & AGAIN:
            print(f"{name}: kept")
            continue
        rows[name] = measured_row(bench, name)
        device = torch.cuda.get_device_name() if bench.real else "CPU, toy sizes: nothing is measured"
        about = {"date": str(datetime.date.today()), "device": device, "torch": torch.__version__,
                 "python": sys.version.split()[0], "commit": commit(Path(__file__).resolve().parent)}  # fmt: skip
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
        print(f"{name}: {json.dumps(rows[name])[:300]}", flush=True)


if __name__ == "__main__":
    main()
