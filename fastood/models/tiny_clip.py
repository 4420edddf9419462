"""The small CLIP that ships with fastood: for the demo and for tests, never for real use.

Its file keeps only the token rows that training touched. The loader puts them back into a table of
the full CLIP vocabulary, so the model is an ordinary open_clip ``CLIP`` (registered there under the
name ``fastood-tiny``) that reads any prompt; ``untrained_tokens`` says which words mean nothing
to it. What it was trained on stands in ``tiny/MODEL_CARD.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastood.errors import WeightsUnavailable
from fastood.models.catalogue import TINY
from fastood.models.common import seeded
from fastood.models.files import load_strict, read_state_dict

__all__ = ["FOLDER", "IDS", "ROWS", "TABLE", "load_tiny", "untrained_rows", "untrained_tokens"]

FOLDER = Path(__file__).parent / "tiny"
TABLE = "token_embedding.weight"
ROWS, IDS = "token_embedding.trained_rows", "token_embedding.trained_ids"


def load_tiny(
    folder: Path | None = None,
) -> tuple[nn.Module, Callable[[Any], Tensor], Callable[..., Tensor]]:
    """The open_clip model in float32 on the CPU, its preprocessing and its tokenizer.

    ``folder`` holds ``fastood-tiny.json``, ``config.json`` and ``model.safetensors``; default: the
    files of the package. Deterministic; the global random state is left alone.

    Raises:
        WeightsUnavailable: if a file is missing from the installation.
        ModelError: if the weights do not fit the configuration in every name and shape.
    """
    import open_clip

    folder = FOLDER if folder is None else Path(folder)
    config = _config(folder)
    model_config = _registered(folder)
    state = read_state_dict(folder / "model.safetensors")
    state = {k: v if k == IDS else v.float() for k, v in state.items()}
    rows, ids = state.pop(ROWS), state.pop(IDS).long()
    text = model_config["text_cfg"]
    table = untrained_rows(text["vocab_size"], text["width"], **config["untrained_rows"])
    state[TABLE] = table.index_copy(0, ids, rows)
    with seeded(0):
        model = open_clip.CLIP(**model_config)
    load_strict(model, state, str(folder))
    picture = config["preprocess_cfg"]
    preprocess = open_clip.image_transform(
        picture["size"],
        is_train=False,
        mean=tuple(picture["mean"]),
        std=tuple(picture["std"]),
        resize_mode=picture["resize_mode"],
        interpolation=picture["interpolation"],
    )
    return model.eval(), preprocess, _tokenizer(text["context_length"])


def untrained_rows(count: int, width: int, *, seed: int, std: float) -> Tensor:
    """(count, width) float32 rows for tokens without training: uniform, of the given deviation.

    Small random rows rather than zeros, so that two unknown words do not become one class. Drawn
    from the raw bits of PCG64, which numpy keeps equal in all versions and on all machines.
    """
    bits = np.random.PCG64(seed).random_raw(count * width)
    unit = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    values = (unit - np.float32(0.5)) * np.float32(std * 12**0.5)
    return torch.from_numpy(values.reshape(count, width))


def untrained_tokens(prompts: Sequence[str]) -> list[str]:
    """A warning if prompts hold words the tiny model never saw in training, else nothing."""
    words: dict[str, None] = {}
    touched: list[str] = []
    for prompt in prompts:
        new = _unknown(prompt)
        if new:
            touched.append(prompt)
            words.update(dict.fromkeys(new))
    if not words:
        return []
    shown = ", ".join(repr(w) for w in list(words)[:8]) + (", ..." if len(words) > 8 else "")
    return [
        f"{TINY} was never trained on {shown} (in {len(touched)} of {len(prompts)} prompts, first: "
        f"{touched[0][:60]!r}); what it says about them means nothing. Use a real CLIP, for "
        f"example ViT-B-16/openai, for classes other than those in its model card"
    ]


def _unknown(prompt: str) -> list[str]:
    """Words and word pieces of a prompt whose tokens have no trained row."""
    tokenizer, known = _tokenizer(), _trained_ids()
    return [
        tokenizer.decoder[token].replace("</w>", "")
        for token in tokenizer.encode(prompt)
        if token not in known
    ]


@cache
def _trained_ids() -> frozenset[int]:
    return frozenset(read_state_dict(FOLDER / "model.safetensors")[IDS].tolist())


@cache
def _tokenizer(context_length: int = 77) -> Any:
    import open_clip

    return open_clip.SimpleTokenizer(context_length=context_length)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsUnavailable(
            f"{TINY}: {path} is missing; the installation is incomplete, reinstall fastood"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _registered(folder: Path) -> dict[str, Any]:
    """The architecture, as open_clip knows it after it was told about it once."""
    import open_clip

    path = folder / f"{TINY}.json"
    own = json.loads(path.read_text(encoding="utf-8"))
    if open_clip.get_model_config(TINY) != own:
        open_clip.add_model_config(path)
    return own
