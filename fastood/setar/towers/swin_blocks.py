"""One block of a Swin Transformer, taken apart; timm and Hugging Face, both versions.

A block attends within windows of its map of tokens x and then feeds every token to an MLP,

    version 1 (norm before)   a = x + m(norm_1(x)),   y = a + mlp(norm_2(a))
    version 2 (norm after)    a = x + norm_1(m(x)),   y = a + norm_2(mlp(a))

with m(z) = W_o heads(z). Shifts, windows, masks, cosine attention and biases of positions stay the
module's own business: its forward pass is run and stopped where attention is over, so that all
that is left here is about single tokens. Cutting a map into windows and putting it together again
only moves tokens, so heads can be read in the order of the map.

Source of the models: arXiv 2103.14030 and 2111.09883.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastood.setar.towers.base import input_of

__all__ = ["SwinBlock", "swin_block"]


@dataclass(frozen=True)
class SwinBlock:
    """The parts of one block. Maps are (b, H, W, C).

    Attributes:
        forward: the module's own pass of a map, giving a map.
        version: 1 has its norms before, 2 after attention and MLP.
        over: the module first called with the output of attention, all tokens in the order of the
            map.
        value: W_v z + b_v of tokens z.
        out, fc, act, proj: output of attention, and the MLP.
        window: (h, w) of its windows now.
    """

    forward: Callable[[Tensor], Tensor]
    version: int
    over: nn.Module
    norm_1: nn.Module
    norm_2: nn.Module
    value: Callable[[Tensor], Tensor]
    out: nn.Linear
    fc: nn.Linear
    act: nn.Module
    proj: nn.Linear
    window: Callable[[], tuple[int, int]]

    def mix(self, x: Tensor) -> Tensor:
        """m of a map, as the module itself computes it."""
        return input_of(self.over, lambda: self.forward(x)).reshape(x.shape)

    def heads(self, x: Tensor) -> Tensor:
        """What ``out`` is given, in the order of the map."""
        with _passing_on(self.out):
            return self.mix(x)

    def values(self, x: Tensor) -> Tensor:
        """The heads if every token attends to itself alone: the value path."""
        return self.value(self.norm_1(x) if self.version == 1 else x)

    def join(self, x: Tensor, mixed: Tensor) -> Tensor:
        """a, the map after attention."""
        return x + (mixed if self.version == 1 else self.norm_1(mixed))

    def enter(self, a: Tensor) -> Tensor:
        """What ``fc`` is given."""
        return self.norm_2(a) if self.version == 1 else a

    def leave(self, a: Tensor, fed: Tensor) -> Tensor:
        """y, the map after the block, from the output of ``proj``."""
        return a + (fed if self.version == 1 else self.norm_2(fed))

    def feed(self, a: Tensor) -> Tensor:
        """y from a."""
        return self.leave(a, self.proj(self.act(self.fc(self.enter(a)))))


@contextmanager
def _passing_on(module: nn.Module) -> Iterator[None]:
    """``module`` gives back what it is given."""
    handle = module.register_forward_hook(lambda _, args, result: args[0])
    try:
        yield
    finally:
        handle.remove()


def swin_block(module: nn.Module) -> SwinBlock | str:
    """A block of timm or Hugging Face in parts, or why its arithmetic is not known."""
    kind = type(module)
    make = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
    if make is None:
        return f"its blocks ({kind.__name__}) are not on the list of known ones"
    block = make(module)
    for layer in (block.out, block.fc, block.proj):
        if type(layer) is not nn.Linear:  # replaced by a quantised or a wrapped one
            return f"a linear layer is a {type(layer).__name__}"
    for norm in (block.norm_1, block.norm_2):
        if not isinstance(norm, nn.LayerNorm):
            return f"its norms ({type(norm).__name__}) are not LayerNorm"
    if block.out.in_features != block.out.out_features:
        return "its heads together are not as wide as its tokens"
    return block


def _timm(module: Any) -> SwinBlock:
    attn, mlp = module.attn, module.mlp
    version = 2 if hasattr(attn, "logit_scale") else 1

    def value(z: Tensor) -> Tensor:
        weight = attn.qkv.weight
        third = len(weight) // 3
        if version == 2:
            return F.linear(z, weight[2 * third :], attn.v_bias)
        bias = attn.qkv.bias
        return F.linear(z, weight[2 * third :], None if bias is None else bias[2 * third :])

    return SwinBlock(
        forward=module,
        version=version,
        over=module.norm1 if version == 2 else module.drop_path1,
        norm_1=module.norm1,
        norm_2=module.norm2,
        value=value,
        out=attn.proj,
        fc=mlp.fc1,
        act=nn.Sequential(mlp.act, getattr(mlp, "norm", nn.Identity())),
        proj=mlp.fc2,
        window=lambda: tuple(module.window_size),
    )


def _hugging_face(module: Any) -> SwinBlock:
    attention = module.attention
    version = 2 if type(module).__name__ == "Swinv2Layer" else 1
    if hasattr(module, "mlp"):  # newer versions of the first Swin
        mlp, value, out = module.mlp, attention.v_proj, attention.o_proj
        fc, act, proj = mlp.fc1, mlp.activation_fn, mlp.fc2
    else:
        value, out = attention.self.value, attention.output.dense
        fc, act = module.intermediate.dense, module.intermediate.intermediate_act_fn
        proj = module.output.dense

    def forward(x: Tensor) -> Tensor:
        rows, size = x.flatten(1, 2), (x.shape[1], x.shape[2])
        return module(rows, size)[0].reshape(x.shape)

    return SwinBlock(
        forward=forward,
        version=version,
        over=module.layernorm_before if version == 2 else module.drop_path,
        norm_1=module.layernorm_before,
        norm_2=module.layernorm_after,
        value=value,
        out=out,
        fc=fc,
        act=act,
        proj=proj,
        window=lambda: (int(module.window_size),) * 2,
    )


_KNOWN: dict[str, Callable[[Any], SwinBlock]] = {
    "timm.models.swin_transformer.SwinTransformerBlock": _timm,
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": _timm,
    "transformers.models.swin.modeling_swin.SwinLayer": _hugging_face,
    "transformers.models.swinv2.modeling_swinv2.Swinv2Layer": _hugging_face,
}
