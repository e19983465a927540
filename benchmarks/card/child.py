"""Measure rows in this process: `python -m benchmarks.card.child SETTINGS [ROW]`, JSON in and out, line by line.

SETTINGS has device (cuda, cpu or null for cuda where there is one), scale, peers, smdm (a checkout or null), and
memory_gib, the memory that measurements may use (null: all). Without ROW, rows are read from standard input. The first
answer describes the device.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from torch.nn.attention import restore_flash_attention_impl

from benchmarks.card import against, kinds
from benchmarks.card.bench import Bench
from benchmarks.card.rows import SCALES, Row, Scale
from benchmarks.card.worker import lines_of_parent
from benchmarks.peers import Absent
from dlm.core.errors import UserError, causes
from dlm.record.outcomes import State
from dlm.train.endings import ending_of
from dlm.train.trainer import quieten_lightning

KINDS = {**kinds.KINDS, "against": against.against}
GIB = 2**30
PACKAGES = ("lightning", "numpy", "triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "transformers")


def main() -> None:
    """Say what the device is, then measure one row after the other, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    settings, scale = json.loads(sys.argv[1]), SCALES[json.loads(sys.argv[1])["scale"]]
    device = torch.device(settings["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    set_up(scale)
    if len(sys.argv) > 2:
        answer(answers, measured(json.loads(sys.argv[2]), device, scale, settings, answers))
        return
    requests = lines_of_parent()
    answer(answers, described(device, scale))
    limit_memory(device, settings["memory_gib"])
    while True:
        answer(answers, measured(json.loads(requests.get()), device, scale, settings, answers))


def answer(answers: IO[str], content: dict[str, Any]) -> None:
    """Write a line."""
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def set_up(scale: Scale) -> None:
    """Set what a run of dlm sets, and what the scale asks for."""
    quieten_lightning()
    torch.set_float32_matmul_precision("high")
    if scale.threads is not None:
        torch.set_num_threads(scale.threads)
    if scale.backend is not None:
        torch.compiler.set_default_backend(scale.backend)


def limit_memory(device: torch.device, gib: float | None) -> None:
    """Let allocations beyond ``gib`` fail, as they do on a device that has no more memory."""
    if gib is None:
        return
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(gib * GIB / whole, 1.0), device)
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(gib * GIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def described(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Return the device, the versions, and the speed of a short matrix product, from which times are estimated."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else _cpu()
    memory = torch.cuda.mem_get_info(device)[0] if on_gpu else os.sysconf("SC_AVPHYS_PAGES") * resource.getpagesize()
    dtype, side = (torch.bfloat16, 4096) if on_gpu else (torch.float32, 512)
    rate = max(kinds.product_rates(device, side, dtype=dtype, windows=3))
    return {
        "device": name,
        "type": device.type,
        "free_gib": memory / GIB,
        "product_flops_per_sec": rate,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "compiler": scale.backend or "inductor",
        "packages": {package: _version(package) for package in PACKAGES},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measured(
    request: dict[str, Any], device: torch.device, scale: Scale, settings: dict[str, Any], answers: IO[str]
) -> dict[str, Any]:
    """Measure a row. The answer has the numbers in ``measured``, or says what happened instead."""
    began, row = time.perf_counter(), Row(**request)
    smdm = settings.get("smdm")
    bench = Bench(device=device, scale=scale, peers=Path(settings["peers"]), smdm=smdm and Path(smdm), row=row,
                  reach=lambda text: answer(answers, {"reached": text}))  # fmt: skip
    try:
        found = {"measured": KINDS[row.kind](bench)}
    except Absent as error:
        found = {"absent": str(error)}
    except UserError as error:  # dlm has no such kernel on this device, or not without a package
        found = {"refused": str(error)}
    except Exception as error:  # memory, a compiler, a peer's own mistake: the other rows are worth measuring
        traceback.print_exc()
        found = {_word_for(error): f"{type(error).__name__}: {error}"[:2000]}
    restore_flash_attention_impl(_raise_warn=False)  # after fa3, `auto` would use it as PyTorch's own
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda" and "failed" not in found:
        torch.cuda.empty_cache()
    return {**found, "seconds": time.perf_counter() - began}


def _word_for(error: BaseException) -> str:
    is_memory = any(ending_of(cause, Path()).state is State.OUT_OF_MEMORY for cause in causes(error))
    return "out_of_memory" if is_memory else "failed"


if __name__ == "__main__":
    main()
