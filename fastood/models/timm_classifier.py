"""timm image classifiers (optional dependency)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models import files
from fastood.models.classifier import ClassifierEncoder, ClassifierHead
from fastood.models.common import module_device, module_dtype, seeded
from fastood.models.fingerprint import Fingerprint, describe_callable

__all__ = ["ClassifierHead", "TimmEncoder", "load_timm"]


class TimmEncoder(ClassifierEncoder):
    """A timm classifier. There are no text and no local features: classes are the head's own.

    Args:
        model: a timm model with a classifier; it is set to evaluation mode.
        preprocess: default: the transform of the model's own configuration.
        class_names: names of the head's classes, where known.
        name, preprocess_id, device, dtype: as in ``OpenClipEncoder``.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Tensor] | None = None,
        *,
        name: str = "timm model",
        class_names: Sequence[str] | None = None,
        preprocess_id: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if device is not None or dtype is not None:
            model = model.to(device=device, dtype=dtype)
        self.model = cast(Any, model.eval())
        self.name = name
        self.device, self.dtype = module_device(model), module_dtype(model)
        config = _data_config(model)
        if preprocess is None:
            from timm.data import create_transform

            preprocess = create_transform(**config, is_training=False)
        self.preprocess: Callable[[Any], Tensor] = preprocess
        self.preprocess_id = preprocess_id or describe_callable(preprocess)
        self.class_names = None if class_names is None else tuple(class_names)
        self.input_size = tuple(config["input_size"])
        self._find_head()
        pretrained = getattr(model, "pretrained_cfg", None) or {}
        self._fingerprint = Fingerprint(
            model,
            {
                "library": "timm",
                "kind": pretrained.get("architecture", type(model).__name__),
                "pool": getattr(model, "global_pool", None),
            },
        )

    def classifier(self) -> nn.Module:
        layer = self.model.get_classifier()
        if not isinstance(layer, nn.Module) or isinstance(layer, nn.Identity):
            raise ModelError(f"{self.name} has no classifier; use CallableEncoder for its features")
        return layer

    def _features(self, pixels: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)

    def _logits(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)


def _data_config(model: Any) -> dict[str, Any]:
    """Preprocessing settings; a transformer built for another size than published wins."""
    from timm.data import resolve_data_config

    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    chosen = {} if size is None else {"input_size": (3, *size)}
    return resolve_data_config(chosen, model=model)


def load_timm(
    architecture: str,
    *,
    name: str,
    pretrained: str | None,
    checkpoint: str | Path | None,
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool,
    preprocess: Any,
    cache_dir: str | None,
    seed: int,
) -> TimmEncoder:
    """A timm classifier by name; ``pretrained`` is a timm tag, ``"default"`` or ``"random"``."""
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"{name} needs timm: pip install timm ({error})") from error
    from difflib import get_close_matches

    base, _, tag = architecture.partition(".")
    if not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), n=4)
        raise ModelError(
            f"name: timm knows no model {base!r}"
            + (f"; near: {', '.join('timm:' + n for n in near)}" if near else "")
        )
    if pretrained not in (None, "default", "random"):
        tag = str(pretrained)
    full = f"{base}.{tag}" if tag else base
    state: dict[str, Tensor] | None = None
    if checkpoint is not None:
        state = files.read_state_dict(checkpoint, allow_pickle=allow_pickle)
    options: dict[str, Any] = {}
    if state is not None:
        options = _classes(state, timm, full)
    elif pretrained != "random":
        path = _published(timm, full, name, allow_pickle, cache_dir)
        if path.endswith(".safetensors"):
            # timm renames old parameters while it loads its own weights, and does so strictly
            options = {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}
        else:
            state = files.read_state_dict(path, allow_pickle=allow_pickle)
    try:
        with seeded(seed):
            model = timm.create_model(full, **{"pretrained": False, **options})
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"name: timm cannot build {full!r}: {error}") from error
    if state is not None:
        files.load_strict(model, state, str(checkpoint or name))
    return TimmEncoder(
        model,
        preprocess,
        name=name,
        class_names=_imagenet_names(model) if checkpoint is None else None,
        device=device,
        dtype=dtype,
    )


def _classes(state: dict[str, Tensor], timm: Any, name: str) -> dict[str, Any]:
    """Number of classes of a fine-tuned checkpoint, read off its classifier's bias or weight."""
    classifier = (timm.get_pretrained_cfg(name).to_dict() or {}).get("classifier")
    if isinstance(classifier, str):
        for part in ("bias", "weight"):
            found = state.get(f"{classifier}.{part}")
            if found is not None:
                return {"num_classes": int(found.shape[0])}
    return {}


def _published(timm: Any, full: str, name: str, allow_pickle: bool, cache_dir: str | None) -> str:
    """Path of the weights timm publishes for a model, downloaded if need be."""
    config = timm.get_pretrained_cfg(full)
    repo = None if config is None else config.hf_hub_id
    if not repo:
        raise ModelError(f"{name}: timm publishes no weights on the Hub for it; pass checkpoint=")
    names = ["model.safetensors"] + (["pytorch_model.bin"] if allow_pickle else [])
    return files.hub_file(repo, names, cache_dir=cache_dir)


def _imagenet_names(model: Any) -> list[str] | None:
    """Class names, where timm knows which ImageNet subset the weights were trained on."""
    try:
        from timm.data import ImageNetInfo, infer_imagenet_subset
    except ImportError:  # older timm: results then show class numbers
        return None
    subset = infer_imagenet_subset(model)
    if not subset:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]
