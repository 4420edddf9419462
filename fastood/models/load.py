"""From a name to an encoder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastood.errors import ModelError, WeightsUnavailable
from fastood.models.base import Encoder
from fastood.models.catalogue import TINY, near
from fastood.models.common import as_device, as_dtype

__all__ = ["load_model"]

_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def load_model(
    name: str,
    *,
    pretrained: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    allow_pickle: bool = False,
    quick_gelu: bool | None = None,
    preprocess: Callable[[Any], Tensor] | None = None,
    tokenizer: Any = None,
    cache_dir: str | None = None,
    seed: int = 0,
) -> Encoder:
    """A frozen network, ready to encode.

    ======================  ========================================================================
    ``name``                what is loaded
    ======================  ========================================================================
    ``ViT-B-16/openai``     open_clip architecture and pretrained tag (``pretrained=`` works too);
                            with the tag's own activation, so ``-quickgelu`` need not be added
    ``ViT-B-16``            the architecture, with ``checkpoint="weights.safetensors"``
    a folder                ``open_clip_config.json`` or a Hugging Face ``config.json`` and weights
    ``hf-hub:org/name``     a Hub repository in open_clip format
    ``hf:org/name``         a Hugging Face ``CLIPModel`` or ``SiglipModel``, or an image classifier
                            (``...ForImageClassification``); also ``hf:folder``
    ``timm:resnet50.a1_in1k``  a timm classifier, for scores on its own classes
    ``fastood-tiny``        the small model that ships with fastood; never needs a network
    ======================  ========================================================================

    Args:
        pretrained: tag of the published weights; ``"random"`` for untrained ones (for tests).
        checkpoint: weights to use instead. With a tag as well, the tag's preprocessing and
            activation apply to the file.
        device: default: the current GPU if there is one, else the CPU.
        dtype: float32, bfloat16 or float16, or their names. open_clip models keep their norms in
            float32, as open_clip does.
        allow_pickle: read ``.pt``, ``.pth`` and ``.bin`` files too, always with
            ``weights_only=True``. Otherwise only safetensors files are read.
        quick_gelu: force (or forbid) OpenAI's activation in an open_clip model.
        preprocess, tokenizer: replace the model's own.
        cache_dir: where downloaded weights are looked for and kept; default: the libraries' own.
        seed: of the weights under ``pretrained="random"``.
    Raises:
        ModelError: unknown name (with close ones), checkpoint that does not fit or is pickled.
        WeightsUnavailable: weights neither here nor reachable, with what works offline.
        ValueError: arguments that contradict each other.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError("name: expected a model name such as 'ViT-B-16/openai', got nothing")
    name = name.strip()
    if pretrained is not None and checkpoint is None and _looks_like_file(pretrained):
        checkpoint, pretrained = pretrained, None
    where: dict[str, Any] = {"device": as_device(device), "dtype": as_dtype(dtype)}
    path = None if checkpoint is None else Path(checkpoint)
    common: dict[str, Any] = {
        **where,
        "allow_pickle": allow_pickle,
        "preprocess": preprocess,
        "cache_dir": cache_dir,
        "seed": seed,
    }
    if pretrained == "random":
        if path is not None:
            raise ValueError("pretrained: 'random' and a checkpoint exclude each other")
        warnings.warn(
            f"{name}: untrained weights (pretrained='random'); scores mean nothing", stacklevel=2
        )
    if name == TINY:
        _refuse(name, pretrained=pretrained, checkpoint=path)
        return _tiny(**where)
    if name.startswith("timm:"):
        from fastood.models.timm_classifier import load_timm

        return load_timm(
            name[len("timm:") :], name=name, pretrained=pretrained, checkpoint=path, **common
        )
    folder = Path(name.removeprefix("hf:").removeprefix("local-dir:"))
    if name.startswith("hf:") or (folder / "config.json").is_file():
        from fastood.models.hf import load_hf
        from fastood.models.hf_classifier import is_classifier, load_hf_classifier

        _refuse(name, checkpoint=path, pretrained=None if pretrained == "random" else pretrained)
        source = name.removeprefix("hf:")
        random = pretrained == "random"
        if is_classifier(source, cache_dir=cache_dir):
            _refuse(name, tokenizer=tokenizer)
            return load_hf_classifier(source, name=name, random=random, **common)
        return load_hf(source, name=name, random=random, tokenizer=tokenizer, **common)
    return _open_clip(
        name, folder, pretrained, path, quick_gelu, {**common, "tokenizer": tokenizer}
    )


