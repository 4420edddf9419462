"""Transformer blocks whose arithmetic is known, so that tokens can be run without padding.

A block is taken apart into what happens to each token alone (``project``, ``finish``) and the
attention between tokens, which is the caller's. Only classes on the list below are taken apart:
the pre-norm block of open_clip and that of Hugging Face CLIP.

Weights are read from the modules at every call, so that a parametrisation of one (a low-rank
update, say) is seen and gets its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

__all__ = ["Block", "as_block", "layer_norm", "linear"]

Affine = tuple[Tensor, "Tensor | None"]

_QUICK_GELU = ("QuickGELU", "QuickGELUActivation")  # open_clip, transformers


@dataclass(frozen=True)
class Block:
    """x + s1 · out(attention(norm_1(x))), then x + s2 · proj(act(fc(norm_2(x))))."""

    heads: int
    norm_1: nn.LayerNorm
    norm_2: nn.LayerNorm
    joint: Callable[[], Affine]
    """Weight (3W, W) and bias (3W,) of queries, keys and values, stacked."""
    out: nn.Linear
    fc: nn.Linear
    act: nn.Module
    proj: nn.Linear
    gain_1: Callable[[], Tensor] | None = None
    gain_2: Callable[[], Tensor] | None = None
    """LayerScale."""

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values (B, N, 3, H, W/H) of tokens (B, N, W)."""
        weight, bias = self.joint()
        return self._heads(linear(layer_norm(self.norm_1, x), weight, bias), 3)

    def project_last(self, x: Tensor, index: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Queries (B, M, H, W/H) of the M tokens at ``index``, keys and values of all of them.

        Without an index only keys and values (B, N, 2, H, W/H).
        """
        weight, bias = self.joint()
        width = x.shape[-1]
        normed = layer_norm(self.norm_1, x)
        pair = linear(normed, weight[width:], None if bias is None else bias[width:])
        if index is None:
            return None, self._heads(pair, 2)
        asking = normed.index_select(1, index)
        query = linear(asking, weight[:width], None if bias is None else bias[:width])
        return self._heads(query, 1).squeeze(2), self._heads(pair, 2)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Tokens (B, N, W) after the block, from what their heads (B, N, H, W/H) attended to."""
        return self.feed(self.join(x, self.mix(attended)))

    def mix(self, attended: Tensor) -> Tensor:
        """(B, N, W): what the heads (B, N, H, W/H) attended to, through the output layer."""
        return linear(attended.flatten(-2), self.out.weight, self.out.bias)

    def join(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Tokens between attention and MLP."""
        return x + (mixed if self.gain_1 is None else mixed * self.gain_1())

    def feed(self, x: Tensor) -> Tensor:
        """Tokens after the MLP."""
        y = linear(layer_norm(self.norm_2, x), self.fc.weight, self.fc.bias)
        return self.leave(x, linear(self.activate(y), self.proj.weight, self.proj.bias))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Tokens after the block, from those before its MLP and what that gave."""
        return x + (y if self.gain_2 is None else y * self.gain_2())

    def activate(self, y: Tensor) -> Tensor:
        """The MLP's activation."""
        if type(self.act).__name__ in _QUICK_GELU:
            # y sigmoid(1.702 y) by one function that keeps one tensor for backward, not two
            return F.silu(1.702 * y) * (1 / 1.702)
        return self.act(y)

    def _heads(self, y: Tensor, parts: int) -> Tensor:
        return y.unflatten(-1, (parts, self.heads, -1))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b in the dtype of x: a float32 prefix may pass through a half-precision tower."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm in the wider dtype of x and its gain, returned in that of x."""
    dtype = torch.promote_types(x.dtype, norm.weight.dtype)
    bias = None if norm.bias is None else norm.bias.to(dtype)
    y = F.layer_norm(x.to(dtype), norm.normalized_shape, norm.weight.to(dtype), bias, norm.eps)
    return y.to(x.dtype) if dtype != x.dtype else y


def as_block(module: nn.Module) -> Block | str:
    """``module`` taken apart, or why its arithmetic is not known."""
    kind = type_before_parametrizations(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name == "open_clip.transformer.ResidualAttentionBlock":
        return _open_clip(module)
    if name == "transformers.models.clip.modeling_clip.CLIPEncoderLayer":
        return _hugging_face(module)
    return f"its blocks ({kind.__name__}) are not on the list of known ones"


def _open_clip(module: Any) -> Block | str:
    attn, mlp = module.attn, module.mlp
    if type_before_parametrizations(attn) is not nn.MultiheadAttention:
        return f"its attention is a {type(attn).__name__}"
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        return "its attention has keys or values of its own"
    if hasattr(module, "ln_1_kv"):
        return "its blocks attend to something else"
    if list(dict(mlp.named_children())) != ["c_fc", "gelu", "c_proj"]:
        return "its MLP has parts that are not known"
    gains = [_gain(module.ls_1), _gain(module.ls_2)]
    found = [g for g in gains if isinstance(g, str)]
    why = found[0] if found else _why_not(
        [module.ln_1, module.ln_2], [attn.out_proj, mlp.c_fc, mlp.c_proj], mlp.gelu,
        attn.dropout if attn.training else 0.0,
    )  # fmt: skip
    if why is not None:
        return why
    return Block(
        heads=attn.num_heads,
        norm_1=module.ln_1,
        norm_2=module.ln_2,
        joint=lambda: (attn.in_proj_weight, attn.in_proj_bias),
        out=attn.out_proj,
        fc=mlp.c_fc,
        act=mlp.gelu,
        proj=mlp.c_proj,
        gain_1=gains[0],  # type: ignore[arg-type]
        gain_2=gains[1],  # type: ignore[arg-type]
    )


# older transformers (4.45) have a class for each way to compute the same
_CLIP_ATTENTION = ("CLIPAttention", "CLIPSdpaAttention", "CLIPFlashAttention2")


def _hugging_face(module: Any) -> Block | str:
    attn, mlp = module.self_attn, module.mlp
    if type(attn).__name__ not in _CLIP_ATTENTION:
        return f"its attention is a {type(attn).__name__}"
    three = [attn.q_proj, attn.k_proj, attn.v_proj]
    why = _why_not(
        [module.layer_norm1, module.layer_norm2], [*three, attn.out_proj, mlp.fc1, mlp.fc2],
        mlp.activation_fn, attn.dropout if attn.training else 0.0,
    )  # fmt: skip
    if why is not None:
        return why

    def joint() -> Affine:
        weight, biases = torch.cat([p.weight for p in three]), [p.bias for p in three]
        if all(b is None for b in biases):
            return weight, None
        # some variants have none for the keys alone
        rows = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in three]
        return weight, torch.cat(rows)

    return Block(
        heads=attn.num_heads,
        norm_1=module.layer_norm1,
        norm_2=module.layer_norm2,
        joint=joint,
        out=attn.out_proj,
        fc=mlp.fc1,
        act=mlp.activation_fn,
        proj=mlp.fc2,
    )


def _gain(module: Any) -> Callable[[], Tensor] | str | None:
    if isinstance(module, nn.Identity):
        return None
    if type_before_parametrizations(module).__name__ != "LayerScale":
        return f"its blocks have a {type(module).__name__}"
    return lambda: module.gamma


_NORMS = ("LayerNorm", "LayerNormFp32")
_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _why_not(
    norms: list[nn.Module], linears: list[nn.Module], act: nn.Module, dropout: float
) -> str | None:
    """Why the parts of a block are not what they are taken for, or None."""
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm) or _base(norm).__name__ not in _NORMS:
            return f"its norms ({type(norm).__name__}) are not LayerNorm"
        if norm.weight is None:
            return "its norms have no gain"
    for layer in linears:
        if _base(layer) not in _LINEAR:  # replaced by a quantised or a wrapped one
            return f"a linear layer is a {type(layer).__name__}"
    if any(True for _ in act.parameters()):
        return f"its activation ({type(act).__name__}) has parameters"
    return "it drops attention weights at random (call eval())" if dropout > 0 else None


def _base(module: nn.Module) -> Any:
    return type_before_parametrizations(module)
