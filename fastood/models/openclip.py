"""open_clip models (and any model object of its classes) as encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastood.models import local as paths
from fastood.models.base import Encoder, ImageFeatures, TextSupport
from fastood.models.common import (
    PROMPT_PROBE,
    TOKENIZER_PROBE,
    cut_prompts,
    features_of,
    module_device,
    module_dtype,
)
from fastood.models.fingerprint import Fingerprint, describe_callable
from fastood.prompts.packed import TextPass
from fastood.scores.inputs import working

__all__ = ["OpenClipEncoder"]


class OpenClipEncoder(Encoder):
    """A ``CLIP``, ``CustomTextCLIP`` or ``CoCa`` of open_clip.

    ViT and ResNet image towers offer local features; ``no_local`` names the reason where the
    pooling leaves them undefined. Text runs without padding, and what all prompts of a call begin
    with only once, where the tower is causal and reads its feature at the end of text.

    Args:
        model: the model; it is set to evaluation mode.
        preprocess: ``PIL.Image`` → ``(3, H, W)``.
        tokenizer: prompts → ``(N, L)`` token ids.
        name: shown in results.
        preprocess_id: text that changes with ``preprocess``; default its representation.
        device, dtype: move the whole model there; default where and as it is.
        warn: prompts → what to tell the user about them.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Tensor],
        tokenizer: Callable[..., Tensor],
        *,
        name: str = "open_clip model",
        preprocess_id: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        warn: Callable[[Sequence[str]], list[str]] | None = None,
    ) -> None:
        if not hasattr(model, "visual") or not hasattr(model, "logit_scale"):
            raise TypeError(
                f"model: expected an open_clip CLIP, CustomTextCLIP or CoCa, got "
                f"{type(model).__name__}; use CallableEncoder for other networks"
            )
        if device is not None or dtype is not None:
            model = model.to(device=device, dtype=dtype)
        self.model = cast(Any, model.eval())
        self.name = name
        self.preprocess = preprocess
        self.preprocess_id = preprocess_id or describe_callable(preprocess)
        self.device = module_device(model)
        self.dtype = module_dtype(self.model.visual)
        scale, bias = self.model.logit_scale, getattr(self.model, "logit_bias", None)
        self.logit_scale = float(working(scale.detach()).exp())
        self.logit_bias = 0.0 if bias is None else float(bias.detach().float())
        self.tokenizer = tokenizer
        self._warn = warn
        self.no_local = paths.open_clip_no_local(self.model.visual)
        if self.no_local is None:
            self.num_patches = paths.open_clip_num_patches(self.model.visual)
        self._text = TextPass(model, self.encode_tokens, self._probe_prompts)
        self.text = TextSupport(_context_length(self.model), self._text.usable)
        self._fingerprint = Fingerprint(
            model, {**_architecture(self.model), "tokens": self._probe_tokens()}
        )
        self.embed_dim = self._width()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, *, local: bool = False) -> ImageFeatures:
        pixels = self._checked(pixels, local=local)
        if not len(pixels):
            return self._nothing(local=local)
        visual = self.model.visual
        if not local:
            return ImageFeatures(features_of(visual(pixels)))
        if hasattr(visual, "attnpool"):
            watched, path = visual.attnpool, paths.open_clip_resnet
        else:
            watched, path = visual.transformer.resblocks[-1], paths.open_clip_vit
        with paths.capture_input(watched) as last:
            image = features_of(visual(pixels))
        return ImageFeatures(image, path(visual, last()))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        prompts = tuple(prompts)
        if not prompts:
            return self._nothing().image
        features = self._text(self.tokenize(prompts).to(self.device))
        if self.text is not None and self.text.croppable != self._text.usable:
            self.text = TextSupport(self.text.context_length, self._text.usable)
        return features

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        return torch.as_tensor(self.tokenizer(list(prompts)))

    def warn_prompts(self, prompts: Sequence[str]) -> list[str]:
        found = list(self._warn(prompts)) if self._warn is not None else []
        return found + cut_prompts(self.tokenize(prompts), prompts)

    def text_module(self) -> nn.Module:
        return self.model

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return features_of(self.model.encode_text(tokens, normalize=False))

    def _probe_prompts(self) -> Tensor:
        return self.tokenize(PROMPT_PROBE).to(self.device)

    def _probe_tokens(self) -> list[int]:
        return self.tokenize([TOKENIZER_PROBE])[0].tolist()

    def _width(self) -> int:
        width = getattr(self.model.visual, "output_dim", None)
        if width is not None:
            return int(width)
        with torch.no_grad():
            height, wide = _image_size(self.model.visual)
            blank = torch.zeros(1, 3, height, wide, device=self.device, dtype=self.dtype)
            return int(features_of(self.model.visual(blank)).shape[-1])


def _context_length(model: Any) -> int:
    return int(model.context_length if hasattr(model, "context_length") else 77)


def _image_size(visual: Any) -> tuple[int, int]:
    size = visual.image_size
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _block(transformer: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "block": type(block).__name__,
        "heads": block.attn.num_heads,
        "activation": type(block.mlp.gelu).__name__,
        "eps": block.ln_1.eps,
    }


def _architecture(model: Any) -> dict[str, Any]:
    """What the weights alone do not tell; the same however the model was built."""
    visual = model.visual
    image: dict[str, Any] = {"kind": type(visual).__name__}
    if hasattr(visual, "image_size"):
        image["size"] = _image_size(visual)
    if hasattr(visual, "attnpool"):
        image["heads"] = getattr(visual.attnpool, "num_heads", None)
    elif hasattr(visual, "transformer"):
        image |= _block(visual.transformer)
        image["pool"] = getattr(visual, "pool_type", "tok")
        image["norm_after_pool"] = bool(getattr(visual, "final_ln_after_pool", False))
    elif hasattr(visual, "trunk"):
        trunk = getattr(visual.trunk, "pretrained_cfg", None) or {}
        image["trunk"] = trunk.get("architecture", type(visual.trunk).__name__)
    owner = model if hasattr(model, "token_embedding") else model.text
    text: dict[str, Any] = {"kind": type(model).__name__, "context": _context_length(model)}
    if hasattr(owner, "token_embedding"):
        text |= _block(owner.transformer)
        text["pool"] = getattr(model, "text_pool_type", getattr(owner, "pool_type", None))
        text["causal"] = getattr(owner, "attn_mask", None) is not None
    else:
        text["tower"] = type(owner).__name__
    return {"library": "open_clip", "image": image, "text": text}
