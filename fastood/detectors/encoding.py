"""Images to features with whatever encoder a detector was given, one or many batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastood.features.featureset import FeatureSet
from fastood.models.base import Encoder, ImageFeatures

__all__ = ["encode", "feature_batches", "module_of", "split_batch"]

Batch = tuple[Tensor, Tensor | None, Tensor | None]


def module_of(encoder: Any) -> nn.Module | None:
    """The network behind a callable: itself, or the owner of a method such as ``encode_image``."""
    owner = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def encode(
    encoder: Any, images: Tensor, *, local: bool, device: torch.device | None
) -> ImageFeatures:
    """Features of one batch from an ``Encoder`` or any callable.

    Raises:
        ValueError: without an encoder, or if patch features are needed and do not come.
    """
    if encoder is None:
        raise ValueError(
            "encoder: this detector was made without one; use predict_features(features), or give "
            "an encoder (an Encoder, or a function from images to features)"
        )
    if isinstance(encoder, Encoder):
        return encoder.encode_image(images, local=local)
    network = module_of(encoder)
    if network is not None:
        if network.training:
            warnings.warn(
                "encoder: the network is in training mode, so dropout and batch statistics may "
                "change its features; call .eval() on it",
                stacklevel=4,
            )
        first = next(network.parameters(), None)
        device = device if first is None else first.device
    if isinstance(images, Tensor) and device is not None:
        images = images.to(device)
    output = encoder(images)
    features, patches = _parts(output)
    if local and patches is None:
        raise ValueError(
            "encoder: this score needs patch features; expected a pair (image (B, D), "
            f"local (B, P, D)), got {type(output).__name__}"
        )
    return ImageFeatures(features, patches if local else None)


def _parts(output: Any) -> tuple[Tensor, Tensor | None]:
    from fastood.models.common import features_of

    features = features_of(output)
    if features.ndim > 2 and features[0].numel() == features.shape[1]:
        features = features.flatten(1)  # (B, D, 1, 1), what pooling layers leave
    pair = isinstance(output, (tuple, list)) and len(output) > 1 and isinstance(output[1], Tensor)
    return features, output[1] if pair else None


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and labels of what a loader yields: a tensor, ``(x, y, ...)``, or a dict.

    Dicts may use OpenOOD's keys ``data`` and ``label``, or ``image`` and ``label``.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        for key in ("data", "image"):
            if key in batch:
                return batch[key], batch.get("label")
        raise ValueError(f"batch: expected the key 'data' or 'image', got {', '.join(batch)}")
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0], batch[1] if len(batch) > 1 else None
    raise TypeError(
        "batch: expected images, (images, labels) or a dict with 'data', "
        f"got {type(batch).__name__}"
    )


def feature_batches(
    source: Any,
    encode_images: Callable[[Tensor], ImageFeatures] | None,
    *,
    local: bool,
    id_only: bool = False,
) -> Iterator[Batch]:
    """(features, local or None, labels or None) of features, images, a FeatureSet or a loader.

    Args:
        encode_images: None where batches already are features.
        id_only: leave out what is labelled as OOD (label < 0), before it is encoded.
    """
    if isinstance(source, FeatureSet):
        labels = None if source.labels is None else torch.as_tensor(source.labels)
        for chunk in source.blocks():
            rows = slice(chunk.start, chunk.start + len(chunk.image))
            yield chunk.image, chunk.local if local else None, _rows(labels, rows)
        return
    if isinstance(source, Tensor):
        if source.ndim != 2 and encode_images is not None:
            yield *encode_images(source), None
        else:
            yield source, None, None
        return
    if isinstance(source, (str, Mapping)) or not isinstance(source, Iterable):
        raise TypeError(
            "expected features (B, D), images (B, 3, H, W), a FeatureSet or a loader of batches, "
            f"got {type(source).__name__}"
        )
    for batch in source:
        x, y = split_batch(batch)
        y = None if y is None else torch.as_tensor(y)
        if id_only and y is not None:
            known = y >= 0
            x, y = x[known.to(x.device)], y[known]
            if not len(x):
                continue
        if encode_images is None:
            yield x, None, y
        else:
            yield *encode_images(x), y


def _rows(labels: Tensor | None, rows: slice) -> Tensor | None:
    return None if labels is None else labels[rows]
