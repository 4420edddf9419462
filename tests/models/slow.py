"""A vision transformer written out in numpy float64 from its weights, one token at a time.

It shares nothing with the code under test: attention is an explicit matrix per image and head, and
the value path is the same forward pass with the identity put in place of the last matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


def weights(module) -> dict[str, np.ndarray]:
    return {k: v.detach().double().numpy() for k, v in module.state_dict().items()}


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def quick_gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-1.702 * x))


def layer_norm(x: np.ndarray, w: Weights, name: str, eps: float = 1e-5) -> np.ndarray:
    x = x - x.mean()
    return x / math.sqrt((x * x).mean() + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def attention(tokens: list, w: Weights, name: str, heads: int, identity: bool) -> list:
    """Mixed tokens after the output projection; ``identity`` replaces the attention matrix."""
    n, width = len(tokens), len(tokens[0])
    q, k, v = (
        [w[f"{name}.in_proj_weight"][s] @ t + w[f"{name}.in_proj_bias"][s] for t in tokens]
        for s in (slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width))
    )
    step = width // heads
    mixed = [np.zeros(width) for _ in range(n)]
    for h in range(heads):
        part = slice(h * step, (h + 1) * step)
        for i in range(n):
            if identity:
                row = np.eye(n)[i]
            else:
                row = softmax(np.array([q[i][part] @ k[j][part] for j in range(n)]) / step**0.5)
            for j in range(n):
                mixed[i][part] += row[j] * v[j][part]
    return [w[f"{name}.out_proj.weight"] @ m + w[f"{name}.out_proj.bias"] for m in mixed]


def block(
    tokens: list, w: Weights, name: str, heads: int, act: Callable, identity: bool = False
) -> list:
    gain = [w.get(f"{name}.ls_{i}.gamma", 1.0) for i in (1, 2)]
    normed = [layer_norm(t, w, f"{name}.ln_1") for t in tokens]
    mixed = attention(normed, w, f"{name}.attn", heads, identity)
    tokens = [t + gain[0] * m for t, m in zip(tokens, mixed, strict=True)]
    out = []
    for t in tokens:
        hidden = layer_norm(t, w, f"{name}.ln_2")
        hidden = act(w[f"{name}.mlp.c_fc.weight"] @ hidden + w[f"{name}.mlp.c_fc.bias"])
        hidden = w[f"{name}.mlp.c_proj.weight"] @ hidden + w[f"{name}.mlp.c_proj.bias"]
        out.append(t + gain[1] * hidden)
    return out


def vit(
    image: np.ndarray, w: Weights, *, heads: int, patch: int, layers: int, act: Callable,
    identity: bool, ln_pre: bool = True,
) -> np.ndarray:  # fmt: skip
    """(1 + P, D) of one (3, H, W) image; ``identity`` for the value path of the last block."""
    tokens = [w["class_embedding"]]
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            window = image[:, top : top + patch, left : left + patch]
            tokens.append((w["conv1.weight"] * window).sum(axis=(1, 2, 3)))
    tokens = [t + p for t, p in zip(tokens, w["positional_embedding"], strict=True)]
    if ln_pre:
        tokens = [layer_norm(t, w, "ln_pre") for t in tokens]
    for i in range(layers):
        last = identity and i == layers - 1
        tokens = block(tokens, w, f"transformer.resblocks.{i}", heads, act, last)
    return np.stack([layer_norm(t, w, "ln_post") @ w["proj"] for t in tokens])
