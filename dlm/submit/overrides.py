"""Build the Hydra overrides with which a job runs a planned cell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dlm.core.errors import UserError
from dlm.submit.job import Resources


def cell_overrides(cell_id: str, *, sweep_dir: Path, data_dir: Path, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the overrides with which `python -m dlm.launch` runs a planned cell.

    The overrides in ``extra`` come last and take precedence.
    """
    sweep_dir = sweep_dir.absolute()
    return (
        f"+cell={cell_id}",
        f"hydra.searchpath=[{quote(f'file://{sweep_dir}')}]",
        f"sweep={quote(sweep_dir.name)}",
        f"paths.workdir={quote(str(sweep_dir.parent))}",
        f"paths.data_dir={quote(str(data_dir.absolute()))}",
        *extra,
    )


def trainer_overrides(resources: Resources, group: str) -> tuple[str, ...]:
    """Return the overrides that choose the trainer for the devices of a job.

    Args:
        resources: The resources that the job requests.
        group: The trainer config of the cell, which is kept unless it is "cpu" and the job has GPUs.
    """
    nodes, gpus = resources.nodes, resources.gpus_per_node
    if not gpus:
        several = resources.tasks_per_node * nodes > 1
        return (f"trainer.devices={resources.tasks_per_node}", f"trainer.num_nodes={nodes}") if several else ()
    fitting = "multi_node" if nodes > 1 else "multi_gpu" if gpus > 1 else "single_gpu"
    chosen = (f"trainer={fitting}",) if group == "cpu" else ()
    return (*chosen, f"trainer.devices={gpus}", f"trainer.num_nodes={nodes}")


def quote(value: str) -> str:
    """Return a string as a value in Hydra's override grammar, in quotes if necessary.

    Raises UserError for an interpolation.
    """
    if "${" in value:
        raise UserError(f"{value!r} holds '${{', which Hydra would replace: use a path without it")
    name = re.fullmatch(r"/[\w./+@%-]*|[A-Za-z][\w-]*", value, flags=re.ASCII)
    if name and value.lower() not in ("true", "false", "null", "nan", "inf"):
        return value
    # Inside quotes, a backslash is an escape character only before a quote (Hydra's override grammar).
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"'{escaped}'"
