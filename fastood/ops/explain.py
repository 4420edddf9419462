"""Which implementation would compute a call, in which precision, cut how, and why: in one line."""

from __future__ import annotations

import torch
from torch import Tensor

from fastood.errors import BuildError
from fastood.kernels.precision import resolve
from fastood.ops import dispatch, gpu, loader

__all__ = ["explain"]


def explain(
    image: Tensor,
    text: Tensor,
    *,
    family: str = "rows",
    prepared: bool = False,
    impl: str | None = None,
    precision: str | None = None,
) -> str:
    """What a score of ``image (B, D)`` and ``text (K, D)`` takes, without computing it.

    Args:
        family: ``"rows"``, ``"grouped"``, ``"patches"`` or ``"ebm"``; of patches ``image`` is
            flattened to (B P, D).
        prepared: ``text`` is that of a ``ClassBank``, whose dtype does not count.
    """
    try:
        name = dispatch.choose(impl, image, text, precision=precision)
    except (ValueError, BuildError) as error:
        return f"refused: {error}"
    source = "impl" if impl else "FASTOOD_IMPL"
    why = f"{source} asks for it" if dispatch.asked(impl) is not None else _why(name, image, text)
    if name in ("reference", "cpu"):
        return f"{name}, float32 products ({why})" if _single(image, text) else f"{name} ({why})"
    features = (image,) if prepared else (image, text)
    meant = resolve(precision, *features)
    how = "asked for" if precision is not None else f"features are {_names(*features)}"
    said = f"{name}, precision {meant} ({how})"
    (b, d), k = image.shape, len(text)
    if name == "cuda":
        return f"{said}: the library's product in row blocks, a kernel over its rows ({why})"
    if not gpu.fused_pays(family, meant, b, k, d):
        return f"{said}: the library's product in row blocks, measured faster here ({why})"
    return f"{said}: fused, {_cut(family, meant, b, d)} ({why})"


def _cut(family: str, precision: str, b: int, d: int) -> str:
    try:
        config = gpu.kernels.configs.pick(family, precision, rows=b, width=d)
    except LookupError:
        return "tiles of its own"
    return (
        f"tiles of {config.rows} rows by {config.columns} classes, {config.depth} deep, "
        f"{config.warps} warps, {config.stages} stages"
    )


def _why(name: str, *tensors: Tensor) -> str:
    if name == "triton":
        return "CUDA tensors"
    if name == "cpu":
        return "CPU tensors"
    for x in tensors:
        if x.dtype == torch.float64:
            return "float64 features"
        if not (x.is_cpu or x.is_cuda):
            return f"tensors on {x.device}"
        if x.is_cuda:
            refused = dispatch.triton_refuses(x.device.index)
            if refused is not None:
                return refused
    if all(x.is_cpu for x in tensors) and loader.try_cpu() is None:
        return "no CPU kernels, see fastood info"
    return "torch.func or forward-mode derivatives"


def _single(*tensors: Tensor) -> bool:
    return all(x.dtype != torch.float64 for x in tensors)


def _names(*tensors: Tensor) -> str:
    kinds = dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in tensors)
    return " and ".join(kinds)
