"""open_clip models by name and tag, from a folder, or from the Hub.

The network is built from its configuration and filled from a file that fastood reads itself, so
that nothing is unpickled, no tag is guessed, and no name yields random weights unasked.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastood.errors import ModelError, WeightsUnavailable
from fastood.models import files
from fastood.models.common import seeded
from fastood.models.openclip import OpenClipEncoder

__all__ = ["load_folder", "load_hub", "load_named", "weight_names"]

_CONFIG = "open_clip_config.json"
_DEFAULT_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def weight_names(filename: str) -> tuple[str, ...]:
    """File names to look for in a repository, safetensors first."""
    if not filename:
        return _DEFAULT_WEIGHTS
    path = Path(filename)
    if path.suffix == ".safetensors":
        return (filename,)
    if path.name == "open_clip_pytorch_model.bin":
        return _DEFAULT_WEIGHTS
    return (str(path.with_suffix(".safetensors")), filename)


def load_named(
    architecture: str,
    tag: str | None,
    *,
    name: str,
    checkpoint: str | Path | None,
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool,
    quick_gelu: bool | None,
    preprocess: Any,
    tokenizer: Any,
    cache_dir: str | None,
    seed: int,
) -> OpenClipEncoder:
    """A model of open_clip's own list; see ``load_model`` for the arguments."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    config = copy.deepcopy(open_clip.get_model_config(architecture))
    random = tag == "random"
    tag_config = {} if random or tag is None else dict(get_pretrained_cfg(architecture, tag))
    state: dict[str, Tensor] | None = None
    if checkpoint is not None:
        state = files.read_state_dict(checkpoint, allow_pickle=allow_pickle)
    elif not random:
        path = _tag_file(name, tag_config, allow_pickle=allow_pickle, cache_dir=cache_dir)
        state = files.read_state_dict(path, allow_pickle=allow_pickle)
    _set_activation(config, architecture, tag, tag_config, checkpoint is not None, quick_gelu)
    return _encoder(
        config,
        state,
        name=name,
        source=str(checkpoint or name),
        preprocess_config=tag_config,
        siglip=architecture if "siglip" in architecture.lower() else None,
        device=device,
        dtype=dtype,
        preprocess=preprocess,
        tokenizer=tokenizer,
        cache_dir=cache_dir,
        seed=seed,
    )


def load_folder(
    folder: Path,
    *,
    name: str,
    checkpoint: str | Path | None,
    allow_pickle: bool,
    **options: Any,
) -> OpenClipEncoder:
    """A folder with ``open_clip_config.json`` and weights, as open_clip publishes them."""
    config = _read_config(folder / _CONFIG)
    if checkpoint is None:
        found = [folder / n for n in _DEFAULT_WEIGHTS if (folder / n).is_file()]
        found = found or sorted(folder.glob("*.safetensors"))
        if not found:
            raise WeightsUnavailable(
                f"{folder}: holds {_CONFIG} but no weights "
                f"(looked for {', '.join(_DEFAULT_WEIGHTS)} and *.safetensors)"
            )
        checkpoint = found[0]
    return _encoder(
        config["model_cfg"],
        files.read_state_dict(checkpoint, allow_pickle=allow_pickle),
        name=name,
        source=str(checkpoint),
        preprocess_config=config.get("preprocess_cfg", {}),
        siglip=None,
        tokenizer_source=str(folder),
        **options,
    )


