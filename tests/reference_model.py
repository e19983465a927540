"""The trunk once more, in float64, from its description: explicit softmax, complex rotary, one head at a time."""

import torch

from dlm.ladder import ModelShape

TINY = ModelShape(
    name="tiny", n_layer=2, n_head=2, n_embd=16, intermediate_size=24, vocab_size=11, block_size=16, norm_eps=1e-5
)


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotated(x_TD):
    """Channel pairs (i, i + D/2) as complex numbers, turned by position x 10000^(-2i/D)."""
    length, dim = x_TD.shape
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turn = torch.polar(torch.tensor(1.0).double(), torch.outer(torch.arange(length).double(), frequency))
    z = torch.complex(x_TD[:, : dim // 2], x_TD[:, dim // 2 :]) * turn
    return torch.cat([z.real, z.imag], dim=-1)


def reference_logits(weights: dict[str, torch.Tensor], shape: ModelShape, tokens_T, causal: bool):
    """(T, V) logits of one sequence; ``weights`` are the float64 parameters by name."""
    length, dim = len(tokens_T), shape.head_dim
    x = weights["embedding.weight"][tokens_T]
    for layer in range(shape.n_layer):
        w = {name.removeprefix(f"blocks.{layer}."): value for name, value in weights.items()}
        q, k, v = (rms(x, w["norm_1.weight"], shape.norm_eps) @ w["attention.qkv.weight"].T).chunk(3, dim=-1)
        heads = []
        for head in range(shape.n_head):
            part = slice(head * dim, (head + 1) * dim)
            scores = rotated(q[:, part]) @ rotated(k[:, part]).T / dim**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, dim=-1) @ w["attention.proj.weight"].T
        gate, up = (rms(x, w["norm_2.weight"], shape.norm_eps) @ w["mlp.gate_up.weight"].T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down.weight"].T
    return rms(x, weights["norm.weight"], shape.norm_eps) @ weights["head.weight"].T
