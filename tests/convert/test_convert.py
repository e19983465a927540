"""Weights files: what comes back is what went in; SMDM's order of rows; what cannot be read is said in one line."""

import dataclasses
import json

import pytest
import torch
from support.reference_model import TINY
from support.runs import train_here

from dlm.convert import load_model, main, read_weights, write_weights
from dlm.core.shape import load_shape
from dlm.record.run import read_result
from dlm.train.models.encoder import TransEncoder

TOKENS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


CELL = ("experiment=debug", "logger=none", "model=4k", "data.block_size=32", "validation.num_sequences=8",
        "validation.draws=2")  # fmt: skip


@pytest.fixture(scope="module")
def trained_run(stdlib_data, tmp_path_factory):
    """A finished run, which no test changes."""
    return train_here(tmp_path_factory.mktemp("convert"), *CELL, "training.steps=20")


def said(capfd):
    return capfd.readouterr().err.strip()


def test_every_kind_of_source_gives_the_same_model(trained_run, tmp_path, capfd):
    a, b, c = (tmp_path / name for name in ("a.safetensors", "b.pt", "c.safetensors"))
    assert main([str(trained_run), str(a)]) == 0
    assert "4k, masked diffusion" in capfd.readouterr().out
    assert main([str(a), str(b)]) == main([str(b), str(c)]) == 0
    assert a.read_bytes() == c.read_bytes()
    step = trained_run / "checkpoints" / "step_00000020"
    sources = [trained_run, step, step / "state.ckpt", a, b, c]
    logits = [load_model(source)(TOKENS) for source in sources]
    assert all(torch.equal(one, logits[0]) for one in logits)
    model = load_model(a)
    assert not model.training and model.shape == load_shape("4k")
    untrained = TransEncoder(load_shape("4k"), causal=False)
    untrained.init_weights(torch.Generator().manual_seed(0))
    assert (untrained(TOKENS) - logits[0]).abs().max() > 0.01
    about, _ = read_weights(a)
    result = read_result(trained_run)
    assert result is not None and (about["cell_id"], about["step"], about["causal"]) == (result.cell_id, 20, False)
    weights = torch.load(b, weights_only=True)["model"]
    assert sum(value.numel() for value in weights.values()) == model.shape.num_params_total(causal=False)