def _open_clip(
    name: str,
    folder: Path,
    pretrained: str | None,
    checkpoint: Path | None,
    quick_gelu: bool | None,
    options: dict[str, Any],
) -> Encoder:
    from fastood.models import openclip_load

    if (folder / "open_clip_config.json").is_file():
        _refuse(name, pretrained=pretrained, quick_gelu=quick_gelu)
        return openclip_load.load_folder(folder, name=name, checkpoint=checkpoint, **options)
    if name.startswith("hf-hub:"):
        _refuse(name, pretrained=pretrained, quick_gelu=quick_gelu)
        repo = name[len("hf-hub:") :]
        return openclip_load.load_hub(repo, name=name, checkpoint=checkpoint, **options)
    if _looks_like_file(name):
        raise ModelError(
            f"name: {name} is a checkpoint; say which architecture it belongs to, "
            f"for example load_model('ViT-B-16', checkpoint={name!r})"
        )
    if folder.is_dir():
        raise WeightsUnavailable(
            f"{name}: this folder holds neither open_clip_config.json nor config.json; "
            f"for a bare weights file use load_model(architecture, checkpoint=file)"
        )
    architecture, tag = _split(name, pretrained)
    if tag is None and checkpoint is None:
        raise ModelError(_no_weights(architecture))
    shown = architecture if tag is None else f"{architecture}/{tag}"
    if checkpoint is not None:
        shown = f"{shown}@{checkpoint.name}"
    return openclip_load.load_named(
        architecture, tag, name=shown, checkpoint=checkpoint, quick_gelu=quick_gelu, **options
    )


def _split(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """Architecture and tag; also OpenAI's spelling of architectures, ``ViT-B/16``."""
    import open_clip

    known = open_clip.list_models()
    if name.replace("/", "-") in known:
        architecture, tag = name.replace("/", "-"), None
    else:
        head, _, last = name.rpartition("/")
        architecture, tag = head.replace("/", "-"), last
        if architecture not in known:
            from fastood.models.catalogue import list_models

            names = [TINY, *known, *(m.name for m in list_models())]
            raise ModelError(
                f"name: no model is called {name!r}.{near(name, names)} `fastood models` lists "
                f"them all; hf-hub:, hf: and timm: names and folders work too"
            )
    if tag is not None and pretrained is not None and tag != pretrained:
        raise ValueError(f"pretrained: {pretrained!r} contradicts the tag in {name!r}")
    tag = tag if tag is not None else pretrained
    if tag is None or tag == "random":
        return architecture, tag
    from open_clip.pretrained import is_pretrained_cfg

    if not is_pretrained_cfg(architecture, tag):
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        named = [f"{architecture}/{t}" for t in tags]
        offered = f"it has {', '.join(tags)}" if tags else "none are published for it"
        raise ModelError(
            f"pretrained: {architecture} has no weights called {tag!r}."
            f"{near(f'{architecture}/{tag}', named)} Of {architecture}, {offered}"
        )
    return architecture, tag.lower().replace("-", "_")


def _no_weights(architecture: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tags:
        tags = open_clip.list_pretrained_tags_by_model(architecture.removesuffix("-quickgelu"))
    offered = f"{architecture}/{tags[0]} ({', '.join(tags)})" if tags else "none published"
    return (
        f"pretrained: {architecture} names a network, not its weights. Choose a tag: {offered}; or "
        f"pass checkpoint='weights.safetensors'; pretrained='random' gives untrained weights"
    )


def _tiny(device: torch.device, dtype: torch.dtype) -> Encoder:
    """The bundled model, with its own warnings about words it never saw."""
    from fastood.models import tiny_clip
    from fastood.models.openclip import OpenClipEncoder

    model, preprocess, tokenizer = tiny_clip.load_tiny()

    def untrained(prompts: Any) -> list[str]:
        return list(tiny_clip.untrained_tokens(list(prompts)))

    return OpenClipEncoder(
        model, preprocess, tokenizer, name=TINY, device=device, dtype=dtype, warn=untrained
    )


def _looks_like_file(text: str) -> bool:
    return text.lower().endswith(_FILES) or Path(text).is_file()


def _refuse(name: str, **arguments: object) -> None:
    """Arguments that have no meaning for this kind of name are errors, not silently dropped."""
    given = [f"{k}={v!s}" for k, v in arguments.items() if v is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: has no meaning for {name}, which brings its own")
