"""SMDM's own model, run from a checkout of it, agrees with ours from one converted checkpoint.

Needs a folder with a checkout, SMDM/: DLM_PEERS=/path/to/peers (git clone https://github.com/ML-GSAI/SMDM).
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import ROOT

from dlm.convert import load_model, main
from dlm.data.noise import stratified_t, uniforms
from dlm.train.objectives.masked_diffusion import MaskedDiffusion

PEERS = os.environ.get("DLM_PEERS")
pytestmark = pytest.mark.skipif(PEERS is None, reason="DLM_PEERS names no folder with a checkout of SMDM")


@pytest.fixture(scope="module")
def smdm():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import peers

    package = peers.smdm(Path(PEERS))
    yield package
    sys.path.remove(str(ROOT / "benchmarks"))


def their_model(smdm, name):
    model = sys.modules["lit_gpt.diffmodel"].TransEncoder(smdm.Config.from_name(name))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start, and norms that are not all one
            near_one = parameter.dim() == 1
            parameter.copy_(torch.rand(parameter.shape) + 0.5 if near_one else 0.05 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize(("theirs_name", "ours_name"), [("Diff_LLaMA_6M", "6M"), ("Diff_LLaMA_75M", "75M")])
def test_logits_and_loss_agree_with_those_of_smdm(theirs_name, ours_name, smdm, tmp_path):
    theirs = their_model(smdm, theirs_name)
    torch.save({"model": theirs.state_dict(), "iter_num": 7, "step_count": 7}, tmp_path / "iter-000007-ckpt.pth")
    target = tmp_path / "weights.safetensors"
    assert main([str(tmp_path / "iter-000007-ckpt.pth"), str(target), "--model", ours_name]) == 0
    ours = load_model(target)

    batch, length, eps = 4, 128, 1e-3
    noise = stratified_t(0, 0, np.arange(batch)), uniforms(0, 0, batch, length)
    text = np.random.default_rng(0).integers(0, 32000, (batch, length))
    tokens, p = torch.from_numpy(text), torch.from_numpy((1 - eps) * noise[0] + eps)[:, None]
    mask = torch.from_numpy(noise[1]) < p
    noisy = torch.where(mask, 32000, tokens)
    diffmodel = sys.modules["lit_gpt.diffmodel"]
    with torch.no_grad():
        rounded = theirs(noisy)  # SMDM's own rotary table is in bfloat16, where positions coincide
        size = theirs.config.head_size
        theirs.rope_cache = diffmodel.build_rope_cache(2048, size, dtype=torch.float32, device=noisy.device)
        logits = theirs(noisy)
        ce = F.cross_entropy(logits[mask], tokens[mask], reduction="none") / p.expand_as(mask)[mask]
        loss = ce.sum() / (batch * length)  # pretrain/train_mdm.py
        objective = MaskedDiffusion(vocab_size=32000, eps=eps)
        mine = {key: torch.as_tensor(value) for key, value in objective.corrupt(text, *noise).items()}
        dense = ours(noisy)
        assert (dense - logits).abs().max() < 1e-5 * logits.abs().max()
        assert (rounded - logits).abs().max() > 1e-3 * logits.abs().max()
        assert objective.loss(ours, mine).mean().item() == pytest.approx(loss.item(), rel=1e-5)
