"""Convert a checkpoint to a single weights file, and load a model from a checkpoint or a weights file.

A weights file holds no optimiser state, so no run can resume from it. It is for evaluation, for notebooks and for
sharing.
"""

from __future__ import annotations

from dlm.core import signals

if __name__ == "__main__":
    signals.exit_at_ctrl_c()  # importing torch takes seconds

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dlm.core import terminal
from dlm.core.errors import ExitCode, UserError, shown
from dlm.core.files import check_writable, complaint, json_of, write_through
from dlm.core.objectives import OBJECTIVES, objective_info
from dlm.core.shape import ModelShape, load_shape, shape_from_config
from dlm.core.typed import MisfitError, typed
from dlm.train.checkpoint_files import check_format, latest_whole, load_state, state_file
from dlm.train.models.encoder import TransEncoder
from dlm.train.models.lightning_module import FORMAT

LARGEST_SIZE = 2**24  # of a side of a matrix; a larger one is no model but an attempt to use up the memory
ENDINGS = (".safetensors", ".pt")
SMDM_NAMES = {  # SMDM's TransEncoder and GPT (lit_gpt/diffmodel.py, model.py): part of a name -> dlm's name for it
    "transformer.wte.": "embedding.",
    "transformer.ln_f.": "norm.",
    "lm_head.": "head.",
    "transformer.h.": "blocks.",
    ".attn.attn.": ".attention.qkv.",
    ".attn.proj.": ".attention.proj.",
    ".mlp.swiglu.w1.": ".mlp.gate.",  # xformers' SwiGLU is w3(silu(w1 x) * w2 x)
    ".mlp.swiglu.w2.": ".mlp.up.",
    ".mlp.swiglu.w3.": ".mlp.down.",
}
Weights = dict[str, torch.Tensor]


def load_model(source: str | Path) -> TransEncoder:
    """Load a trained model on the CPU, for evaluation.

    Args:
        source: A run directory, a step_* folder, or a file that `dlm convert` wrote.

    Returns:
        The model. Its forward pass maps (B, T) tokens to (B, T, V) logits; for masked diffusion, the mask token has the
        number ``vocab_size``.

    Raises:
        UserError: The source holds no model that dlm can read.
    """
    about, weights = read_weights(Path(source))
    model = TransEncoder(shape_from_config(about["shape"]), causal=about["causal"])
    model.load_state_dict(weights)
    return model.eval()


def read_weights(source: Path, *, model: str | None = None) -> tuple[dict[str, Any], Weights]:
    """Read the weights and the description of a model.

    Args:
        source: As for ``load_model``, or a checkpoint file of SMDM.
        model: The name in configs/model of the shape of an SMDM model; files of SMDM do not state the shape.

    Returns:
        A description with the keys format, shape, causal and, if known, cell_id and step; and the weights by their
        names in TransEncoder.

    Raises:
        UserError: The file is incomplete, has a newer format, belongs to another model or is no checkpoint.
    """
    path = _file_of(source)
    about, weights = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, model)
    try:
        said, weights = typed(_About, about), typed(dict[str, Any], weights, "the weights")
        typed(ModelShape, said.shape, "the shape")
    except MisfitError as error:
        raise UserError(f"{path} does not describe its model ({error}): it is damaged or of another kind") from error
    check_format(path, said.format, readable=FORMAT)
    _check_weights(_shape_of(said, weights, path), said.causal, weights, path)
    return about, weights


def _shape_of(about: _About, weights: Weights, path: Path) -> ModelShape:
    """Return the shape that a file states. Raises UserError for one whose model would be far larger than the file."""
    shape = shape_from_config(about.shape)
    sizes = (shape.n_embd, shape.n_head, shape.intermediate_size, shape.vocab_size, shape.block_size)
    if shape.n_layer > len(weights) or max(sizes) > LARGEST_SIZE:
        raise UserError(f"{path} states a model that is larger than its weights: it is damaged or of another kind")
    return shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class _About:
    """The description of a model in a file, as far as it is read here."""

    format: int
    shape: Mapping[str, Any]
    causal: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stated:
    """What a checkpoint says of its run, as far as it is read here."""

    format: int
    shape: Mapping[str, Any]
    objective: str
    cell_id: str


