"""Hugging Face ``CLIPModel`` and ``SiglipModel`` as encoders (extra ``hf``)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models import files
from fastood.models import local as paths
from fastood.models.base import Encoder, ImageFeatures, TextSupport
from fastood.models.common import (
    PROMPT_PROBE,
    TOKENIZER_PROBE,
    cut_prompts,
    features_of,
    module_device,
    module_dtype,
    seeded,
)
from fastood.models.fingerprint import Fingerprint, describe_callable
from fastood.prompts.packed import TextPass
from fastood.scores.inputs import working

__all__ = ["HFEncoder", "ProcessorTransform", "load_hf"]

_SIGLIP_LOCAL = (
    "SigLIP pools its patches with an attention head (MAP) that has no class token, "
    "so patches have no path of their own into the joint space"
)


class ProcessorTransform:
    """A Hugging Face image processor as a transform of one image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    def __repr__(self) -> str:
        import json

        settings = {k: v for k, v in self.processor.to_dict().items() if k != "_processor_class"}
        text = json.dumps(settings, sort_keys=True, default=str)
        return f"{type(self.processor).__name__}({text})"


class HFEncoder(Encoder):
    """A ``CLIPModel`` (global, local and text features) or ``SiglipModel`` (no local features).

    Args:
        model: the model; it is set to evaluation mode.
        preprocess: ``PIL.Image`` → ``(3, H, W)``, for example ``ProcessorTransform(processor)``.
        tokenizer: a Hugging Face tokenizer.
        name, preprocess_id, device, dtype: as in ``OpenClipEncoder``.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Tensor],
        tokenizer: Any,
        *,
        name: str = "Hugging Face model",
        preprocess_id: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in ("clip", "siglip") or not hasattr(model, "get_image_features"):
            raise ModelError(
                f"{name}: expected a CLIPModel or SiglipModel, got {type(model).__name__} "
                f"(model_type {kind!r}); other networks fit in CallableEncoder"
            )
        if device is not None or dtype is not None:
            model = model.to(device=device, dtype=dtype)
        self.model = cast(Any, model.eval())
        self.name = name
        self.preprocess = preprocess
        self.preprocess_id = preprocess_id or describe_callable(preprocess)
        self.tokenizer = tokenizer
        self.device, self.dtype = module_device(model), module_dtype(model)
        config = self.model.config
        vision, text = config.vision_config, config.text_config
        self._clip = kind == "clip"
        self.embed_dim = int(config.projection_dim if self._clip else vision.hidden_size)
        self.logit_scale = float(working(self.model.logit_scale.detach()).exp())
        bias = getattr(self.model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias.detach().float())
        self.no_local = None if self._clip else _SIGLIP_LOCAL
        if self._clip:
            self.num_patches = (vision.image_size // vision.patch_size) ** 2
        self._context = int(text.max_position_embeddings)
        eos = getattr(text, "eos_token_id", None)
        self._eos = eos if isinstance(eos, int) else -1
        probe = self.tokenize([TOKENIZER_PROBE])[0]
        if int(probe.max()) >= text.vocab_size:
            raise ModelError(
                f"{name}: expected token ids below {text.vocab_size}, the size of the text tower's "
                f"vocabulary, got {int(probe.max())}; is the tokenizer that of another model?"
            )
        self._text = TextPass(model, self.encode_tokens, self._probe_prompts)
        self.text = TextSupport(self._context, self._text.usable)
        self._fingerprint = Fingerprint(
            model,
            {
                "library": "transformers",
                "kind": kind,
                "image": _keep(vision),
                "text": {**_keep(text), "eos_token_id": self._eos},
                "tokens": probe.tolist(),
            },
        )

    @property
    def fingerprint(self) -> str:
        return self._fingerprint()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, *, local: bool = False) -> ImageFeatures:
        pixels = self._checked(pixels, local=local)
        if not len(pixels):
            return self._nothing(local=local)
        if not local:
            return ImageFeatures(features_of(self.model.get_image_features(pixel_values=pixels)))
        tower = self.model.vision_model
        layer = tower.encoder.layers[-1]
        with paths.capture_input(layer) as last:
            image = features_of(self.model.get_image_features(pixel_values=pixels))
        v = paths.hf_clip_block(layer, last())
        patches = self.model.visual_projection(tower.post_layernorm(v)[:, 1:])
        return ImageFeatures(image, patches)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        prompts = tuple(prompts)
        if not prompts:
            return self._nothing().image
        features = self._text(self.tokenize(prompts).to(self.device))
        self.text = TextSupport(self._context, self._text.usable)
        return features

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        out = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self._context,
            truncation=True,
            return_tensors="pt",
        )
        return out["input_ids"]

    def warn_prompts(self, prompts: Sequence[str]) -> list[str]:
        return cut_prompts(self.tokenize(prompts), prompts)

    def text_module(self) -> nn.Module:
        return self.model

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return features_of(self.model.get_text_features(input_ids=tokens))

    def _probe_prompts(self) -> Tensor:
        return self.tokenize(PROMPT_PROBE).to(self.device)


def _keep(config: Any) -> dict[str, Any]:
    """What the weights do not tell; a fixed list, so that a new transformers changes nothing."""
    names = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
    return {n: getattr(config, n) for n in names if hasattr(config, n)}


def load_hf(
    source: str,
    *,
    name: str,
    random: bool,
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool,
    preprocess: Any,
    tokenizer: Any,
    cache_dir: str | None,
    seed: int,
) -> HFEncoder:
    """A model from a local folder or the Hub; see ``load_model``."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{name} needs transformers: pip install 'fastood[hf]' ({error})"
        ) from error
    local = Path(source).is_dir()
    if not local:
        # answers from the cache, or fails in milliseconds without a network
        files.hub_file(source, ["config.json"], cache_dir=cache_dir)
    config = _reach(name, transformers.AutoConfig.from_pretrained, source, cache_dir=cache_dir)
    kinds = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}
    kind = kinds.get(config.model_type)
    if kind is None:
        raise ModelError(
            f"{name}: expected a CLIP or SigLIP model, got model_type {config.model_type!r}; "
            f"other networks fit in CallableEncoder"
        )
    if random:
        with seeded(seed):
            model = kind(config)
    else:
        model = _weights(kind, source, name, allow_pickle, cache_dir)
    if preprocess is None:
        auto = transformers.AutoImageProcessor
        preprocess = ProcessorTransform(
            _reach(name, auto.from_pretrained, source, cache_dir=cache_dir)
        )
    if tokenizer is None:
        tokens = transformers.AutoTokenizer
        tokenizer = _reach(name, tokens.from_pretrained, source, cache_dir=cache_dir)
    return HFEncoder(model, preprocess, tokenizer, name=name, device=device, dtype=dtype)


