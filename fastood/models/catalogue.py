"""Which models can be named, and which of them are already on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

__all__ = ["TINY", "ModelInfo", "list_models", "near"]

TINY = "fastood-tiny"


@dataclass(frozen=True)
class ModelInfo:
    """One model that ``load_model`` knows by name.

    Attributes:
        name: what to pass, ``"ViT-B-16/openai"``.
        architecture, pretrained: its two halves.
        source: Hub repository or address of the weights; ``"package"`` for the bundled model.
        cached: weights are on this machine.
        bundled: ships with fastood.
    """

    name: str
    architecture: str
    pretrained: str
    source: str
    cached: bool
    bundled: bool = False


def list_models(*, cached_only: bool = False, cache_dir: str | None = None) -> list[ModelInfo]:
    """The bundled model, then every open_clip architecture with published weights.

    Looks at the local cache only, never at the network. Local checkpoints, ``hf-hub:``, ``hf:`` and
    ``timm:`` names work too but cannot be enumerated.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    from fastood.models.files import cached_hub_file
    from fastood.models.openclip_load import weight_names

    found = [ModelInfo(TINY, TINY, "", "package", cached=True, bundled=True)]
    for architecture, tag in open_clip.list_pretrained():
        config = get_pretrained_cfg(architecture, tag)
        hub, url = config.get("hf_hub", ""), config.get("url", "")
        if hub:
            source, _, filename = hub.rpartition("/")
            here = cached_hub_file(source, weight_names(filename), cache_dir) is not None
        else:
            source = url
            folder = Path(cache_dir) if cache_dir else Path("~/.cache/clip").expanduser()
            here = bool(url) and (folder / url.rpartition("/")[2]).is_file()
        if here or not cached_only:
            found.append(ModelInfo(f"{architecture}/{tag}", architecture, tag, source, here))
    return found


def near(name: str, known: list[str], count: int = 4) -> str:
    """``" Did you mean ...?"`` for the known names closest to ``name``, or nothing."""
    lower = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), list(lower), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(lower[c] for c in close)}?" if close else ""