def _file_of(source: Path) -> Path:
    """Return the file that holds the weights; for a run directory, the file of its newest complete checkpoint."""
    if (source / "checkpoints").is_dir():
        newest = latest_whole(source)
        if newest is None:
            raise UserError(f"{source} has no whole checkpoint: give another run, or a step_* folder")
        return state_file(newest)
    if source.is_dir():
        return state_file(source)
    if not source.is_file():
        raise UserError(f"{source} does not exist: give a run's folder, a step_* folder or a checkpoint file")
    return source


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Weights]:
    try:
        with safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get("dlm")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): it is torn or no safetensors file") from error
    if stated is None:
        raise UserError(f"{path} does not say its model: only safetensors files of `dlm convert` can be read")
    return json_of(stated, str(path)), weights


def _read_torch(path: Path, model: str | None) -> tuple[dict[str, Any], Weights]:
    """Read a checkpoint of a run, a weights file that ends in .pt, or a checkpoint of SMDM."""
    content = load_state(path, device="cpu")
    if "dlm" in content and "state_dict" in content:
        return _from_run(content, path)
    if "dlm" in content:
        return content["dlm"], content.get("model", {})
    weights = content.get("model", content)
    if not isinstance(weights, dict) or "transformer.wte.weight" not in weights:
        raise UserError(f"{path} is no checkpoint of dlm or SMDM: it has neither `dlm` nor `transformer.wte.weight`")
    if model is None:
        raise UserError(f"{path} is SMDM's and does not say its shape: name it, e.g. --model 170M")
    return _from_smdm(weights, load_shape(model), path)


def _from_run(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], Weights]:
    """Return the description and the weights in a checkpoint that Lightning wrote during a run."""
    try:
        stated = typed(_Stated, content["dlm"], "dlm")
        weights = typed(dict[str, Any], content["state_dict"], "state_dict")
    except MisfitError as error:
        raise UserError(f"{path} is no checkpoint of a run ({error}): it is damaged or of another kind") from error
    about = {
        "format": stated.format,
        "shape": stated.shape,
        "causal": objective_info(stated.objective).causal,
        "cell_id": stated.cell_id,
        "step": content.get("global_step"),
    }
    return about, {name.removeprefix("model."): value for name, value in weights.items()}


def _from_smdm(theirs: Weights, shape: ModelShape, path: Path) -> tuple[dict[str, Any], Weights]:
    """Return the description and the weights of SMDM's TransEncoder or GPT, with dlm's names and order of rows."""
    for name, value in theirs.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or not value.ndim:
            raise UserError(f"{path} has {shown(name)}, which is no matrix or vector: it is damaged or of another kind")
    causal = theirs["transformer.wte.weight"].shape[0] == shape.vocab_size
    weights = {_our_name(name): value for name, value in theirs.items()}
    for name in list(weights):
        up = name.replace(".gate.", ".up.")
        if name.endswith(".attention.qkv.weight"):
            weights[name] = _split_groups(weights[name], shape, path)
        elif name.endswith(".mlp.gate.weight") and up in weights:
            weights[name.replace(".gate.", ".gate_up.")] = torch.cat([weights.pop(name), weights.pop(up)])
    return {"format": FORMAT, "shape": dataclasses.asdict(shape), "causal": causal}, weights


def _our_name(name: str) -> str:
    for theirs, ours in SMDM_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _split_groups(qkv: torch.Tensor, shape: ModelShape, path: Path) -> torch.Tensor:
    """Reorder the rows of SMDM's matrix of queries, keys and values.

    SMDM stores the queries, the key and the value of each query group together; dlm stores all queries, then all keys,
    then all values.
    """
    per_group = shape.n_head // shape.num_kv_heads + 2
    expected = (shape.num_kv_heads * per_group * shape.head_dim, shape.n_embd)
    if tuple(qkv.shape) != expected:
        raise UserError(f"{path} has a query, key and value matrix of {tuple(qkv.shape)}, {shape.name} has {expected}")
    groups = qkv.view(shape.num_kv_heads, per_group, shape.head_dim, shape.n_embd)
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return torch.cat([part.reshape(-1, shape.n_embd) for part in parts])


