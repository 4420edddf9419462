"""The fine-tuning methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastood.models.base import Encoder
    from fastood.tuning.method import Method

__all__ = ["METHODS", "build_method", "method_class"]

METHODS: dict[str, str] = {
    "zoclip": "fastood.tuning.zero_shot:ZeroShot",
    "coop": "fastood.tuning.prompt_methods:CoOp",
    "cocoop": "fastood.tuning.cocoop:CoCoOp",
    "locoop": "fastood.tuning.prompt_methods:LoCoOp",
    "ebm": "fastood.tuning.prompt_methods:EBM",
    "clip-adapter": "fastood.tuning.clip_adapter:ClipAdapter",
    "tip": "fastood.tuning.tip:TipAdapter",
    "tip-f": "fastood.tuning.tip:TipAdapterF",
    "lora": "fastood.tuning.lora:LoRA",
    "setar-ft": "fastood.tuning.setar_ft:SeTARFT",
}
"""``module:class`` of each method, imported when it is asked for."""


def method_class(name: str) -> type[Method]:
    """The class behind a name of ``METHODS``.

    Raises:
        ValueError: on an unknown name, with the nearest known one.
    """
    if not isinstance(name, str) or name not in METHODS:
        near = difflib.get_close_matches(str(name).lower().replace("_", "-"), METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}{hint}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(module), attribute)
    return found


def build_method(
    name: str, encoder: Encoder, class_names: Sequence[str], **settings: Any
) -> Method:
    """A method by name, with the authors' defaults for settings not given.

    Args:
        name: one of ``METHODS``.
        encoder: the frozen network.
        class_names: K names.
        settings: of the method; see its class.
    Raises:
        ValueError: on an unknown name or setting, with the nearest known one.

    Example:
        >>> from fastood.models import load_model
        >>> method = build_method("coop", load_model("fastood-tiny"), ["cat", "dog"], n_ctx=4)
        >>> method.context.shape
        torch.Size([4, 128])
    """
    return method_class(name).build(encoder, class_names, **settings)