def as_smdm(model: TransEncoder) -> dict[str, torch.Tensor]:
    """The names and row orders of SMDM's TransEncoder (lit_gpt/diffmodel.py), one row at a time."""
    shape, ours = model.shape, model.state_dict()
    result = {"transformer.wte.weight": ours["embedding.weight"], "transformer.ln_f.weight": ours["norm.weight"],
              "lm_head.weight": ours["head.weight"]}  # fmt: skip
    sets, size = shape.num_kv_heads, shape.head_dim
    for layer in range(shape.n_layer):
        here, there = f"blocks.{layer}.", f"transformer.h.{layer}."
        qkv, rows = ours[here + "attention.qkv.weight"], []
        for group in range(sets):
            heads = [head for head in range(shape.n_head) if head * sets // shape.n_head == group]
            starts = [head * size for head in heads]
            starts += [(shape.n_head + group) * size, (shape.n_head + sets + group) * size]
            rows += [start + channel for start in starts for channel in range(size)]
        result[there + "attn.attn.weight"] = qkv[rows]
        result[there + "attn.proj.weight"] = ours[here + "attention.proj.weight"]
        gate_up = ours[here + "mlp.gate_up.weight"]
        result[there + "mlp.swiglu.w1.weight"] = gate_up[: shape.intermediate_size]
        result[there + "mlp.swiglu.w2.weight"] = gate_up[shape.intermediate_size :]
        result[there + "mlp.swiglu.w3.weight"] = ours[here + "mlp.down.weight"]
        for norm in ("norm_1", "norm_2"):
            result[f"{there}{norm}.weight"] = ours[f"{here}{norm}.weight"]
    return result


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_checkpoints_of_smdm_are_read(wrapped, causal, tmp_path, capfd):
    shape = load_shape("74k")  # three heads
    model = TransEncoder(shape, causal=causal)
    model.init_weights(torch.Generator().manual_seed(3))
    theirs = as_smdm(model)
    torch.save({"model": theirs, "iter_num": 3} if wrapped else theirs, tmp_path / "iter.pth")
    assert main([str(tmp_path / "iter.pth"), str(tmp_path / "out.pt"), "--model", "74k"]) == 0
    assert ("autoregressive" if causal else "masked diffusion") in capfd.readouterr().out
    loaded = load_model(tmp_path / "out.pt")
    assert loaded.causal == causal and torch.equal(loaded(TOKENS), model(TOKENS))
    assert main([str(tmp_path / "iter.pth"), str(tmp_path / "no.pt")]) == 2
    assert "does not say its shape: name it, e.g. --model 170M" in said(capfd)
    assert main([str(tmp_path / "iter.pth"), str(tmp_path / "no.pt"), "--model", "111k"]) == 2  # as wide, deeper
    assert "has no blocks.2.norm_1.weight, which model 111k has" in said(capfd)
    assert main([str(tmp_path / "iter.pth"), str(tmp_path / "no.pt"), "--model", "49k"]) == 2
    assert "query, key and value matrix of (144, 48), 49k has (96, 32)" in said(capfd)
    assert main([str(tmp_path / "iter.pth"), str(tmp_path / "no.pt"), "--model", "75k"]) == 2
    assert "unknown model '75k': did you mean" in said(capfd)
    assert not (tmp_path / "no.pt").exists()


def damaged(path, where):
    content = bytearray(path.read_bytes())
    if where == "cut":
        return path.write_bytes(content[: len(content) // 2])
    content[:4] = b"xxxx"
    return path.write_bytes(content)


@pytest.mark.parametrize("where", ["cut", "head"])
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_torn_file_is_refused(ending, where, tmp_path, capfd):
    source, target = tmp_path / f"a{ending}", tmp_path / "b.pt"
    shape = dataclasses.asdict(TINY)
    write_weights(source, {"format": 1, "shape": shape, "causal": False}, TransEncoder(TINY, causal=False).state_dict())
    damaged(source, where)
    assert main([str(source), str(target)]) == 2
    line = said(capfd)
    assert str(source) in line and "cannot be read" in line and "\n" not in line and not target.exists()


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_weights_that_do_not_fit_their_description_are_refused_in_one_line(ending, tmp_path, capfd):
    model = TransEncoder(TINY, causal=False)
    good = {"format": 1, "shape": dataclasses.asdict(TINY), "causal": False}
    cases = {
        "newer": ({**good, "format": 2}, {}, "has format 2, this dlm reads 1: update dlm"),
        "rows": ({**good, "shape": {**good["shape"], "vocab_size": 12}}, {}, "so the vocabulary differs: choose"),
        "depth": ({**good, "shape": {**good["shape"], "n_layer": 1}}, {}, "which model tiny does not have"),
        "width": (good, {"norm.weight": torch.ones(17)}, "norm.weight of (17,), model tiny has (16,)"),
    }
    for name, (about, change, words) in cases.items():
        source = tmp_path / f"{name}{ending}"
        write_weights(source, about, {**model.state_dict(), **change})
        assert main([str(source), str(tmp_path / "out.pt")]) == 2
        line = said(capfd)
        assert words in line and line.startswith("dlm: ") and "\n" not in line, name
    assert not (tmp_path / "out.pt").exists()


def test_nothing_is_overwritten_and_targets_are_checked(tmp_path, capfd):
    about = {"format": 1, "shape": dataclasses.asdict(TINY), "causal": False}
    source = tmp_path / "a.pt"
    write_weights(source, about, TransEncoder(TINY, causal=False).state_dict())
    before = source.read_bytes()
    for target, words in (
        (source, "exists and is not overwritten"),
        (tmp_path / "b.bin", "ends in '.bin': allowed are .safetensors and .pt"),
        (tmp_path / "no" / "b.pt", "is no folder: make it first"),
    ):
        assert main([str(source), str(target)]) == 2
        assert words in said(capfd)
    assert source.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    for wrong, words in (
        (tmp_path / "missing.pt", "does not exist: give a run's folder"),
        (tmp_path, "manifest.json cannot be read"),
    ):
        assert main([str(wrong), str(tmp_path / "b.pt")]) == 2
        assert words in said(capfd)
    torch.save({"some": 1}, tmp_path / "foreign.pt")
    assert main([str(tmp_path / "foreign.pt"), str(tmp_path / "b.pt")]) == 2
    assert "is no checkpoint of dlm or SMDM" in said(capfd)


def test_no_run_starts_from_a_weights_file_or_a_newer_checkpoint(trained_run, launch, tmp_path):
    cell = (*CELL, "training.steps=30", "sweep=other")
    assert main([str(trained_run), str(tmp_path / "a.pt")]) == 0
    ended = launch(*cell, f"ckpt_path={tmp_path}/a.pt")
    assert ended.code == 2 and "is no checkpoint of a run: give a step_* folder" in ended.err
    content = torch.load(trained_run / "checkpoints" / "step_00000020" / "state.ckpt", weights_only=True)
    content["dlm"]["format"] = 2
    torch.save(content, tmp_path / "newer.ckpt")
    ended = launch(*cell, f"ckpt_path={tmp_path}/newer.ckpt")
    assert ended.code == 2 and "the checkpoint has format 2, this dlm reads 1: update dlm" in ended.err
    assert json.loads((trained_run / "checkpoints" / "step_00000020" / "manifest.json").read_text())["version"] == 1