def load_hub(
    repo: str, *, name: str, checkpoint: str | Path | None, allow_pickle: bool, **options: Any
) -> OpenClipEncoder:
    """A Hub repository in open_clip format."""
    cache_dir = options.get("cache_dir")
    config = _read_config(Path(files.hub_file(repo, [_CONFIG], cache_dir=cache_dir)))
    path = checkpoint or files.hub_file(repo, _DEFAULT_WEIGHTS, cache_dir=cache_dir)
    return _encoder(
        config["model_cfg"],
        files.read_state_dict(path, allow_pickle=allow_pickle),
        name=name,
        source=str(checkpoint or repo),
        preprocess_config=config.get("preprocess_cfg", {}),
        siglip=None,
        **options,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a readable open_clip configuration ({error})") from error
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise ModelError(f"{path}: expected an object with 'model_cfg', as open_clip writes it")
    return config


def _set_activation(
    config: dict[str, Any],
    architecture: str,
    tag: str | None,
    tag_config: dict[str, Any],
    has_checkpoint: bool,
    quick_gelu: bool | None,
) -> None:
    """Take the activation the weights were trained with.

    A tag states it; open_clip itself only warns when the architecture's name says otherwise, and
    computes with the wrong one ("ViT-B-16" with "openai").
    """
    import open_clip

    if quick_gelu is not None:
        config["quick_gelu"] = quick_gelu
    elif tag_config:
        # older open_clip does not say so of OpenAI's own weights
        default = tag == "openai" or architecture.endswith("-quickgelu")
        config["quick_gelu"] = bool(tag_config.get("quick_gelu", default))
    elif has_checkpoint and f"{architecture}-quickgelu" in open_clip.list_models():
        warnings.warn(
            f"checkpoint for {architecture} without a pretrained tag: computing with GELU. If "
            f"these are OpenAI (or other QuickGELU) weights, name the model "
            f"'{architecture}-quickgelu' or '{architecture}/openai', or pass quick_gelu=True; "
            f"quick_gelu=False silences this",
            stacklevel=4,
        )


def _tag_file(
    name: str, tag_config: dict[str, Any], *, allow_pickle: bool, cache_dir: str | None
) -> str:
    """Path of the weights of a pretrained tag, downloaded if need be."""
    hub, url = tag_config.get("hf_hub", ""), tag_config.get("url", "")
    if hub:
        repo, _, filename = hub.rpartition("/")
        return files.hub_file(repo, weight_names(filename), cache_dir=cache_dir)
    files.check_readable_format(url, allow_pickle=allow_pickle)  # before, not after, the download
    from open_clip.pretrained import download_pretrained_from_url

    try:
        return download_pretrained_from_url(url, cache_dir=cache_dir)
    except Exception as error:  # urllib's errors, and open_clip's RuntimeError on a bad checksum
        raise files.unavailable(name, error) from error


def _encoder(
    config: dict[str, Any],
    state: dict[str, Tensor] | None,
    *,
    name: str,
    source: str,
    preprocess_config: dict[str, Any],
    siglip: str | None,
    device: torch.device,
    dtype: torch.dtype,
    preprocess: Any,
    tokenizer: Any,
    cache_dir: str | None,
    seed: int,
    tokenizer_source: str | None = None,
) -> OpenClipEncoder:
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    if tokenizer is None:
        tokenizer = _tokenizer(config, siglip, tokenizer_source, cache_dir)
    try:
        with seeded(seed):
            model = _build(config, dtype)
    except OSError as error:  # a Hugging Face text tower whose configuration is not here
        raise files.unavailable(name, error) from error
    if state is not None:
        files.load_strict(model, _as_open_clip(model, state), source)
    if preprocess is None:
        visual_size = {"size": getattr(model.visual, "image_size", None)}
        settings = merge_preprocess_dict(PreprocessCfg(), preprocess_config)
        settings = merge_preprocess_dict(settings, visual_size)
        preprocess = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return OpenClipEncoder(model.to(device), preprocess, tokenizer, name=name)


def _build(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The untrained network, in open_clip's mixed precision for half types (norms in float32)."""
    import open_clip

    config = copy.deepcopy(config)
    text, vision = config["text_cfg"], config["vision_cfg"]
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False  # the checkpoint brings these weights
    timm = "timm_model_name" in vision
    if timm:
        vision["timm_model_pretrained"] = False
    if not custom:
        kind: Any = open_clip.CLIP
    else:
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    half = dtype in (torch.float16, torch.bfloat16)
    model = kind(**config, cast_dtype=dtype if half else None)
    if half and not timm:
        open_clip.convert_weights_to_lp(model, dtype=dtype)
    elif half:
        from open_clip.transformer import LayerNormFp32

        model = model.to(dtype)
        for module in model.modules():
            if isinstance(module, LayerNormFp32):
                module.float()
    else:
        model = model.to(dtype)
    return model


def _as_open_clip(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes of older or foreign checkpoints in today's spelling."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = dict(convert_state_dict(model, dict(state)))
    for key in ("input_resolution", "context_length", "vocab_size"):  # OpenAI's own files
        state.pop(key, None)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    ids = "text.transformer.embeddings.position_ids"
    if ids not in own:
        state.pop(ids, None)
    return state


def _tokenizer(
    config: dict[str, Any], siglip: str | None, source: str | None, cache_dir: str | None
) -> Any:
    from open_clip import tokenizer as kinds

    text = config.get("text_cfg", {})
    context = text.get("context_length", kinds.DEFAULT_CONTEXT_LENGTH)
    options = dict(text.get("tokenizer_kwargs") or {})
    hub_name = text.get("hf_tokenizer_name")
    if hub_name or siglip:
        try:
            if hub_name:
                folder = source if source and list(Path(source).glob("tokenizer*")) else hub_name
                mode = text.get("tokenizer_mode")
                if mode:
                    options["tokenizer_mode"] = mode
                if files.no_network() is not None:  # its client would retry for 20 s
                    options["local_files_only"] = True
                return kinds.HFTokenizer(
                    folder, context_length=context, cache_dir=cache_dir, **options
                )
            low = str(siglip).lower()
            kind = "gemma" if "siglip2" in low else "mc4" if "i18n" in low else "c4-en"
            return kinds.SigLipTokenizer(kind, context_length=context)
        except ImportError as error:
            raise ModelError(
                f"this model's tokenizer needs transformers: pip install 'fastood[hf]' ({error})"
            ) from error
        except Exception as error:  # OSError and several HTTP libraries' errors
            raise files.unavailable(f"tokenizer {hub_name or siglip}", error) from error
    return kinds.SimpleTokenizer(context_length=context, **options)
