"""Any network, or any function, as an encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models.base import Encoder, ImageFeatures, TextSupport
from fastood.models.common import as_device, features_of, module_device, module_dtype
from fastood.models.fingerprint import Fingerprint, describe_callable, weights_digest

__all__ = ["CallableEncoder"]

TextSource = Callable[[list[str]], Tensor] | Mapping[str, Tensor]


class CallableEncoder(Encoder):
    """An image tower of your own, with or without text.

    >>> import torch
    >>> tower = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    >>> encoder = CallableEncoder(tower, lambda image: torch.zeros(3, 2, 2), preprocess_id="zeros",
    ...                           embed_dim=4, text={"cat": torch.ones(4)})
    >>> encoder.encode_image(torch.zeros(2, 3, 2, 2)).image.shape
    torch.Size([2, 4])

    Args:
        image: pixels (B, 3, H, W) → features (B, D), an object with ``pooler_output``, or, with
            ``patches`` given, a pair of features and local features (B, P, D).
        preprocess: ``PIL.Image`` → ``(3, H, W)``.
        embed_dim: D.
        text: list of prompts → (N, D); or a mapping from prompt to a (D,) vector you computed.
        patches: P if ``image`` returns local features as well.
        logit_scale, logit_bias: of the model (exp of the learned logarithm); 1 and 0 for none.
        fingerprint: text that changes whenever the towers compute something else. Needed for plain
            functions; an ``nn.Module`` is hashed.
        preprocess_id: the same for ``preprocess``; needed where its representation says nothing.
        name, device, dtype: default: the module's own, else the CPU in float32.

    Raises:
        ValueError: if a fingerprint or preprocess_id is needed and missing.
    """

    def __init__(
        self,
        image: Callable[[Tensor], Any],
        preprocess: Callable[[Any], Tensor],
        *,
        embed_dim: int,
        text: TextSource | None = None,
        patches: int | None = None,
        logit_scale: float = 1.0,
        logit_bias: float = 0.0,
        fingerprint: str | None = None,
        preprocess_id: str | None = None,
        name: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim < 1:
            raise ValueError(f"embed_dim: expected at least 1, got {embed_dim}")
        if not logit_scale > 0:
            raise ValueError(f"logit_scale: expected more than 0, got {logit_scale}")
        modules = nn.ModuleDict()
        for part, tower in (("image", image), ("text", text)):
            if isinstance(tower, nn.Module):
                if device is not None or dtype is not None:
                    tower.to(device=device, dtype=dtype)
                modules[part] = tower.eval()
        self._fingerprint: Callable[[], str]
        if fingerprint is not None:
            self._fingerprint = lambda: fingerprint
        elif isinstance(image, nn.Module) and (text is None or not _is_function(text)):
            vectors = _text_vectors(text) if isinstance(text, Mapping) else {}
            self._fingerprint = Fingerprint(
                modules,
                {
                    "library": "custom",
                    "towers": repr(modules),
                    "text": weights_digest(vectors, {}) if vectors else None,
                },
            )
        else:
            raise ValueError(
                "fingerprint: a plain function cannot be hashed; pass any text that changes when "
                "the function computes something else, for example fingerprint='my-model v1'"
            )
        described = describe_callable(preprocess)
        if preprocess_id is None and described.startswith("<"):
            raise ValueError(
                f"preprocess_id: {described} does not tell what it computes; pass any text that "
                f"changes with it, for example preprocess_id='resize 224, CLIP mean and std'"
            )
        self.image = image
        self.preprocess = preprocess
        self.preprocess_id = preprocess_id or described
        self.embed_dim = embed_dim
        self.logit_scale, self.logit_bias = logit_scale, logit_bias
        self.name = name or type(image).__name__
        own = isinstance(image, nn.Module)
        self.device = module_device(modules) if own else as_device(device or "cpu")
        self.dtype = module_dtype(modules) if own else dtype or torch.float32
        self.num_patches = patches
        if patches is not None:
            self.no_local = None
        self._text = text
        self.text = None if text is None else TextSupport(context_length=0, croppable=False)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, *, local: bool = False) -> ImageFeatures:
        pixels = self._checked(pixels, local=local)
        if not len(pixels):
            return self._nothing(local=local)
        output = self.image(pixels)
        image = features_of(output)
        self._check(image, len(pixels), "image")
        if not local:
            return ImageFeatures(image)
        expected = (len(pixels), self.num_patches, self.embed_dim)
        pair = isinstance(output, (tuple, list)) and len(output) > 1
        patches = output[1] if pair else None
        if not isinstance(patches, Tensor) or tuple(patches.shape) != expected:
            got = tuple(patches.shape) if isinstance(patches, Tensor) else type(output).__name__
            raise ModelError(f"image: expected a pair with local features {expected}, got {got}")
        return ImageFeatures(image, patches)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        prompts = list(prompts)
        if self._text is None:
            return super().encode_text(prompts)
        if not prompts:
            return self._nothing().image
        if isinstance(self._text, Mapping):
            unknown = [p for p in prompts if p not in self._text]
            if unknown:
                raise ModelError(
                    f"{self.name}: no text features for {len(unknown)} prompt(s), "
                    f"first {unknown[0]!r}; the mapping holds {len(self._text)} prompts"
                )
            features = torch.stack([torch.as_tensor(self._text[p]) for p in prompts])
        else:
            features = features_of(self._text(prompts))
        self._check(features, len(prompts), "text")
        return features.to(self.device)

    def _check(self, features: Tensor, rows: int, tower: str) -> None:
        if tuple(features.shape) != (rows, self.embed_dim):
            raise ModelError(
                f"{tower}: expected features ({rows}, {self.embed_dim}), got "
                f"{tuple(features.shape)}; is embed_dim={self.embed_dim} right?"
            )


def _is_function(text: object) -> bool:
    return not isinstance(text, (nn.Module, Mapping))


def _text_vectors(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prompt: torch.as_tensor(vector) for prompt, vector in text.items()}