def _reach(name: str, read: Callable[..., Any], source: str, **options: Any) -> Any:
    try:
        return read(source, **options)
    except (OSError, ValueError) as error:
        raise files.unavailable(name, error) from error


def _weights(
    kind: Any, source: str, name: str, allow_pickle: bool, cache_dir: str | None
) -> nn.Module:
    """The model, from safetensors unless pickles are allowed, with every weight accounted for.

    transformers reads pickles with ``weights_only=True`` of its own accord in every version.
    """
    folder = Path(source)
    if folder.is_dir() and not allow_pickle and not list(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        if pickled:
            files.check_readable_format(folder / pickled[0], allow_pickle=False)
    from safetensors import SafetensorError

    try:
        model, info = _reach(
            name,
            kind.from_pretrained,
            source,
            cache_dir=cache_dir,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
        )
    except (RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        short = " ".join(str(error).split())[:200]
        raise ModelError(f"{name}: its weights cannot be used ({short})") from error
    missing = sorted(k for k in info["missing_keys"] if not k.endswith("position_ids"))
    if missing or info.get("mismatched_keys"):
        raise ModelError(
            f"{name}: the weights leave {len(missing)} parameter(s) random "
            f"({'; '.join(missing[:3])}); was the folder saved from another architecture?"
        )
    return model
