"""Swin classifiers taken apart; timm and Hugging Face, versions 1 and 2.

A block attends within windows of its map of tokens x and then feeds every token to an MLP,

    version 1 (norm before)   a = x + m(norm_1(x)),   y = a + mlp(norm_2(a))
    version 2 (norm after)    a = x + norm_1(m(x)),   y = a + norm_2(mlp(a))

with m(z) = W_o heads(z). Shifts, windows, masks, cosine attention and biases of positions stay the
module's own business; what is here is about single tokens. Patch features take GL-MCM's value path
through the last block, heads(z) = W_v z: every token keeps its own value, so windows and shifts
change nothing. Behind the final norm the classifier is applied to them as it is.

Sources: arXiv 2103.14030 and 2111.09883 (models), 2406.12629 with its code (patch features).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

__all__ = ["Swin", "SwinBlock", "swin", "swin_block"]

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SwinBlock:
    """The parts of one block, for tokens in any layout (..., C) but where a map is asked for.

    Attributes:
        module: the block itself.
        forward: its own pass of a map (b, H, W, C), giving a map.
        version: 1 has its norms before, 2 after attention and MLP.
        over: the module first called with the output of attention, all tokens in the order of the
            map.
        value: W_v z + b_v of tokens z.
        out, fc, act, proj: output of attention, and the MLP.
        window: (h, w) of its windows now.
    """

    module: nn.Module
    forward: Step
    version: int
    over: nn.Module
    norm_1: nn.Module
    norm_2: nn.Module
    value: Step
    out: nn.Linear
    fc: nn.Linear
    act: nn.Module
    proj: nn.Linear
    window: Callable[[], tuple[int, int]]

    def values(self, x: Tensor) -> Tensor:
        """The heads if every token attends to itself alone."""
        return self.value(self.norm_1(x) if self.version == 1 else x)

    def join(self, x: Tensor, mixed: Tensor) -> Tensor:
        """a, the tokens after attention, from m(x)."""
        return x + (mixed if self.version == 1 else self.norm_1(mixed))

    def enter(self, a: Tensor) -> Tensor:
        """What ``fc`` is given."""
        return self.norm_2(a) if self.version == 1 else a

    def leave(self, a: Tensor, fed: Tensor) -> Tensor:
        """y, the tokens after the block, from the output of ``proj``."""
        return a + (fed if self.version == 1 else self.norm_2(fed))

    def feed(self, a: Tensor) -> Tensor:
        """y from a."""
        return self.leave(a, self.proj(self.act(self.fc(self.enter(a)))))

    def value_path(self, x: Tensor) -> Tensor:
        """y if every token attends to itself alone."""
        return self.feed(self.join(x, self.out(self.values(x))))


@dataclass(frozen=True)
class Swin:
    """The parts of a classifier.

    Attributes:
        blocks: through all stages, from the input.
        halve: what makes the next stage's map from the one behind a block, by its number.
        norm: the final norm.
        pool: a map (b, H, W, C) behind that → (b, C), what the classifier is given.
        to_map: what enters the first block, and pixels → (b, H, W, C).
    """

    blocks: tuple[SwinBlock, ...]
    halve: dict[int, Step]
    norm: nn.Module
    pool: Step
    to_map: Callable[[Tensor, Tensor], Tensor]


def swin(model: nn.Module) -> Swin | str:
    """A classifier in parts, or why its arithmetic is not known."""
    make = _MODELS.get(_name(model))
    if make is None:
        return f"{type(model).__name__} is not a Swin classifier of timm or Hugging Face"
    found = []
    for module in _modules(model):
        block = swin_block(module)
        if isinstance(block, str):
            return block
        found.append(block)
    return make(model, tuple(found))


def swin_block(module: nn.Module) -> SwinBlock | str:
    """A block in parts, or why its arithmetic is not known."""
    make = _BLOCKS.get(_name(module))
    if make is None:
        return f"its blocks ({type(module).__name__}) are not on the list of known ones"
    block = make(module)
    for layer in (block.out, block.fc, block.proj):
        if (
            type_before_parametrizations(layer) is not nn.Linear
        ):  # replaced by a quantised or a wrapped one
            return f"a linear layer is a {type(layer).__name__}"
    for norm in (block.norm_1, block.norm_2):
        if not isinstance(norm, nn.LayerNorm):
            return f"its norms ({type(norm).__name__}) are not LayerNorm"
    if block.out.in_features != block.out.out_features:
        return "its heads together are not as wide as its tokens"
    return block


def _name(module: nn.Module) -> str:
    kind = type_before_parametrizations(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _timm_block(module: Any) -> SwinBlock:
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
        module=module,
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


def _hugging_face_block(module: Any) -> SwinBlock:
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
        module=module,
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


def _body(model: Any) -> Any:
    """What holds the stages: the model itself in timm."""
    if hasattr(model, "swinv2"):
        return model.swinv2
    return model.swin if hasattr(model, "swin") else model


def _stages(model: Any) -> list[Any]:
    body = _body(model)
    return list(body.layers if body is model else body.encoder.layers)


def _modules(model: Any) -> list[nn.Module]:
    return [block for stage in _stages(model) for block in stage.blocks]


def _timm(model: Any, blocks: tuple[SwinBlock, ...]) -> Swin:
    halve: dict[int, Step] = {}
    index = -1
    for here, following in pairwise(_stages(model)):
        index += len(here.blocks)
        halve[index] = following.downsample
    return Swin(
        blocks=blocks,
        halve=halve,
        norm=model.norm,
        pool=lambda x: model.forward_head(x, pre_logits=True),
        to_map=lambda x, pixels: x,
    )


def _hugging_face(model: Any, blocks: tuple[SwinBlock, ...]) -> Swin:
    body = _body(model)
    halve: dict[int, Step] = {}
    index = -1
    for stage in _stages(model):
        index += len(stage.blocks)
        if stage.downsample is not None:
            halve[index] = _on_rows(stage.downsample)
    size = model.config.patch_size
    patch = size if isinstance(size, int) else int(size[0])

    def to_map(x: Tensor, pixels: Tensor) -> Tensor:
        # images are padded to whole patches
        return x.unflatten(1, (-(-pixels.shape[-2] // patch), -1))

    return Swin(
        blocks=blocks,
        halve=halve,
        norm=body.layernorm,
        pool=lambda x: body.pooler(x.flatten(1, 2).transpose(1, 2)).flatten(1),
        to_map=to_map,
    )


def _on_rows(downsample: Any) -> Step:
    def halve(x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows = downsample(x.flatten(1, 2), (height, width))
        return rows.unflatten(1, ((height + 1) // 2, (width + 1) // 2))

    return halve


_BLOCKS: dict[str, Callable[[Any], SwinBlock]] = {
    "timm.models.swin_transformer.SwinTransformerBlock": _timm_block,
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": _timm_block,
    "transformers.models.swin.modeling_swin.SwinLayer": _hugging_face_block,
    "transformers.models.swinv2.modeling_swinv2.Swinv2Layer": _hugging_face_block,
}

_MODELS: dict[str, Callable[[Any, tuple[SwinBlock, ...]], Swin]] = {
    "timm.models.swin_transformer.SwinTransformer": _timm,
    "timm.models.swin_transformer_v2.SwinTransformerV2": _timm,
    "transformers.models.swin.modeling_swin.SwinForImageClassification": _hugging_face,
    "transformers.models.swinv2.modeling_swinv2.Swinv2ForImageClassification": _hugging_face,
}
