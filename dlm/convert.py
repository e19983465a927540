"""convert: a checkpoint -> one file of weights; and such a file, or a checkpoint, -> a model. `dlm convert`, notebooks.

Weights files hold no optimiser, so no run goes on from one: they are for evaluation, for notebooks and for others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dlm.core.errors import ExitCode, UserError
from dlm.core.shape import ModelShape, load_shape, shape_from_config
from dlm.train.callbacks.checkpoint import latest_whole, state_file
from dlm.train.models.encoder import TransEncoder
from dlm.train.models.lightning_module import FORMAT, check_format

ENDINGS = (".safetensors", ".pt")


Weights = dict[str, torch.Tensor]


def load_model(source: str | Path) -> TransEncoder:
    """The model of a run's folder, a step_* folder or a file that `dlm convert` wrote, on the CPU, for evaluation.

    Its forward pass takes (B, T) tokens, of masked diffusion with masked places as ``vocab_size``, and gives
    (B, T, V) logits. Raises UserError.
    """
    about, weights = read_weights(Path(source))
    model = TransEncoder(_shape(about), causal=about["causal"])
    model.load_state_dict(weights)
    return model.eval()


def read_weights(source: Path, *, model: str | None = None) -> tuple[dict[str, Any], Weights]:
    """(description, weights by TransEncoder's names) of any source. ``model`` names the shape of an SMDM file.

    The description has format, shape, causal and, where known, cell_id and step. Raises UserError for what is torn,
    of a newer format, of another model or no checkpoint.
    """
    path = _file_of(source)
    if path.suffix == ".safetensors":
        about, weights = _read_safetensors(path)
    else:
        about, weights = _read_torch(path, model)
    check_format(about["format"], str(path))
    check_weights(_shape(about), about["causal"], weights, path)
    return about, weights


def _file_of(source: Path) -> Path:
    """The file that holds the weights: of a run its newest whole checkpoint's."""
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
    return json.loads(stated), weights


def _read_torch(path: Path, model: str | None) -> tuple[dict[str, Any], Weights]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).split("\n")[0][:100]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): it is torn or of another kind") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    if "dlm" in content and "state_dict" in content:  # Lightning's, of a run
        stated = content["dlm"]
        about = {
            "format": stated["format"],
            "shape": stated["shape"],
            "causal": stated["objective"] == "autoregressive",
            "cell_id": stated["cell_id"],
            "step": content["global_step"],
        }
        return about, {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
    if "dlm" in content:
        return content["dlm"], content["model"]
    weights = content.get("model", content)
    if "transformer.wte.weight" not in weights:
        raise UserError(f"{path} is no checkpoint of dlm or SMDM: it has neither `dlm` nor `transformer.wte.weight`")
    if model is None:
        raise UserError(f"{path} is SMDM's and does not say its shape: name it, e.g. --model 170M")
    return _from_smdm(weights, load_shape(model), path)


def _from_smdm(theirs: Mapping[str, torch.Tensor], shape: ModelShape, path: Path) -> tuple[dict[str, Any], Weights]:
    """The weights of SMDM's TransEncoder or GPT (lit_gpt/diffmodel.py, model.py) by our names."""
    rows = theirs["transformer.wte.weight"].shape[0]
    about = {"format": FORMAT, "shape": dataclasses.asdict(shape), "causal": rows == shape.vocab_size}
    names = {"transformer.wte.weight": "embedding.weight", "transformer.ln_f.weight": "norm.weight",
             "lm_head.weight": "head.weight"}  # fmt: skip
    weights: Weights = {}
    for name, value in theirs.items():
        layer = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", name)
        part = layer[2] if layer else None
        prefix = f"blocks.{layer[1]}." if layer else ""
        if name in names:
            weights[names[name]] = value
        elif part in ("norm_1", "norm_2"):
            weights[f"{prefix}{part}.weight"] = value
        elif part == "attn.attn":
            weights[f"{prefix}attention.qkv.weight"] = _split_groups(value, shape, path)
        elif part == "attn.proj":
            weights[f"{prefix}attention.proj.weight"] = value
        elif part == "mlp.swiglu.w3":
            weights[f"{prefix}mlp.down.weight"] = value
        elif part == "mlp.swiglu.w1":  # xformers' SwiGLU: silu(w1 x) w2 x
            up = theirs.get(name.replace(".w1.", ".w2."), value[:0])
            weights[f"{prefix}mlp.gate_up.weight"] = torch.cat([value, up])
        elif part != "mlp.swiglu.w2":
            raise UserError(f"{path} has {name}, which SMDM's models do not have")
    return about, weights


def _split_groups(qkv: torch.Tensor, shape: ModelShape, path: Path) -> torch.Tensor:
    """Rows in SMDM's order, for each query group its queries, key and value -> all queries, all keys, all values."""
    per_group = shape.n_head // shape.num_kv_heads + 2
    expected = (shape.num_kv_heads * per_group * shape.head_dim, shape.n_embd)
    if tuple(qkv.shape) != expected:
        raise UserError(f"{path} has a query, key and value matrix of {tuple(qkv.shape)}, {shape.name} has {expected}")
    groups = qkv.view(shape.num_kv_heads, per_group, shape.head_dim, shape.n_embd)
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return torch.cat([part.reshape(-1, shape.n_embd) for part in parts])


def _shape(about: Mapping[str, Any]) -> ModelShape:
    return shape_from_config(about["shape"])


def check_weights(shape: ModelShape, causal: bool, weights: Weights, path: Path) -> None:
    """Raise UserError, with the first difference, for weights that are not of this shape."""
    with torch.device("meta"):
        expected = TransEncoder(shape, causal=causal).state_dict()
    for name, value in expected.items():
        if name not in weights:
            raise UserError(f"{path} has no {name}, which model {shape.name} has: choose the model it was trained as")
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
    """One weights file by the ending of ``target``, whole or not at all. Raises UserError where it exists."""
    if target.suffix not in ENDINGS:
        raise UserError(f"{target} ends in '{target.suffix}': allowed are {' and '.join(ENDINGS)}")
    if target.exists():
        raise UserError(f"{target} exists and is not overwritten: give another name or remove it")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no folder: make it first")
    building = target.with_name(f".{target.name}.building")
    try:
        if target.suffix == ".safetensors":
            whole = {name: value.contiguous() for name, value in weights.items()}
            save_file(whole, building, metadata={"dlm": json.dumps(about)})
        else:
            torch.save({"dlm": dict(about), "model": weights}, building)
        os.link(building, target)  # fails where the target has come to exist, as rename would not
    except FileExistsError as error:
        raise UserError(f"{target} exists and is not overwritten: give another name or remove it") from error
    finally:
        building.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """`dlm convert`: read a source, write a weights file, say what it holds."""
    parser = argparse.ArgumentParser(prog="dlm convert", description="A checkpoint to one file of weights.")
    parser.add_argument("source", help="a run's folder, a step_* folder, a weights file, or SMDM's .pth")
    parser.add_argument("target", help="the file to write, ending in .safetensors or .pt")
    parser.add_argument("--model", help="the shape of an SMDM file: a name of configs/model, e.g. 170M")
    options = parser.parse_args(argv)
    try:
        about, weights = read_weights(Path(options.source), model=options.model)
        write_weights(Path(options.target), about, weights)
    except UserError as error:
        print(f"dlm: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    kind = "autoregressive" if about["causal"] else "masked diffusion"
    size = sum(value.numel() for value in weights.values())
    print(f"{options.target}: {about['shape']['name']}, {kind}, {size:,} parameters")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
