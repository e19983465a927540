"""An independent float64 implementation of the model: explicit softmax, complex rotary embedding, a loop over heads."""

import torch

from dlm.core.shape import ModelShape

TINY = ModelShape(
    name="tiny", n_layer=2, n_head=2, n_embd=16, intermediate_size=24, vocab_size=11, block_size=16, norm_eps=1e-5
)


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotated(x_TD, share=1.0):
    """Apply the rotary embedding to the first ``share`` of the channels.

    With D channels in this share, pairs (i, i + D/2) are complex numbers, rotated by position x 10000^(-2i/D).
    """
    dim = int(share * x_TD.shape[1])
    x_TD, rest = x_TD[:, :dim], x_TD[:, dim:]
    length = len(x_TD)
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turn = torch.polar(torch.tensor(1.0).double(), torch.outer(torch.arange(length).double(), frequency))
    z = torch.complex(x_TD[:, : dim // 2], x_TD[:, dim // 2 :]) * turn
    return torch.cat([z.real, z.imag, rest], dim=-1)


def reference_logits(weights: dict[str, torch.Tensor], shape: ModelShape, tokens_T, causal: bool):
    """Return the (T, V) logits of one sequence; ``weights`` maps parameter names to float64 tensors."""
    length, dim, eps = len(tokens_T), shape.head_dim, shape.norm_eps
    sets = shape.n_query_groups or shape.n_head
    x = weights["embedding.weight"][tokens_T]
    for layer in range(shape.n_layer):
        w = {name.removeprefix(f"blocks.{layer}."): value for name, value in weights.items()}
        qkv = rms(x, w["norm_1.weight"], eps) @ w["attention.qkv.weight"].T
        q, k, v = qkv.split([shape.n_head * dim, sets * dim, sets * dim], dim=-1)
        heads = []
        for head in range(shape.n_head):
            mine, shared = (slice(i * dim, (i + 1) * dim) for i in (head, head * sets // shape.n_head))
            query, key = q[:, mine], k[:, shared]
            if shape.qk_norm:
                query, key = rms(query, w["attention.norm_q.weight"], eps), rms(key, w["attention.norm_k.weight"], eps)
            share = shape.rotary_percentage
            scores = rotated(query, share) @ rotated(key, share).T / dim**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, shared])
        depth = shape.n_layer / (shape.base_n_layer or shape.n_layer)
        x = x + torch.cat(heads, dim=-1) @ w["attention.proj.weight"].T / depth
        gate, up = (rms(x, w["norm_2.weight"], eps) @ w["mlp.gate_up.weight"].T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down.weight"].T / depth
    width = shape.n_embd / (shape.base_n_embd or shape.n_embd)
    return rms(x, weights["norm.weight"], eps) @ weights["head.weight"].T / width
