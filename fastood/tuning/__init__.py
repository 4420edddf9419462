"""Fine-tuning: losses, methods (CoOp, Tip-Adapter, LoRA, ...), the training loop, saved files.

    >>> from fastood.models import load_model
    >>> from fastood.tuning import build_method
    >>> method = build_method("coop", load_model("fastood-tiny"), ["cat", "dog"], n_ctx=4)

``fastood.fine_tune`` does everything from a folder of images to a file; ``train`` is its loop, for
data of your own. Names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastood.lazy import lazy_names

if TYPE_CHECKING:  # what type checkers and editors read; _MODULES says the same at run time
    from fastood.tuning.adaptation import Adapted, adapt
    from fastood.tuning.ebm import ebm_loss
    from fastood.tuning.fewshot import coop_split, few_shot
    from fastood.tuning.history import History
    from fastood.tuning.live import LiveImages
    from fastood.tuning.locoop import locoop_loss
    from fastood.tuning.loop import train
    from fastood.tuning.method import Batch, Method, Term
    from fastood.tuning.parallel import World
    from fastood.tuning.recipes import Recipe, default_top_k
    from fastood.tuning.registry import METHODS, build_method
    from fastood.tuning.state import load_method, read_header, save_method
    from fastood.tuning.views import FeatureData, FeatureViews

__all__ = [
    "METHODS",
    "Adapted",
    "Batch",
    "FeatureData",
    "FeatureViews",
    "History",
    "LiveImages",
    "Method",
    "Recipe",
    "Term",
    "World",
    "adapt",
    "build_method",
    "coop_split",
    "default_top_k",
    "ebm_loss",
    "few_shot",
    "load_method",
    "locoop_loss",
    "read_header",
    "save_method",
    "train",
]

_MODULES = {
    "adaptation": ("Adapted", "adapt"),
    "ebm": ("ebm_loss",),
    "fewshot": ("coop_split", "few_shot"),
    "history": ("History",),
    "live": ("LiveImages",),
    "locoop": ("locoop_loss",),
    "loop": ("train",),
    "method": ("Batch", "Method", "Term"),
    "parallel": ("World",),
    "recipes": ("Recipe", "default_top_k"),
    "registry": ("METHODS", "build_method"),
    "state": ("load_method", "read_header", "save_method"),
    "views": ("FeatureData", "FeatureViews"),
}
__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted(__all__)