def _check_weights(shape: ModelShape, causal: bool, weights: Weights, path: Path) -> None:
    """Raise UserError, which names the first difference, if the weights do not fit the shape."""
    with torch.device("meta"):
        expected = TransEncoder(shape, causal=causal).state_dict()
    for name, value in expected.items():
        if name not in weights:
            raise UserError(f"{path} has no {name}, which model {shape.name} has: choose the model it was trained as")
        if not isinstance(weights[name], torch.Tensor):
            raise UserError(f"{path} has {name}, which is no tensor: it is damaged or of another kind")
        if weights[name].shape != value.shape:
            rows = ", so the vocabulary differs" if name in ("embedding.weight", "head.weight") else ""
            raise UserError(
                f"{path} has {name} of {tuple(weights[name].shape)}, model {shape.name} has {tuple(value.shape)}"
                f"{rows}: choose the model it was trained as"
            )
    extra = weights.keys() - expected.keys()
    if extra:
        raise UserError(f"{path} has {min(extra)}, which model {shape.name} does not have: it is of another model")


def write_weights(target: Path, about: Mapping[str, Any], weights: Weights) -> None:
    """Write one weights file, completely or not at all.

    Args:
        target: A new file; its extension, .safetensors or .pt, determines the format.
        about: The description, as ``read_weights`` returns it.
        weights: The weights by their names in TransEncoder.

    Raises:
        UserError: The target has another extension, it already exists, or its folder does not exist or cannot be
            written to.
        OSError: The disk is full.
    """
    _check_target(target)
    size_bytes = sum(value.numel() * value.element_size() for value in weights.values())
    with write_through(target, replaces=False) as building:
        with open(building, "wb") as stream:  # neither library tells a full disk from other errors
            os.posix_fallocate(stream.fileno(), 0, size_bytes)
        if target.suffix == ".safetensors":
            whole = {name: value.contiguous() for name, value in weights.items()}
            save_file(whole, building, metadata={"dlm": json.dumps(about)})
        else:
            torch.save({"dlm": dict(about), "model": weights}, building)


def _check_target(target: Path) -> None:
    """Raise UserError if no weights file can be written to ``target``."""
    if target.suffix not in ENDINGS:
        raise UserError(f"{target} ends in '{target.suffix}': allowed are {' and '.join(ENDINGS)}")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no folder: make it first")
    if target.exists():
        raise UserError(f"{target} exists and is not overwritten: give another name or remove it")
    check_writable(target.parent)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dlm convert", description="A checkpoint to one file of weights.")
    parser.add_argument("source", help="a run's folder, a step_* folder, a weights file, or SMDM's .pth")
    parser.add_argument("target", help="the file to write, ending in .safetensors or .pt")
    parser.add_argument("--model", help="the shape of an SMDM file: a name of configs/model, e.g. 170M")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `dlm convert`: read a source, write a weights file and print what it holds."""
    options = _parser().parse_args(argv)
    try:
        _check_target(Path(options.target))  # before the weights are read
        about, weights = read_weights(Path(options.source), model=options.model)
        write_weights(Path(options.target), about, weights)
    except (UserError, OSError) as error:
        line = complaint(error)
        if line is None:
            raise
        print(f"dlm: {line}", file=sys.stderr)
        return ExitCode.USER_ERROR
    objectives = " or ".join(info.label.lower() for info in OBJECTIVES.values() if info.causal == about["causal"])
    size = sum(value.numel() for value in weights.values())
    print(f"{options.target}: {about['shape']['name']}, {objectives}, {size:,} parameters")
    return ExitCode.DONE


if __name__ == "__main__":
    terminal.guard()
    sys.exit(main())
