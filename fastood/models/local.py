"""Patch features in the joint space: the value path of the last block.

Attention mixes the patches; with the attention matrix of the last block set to the identity every
patch keeps its own place and still ends in the space the text lives in:

    x = input of the last block (B, 1 + P, Dv)
    v = x + Wo(Wv(LN1 x));   v = v + MLP(LN2 v);   local = LNpost(v)[:, 1:] Wproj

and for the attention pooling of CLIP's ResNets, x the last convolution map without positions,

    local = Wc(Wv x)

Biases, LayerScale and the other per-token steps a block has are included; Wq and Wk have no part.
Source: GL-MCM, arXiv 2304.04521.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "capture_input",
    "hf_clip_block",
    "open_clip_block",
    "open_clip_no_local",
    "open_clip_num_patches",
    "open_clip_resnet",
    "open_clip_vit",
]


@contextmanager
def capture_input(module: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Remember the first argument ``module`` is called with, in this thread, inside the block."""
    seen: list[Tensor] = []
    owner = threading.get_ident()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == owner:
            seen.append(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)

    def captured() -> Tensor:
        if len(seen) != 1:
            raise RuntimeError(f"{type(module).__name__} was called {len(seen)} times, not once")
        return seen[0]

    try:
        yield captured
    finally:
        handle.remove()


def open_clip_block(block: Any, x: Tensor) -> Tensor:
    """An open_clip residual block with the identity for its attention matrix; any token layout."""
    attn = block.attn
    width = x.shape[-1]
    bias = None if attn.in_proj_bias is None else attn.in_proj_bias[2 * width :]
    v = F.linear(block.ln_1(x), attn.in_proj_weight[2 * width :], bias)
    if not isinstance(attn, nn.MultiheadAttention):
        # open_clip's own attention (batch first) may scale the heads and normalise their sum
        scale = getattr(attn, "head_scale", None)
        if scale is not None:
            heads = v.unflatten(-1, (attn.num_heads, -1)) * scale.reshape(-1, 1)
            v = heads.flatten(-2)
        v = getattr(attn, "ln_inner", nn.Identity())(v)
    v = attn.out_proj(v)
    v = getattr(block, "ln_attn", nn.Identity())(v)
    x = x + block.ls_1(v)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def open_clip_vit(visual: Any, x: Tensor) -> Tensor:
    """(B, P, D) from the input of the last block of an open_clip ``VisionTransformer``."""
    v = open_clip_block(visual.transformer.resblocks[-1], x)
    if not getattr(visual.transformer, "batch_first", True):
        v = v.transpose(0, 1)
    local = visual.ln_post(v)[:, 1:]
    return local if visual.proj is None else local @ visual.proj


def open_clip_resnet(visual: Any, x: Tensor) -> Tensor:
    """(B, P, D) from the last convolution map (B, C, h, w) of an open_clip ``ModifiedResNet``."""
    pool = visual.attnpool
    return pool.c_proj(pool.v_proj(x.flatten(2).transpose(1, 2)))


def open_clip_no_local(visual: Any) -> str | None:
    """Why an open_clip image tower has no local features, or None if it has."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    kind = type(visual).__name__
    if isinstance(visual, ModifiedResNet):
        return (
            None
            if type(visual.attnpool).__name__ == "AttentionPool2d"
            else (f"{kind} without attention pooling has no projection for its patches")
        )
    if not isinstance(visual, VisionTransformer):
        trunk = type(getattr(visual, "trunk", visual)).__name__
        return (
            f"the image tower {kind} ({trunk}) pools its tokens outside open_clip's ViT and "
            f"ResNet, so the value path of its last block is not defined"
        )
    if getattr(visual, "attn_pool", None) is not None:
        return (
            "the image tower uses attentional pooling (CoCa style): queries of the pooling layer, "
            "not the class token, make the image feature"
        )
    pool = getattr(visual, "pool_type", "tok")
    if pool != "tok":
        return (
            f"the image tower pools with pool_type='{pool}' instead of the class token, "
            f"so patches have no path of their own"
        )
    return None


def open_clip_num_patches(visual: Any) -> int:
    """P of a tower for which ``open_clip_no_local`` is None."""
    if hasattr(visual, "attnpool"):
        return int(visual.attnpool.positional_embedding.shape[0]) - 1
    return int(visual.positional_embedding.shape[0]) - 1


def hf_clip_block(layer: Any, x: Tensor) -> Tensor:
    """A Hugging Face ``CLIPEncoderLayer`` with the identity for its attention matrix."""
    attn = layer.self_attn
    x = x + attn.out_proj(attn.v_proj(layer.layer_norm1(x)))
    return x + layer.mlp(layer.layer_norm2(x))
