"""Look at the node of a job for `dlm doctor`: `python -m dlm.train.node_check FILE` writes what it finds as JSON.

FILE is in the work directory, next to the token that the login node has written.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dlm.core.files import write_json
from dlm.core.lease import server_time

GIB = 2**30


def findings(token: Path) -> dict[str, Any]:
    """Return what a job finds on this node; `token` is a file that the login node has written."""
    return {
        "host": socket.gethostname(),
        "token": token.read_text(),
        "clock_ahead_sec": time.time() - server_time(token.parent),
        "num_cpus": len(os.sched_getaffinity(0)),
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
        "sbatch": os.environ.get("DLM_SBATCH") or None,
        "setup_trouble": os.environ.get("DLM_SETUP_TROUBLE", "").strip("; \n"),
        "python": sys.version.split()[0],
        "modules": {name: _tried(partial(_version, name)) for name in ("torch", "lightning", "wandb")},
        "cuda": _tried(_cuda),
    }


def _tried(look: Callable[[], Any]) -> dict[str, Any]:
    """Return {"found": what `look` returns}, or {"error": the last line of what went wrong}."""
    try:
        return {"found": look()}
    except Exception as error:  # a broken library can raise anything, and this is what the check is for
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[-1]}"[:300]}


def _version(module: str) -> str:
    return str(importlib.import_module(module).__version__)


def _cuda() -> dict[str, Any]:
    """Return the CUDA version of torch, and the GPUs that it sees, after a small product on each of them."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        one = torch.ones(16, 16, device=f"cuda:{index}")
        assert float((one @ one).sum()) == 16.0**3
        properties = torch.cuda.get_device_properties(index)
        gpus.append({"name": properties.name, "memory_gib": properties.total_memory / GIB})
    has_bf16 = bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False)
    return {"built_for": torch.version.cuda, "gpus": gpus, "bf16": has_bf16}


def main() -> None:
    """Write what is found to the file that the command line names."""
    path = Path(sys.argv[1])
    write_json(path, findings(path.with_suffix(".token")))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
