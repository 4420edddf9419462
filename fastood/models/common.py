"""What every encoder does with devices, dtypes, batches of pixels and prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "PROMPT_PROBE",
    "TOKENIZER_PROBE",
    "as_device",
    "as_dtype",
    "check_pixels",
    "cut_prompts",
    "features_of",
    "module_device",
    "module_dtype",
    "seeded",
]

TOKENIZER_PROBE = "A photo of a Cardigan, 3 déjà-vu's."
"""Its tokens are part of a fingerprint: they tell tokenizers apart by case, digits and accents."""

PROMPT_PROBE = ("a", "a photo of a small brown dog, a type of pet.")
"""Two prompts of unequal length, on which every way to run a text tower has to agree."""

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


def as_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; without one, the current GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:0', got {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} was asked for, but torch sees no GPU; use device='cpu'")
    return found


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating dtype from a torch dtype or a name such as ``"bf16"``."""
    found = _DTYPES.get(dtype.lower()) if isinstance(dtype, str) else dtype
    if found not in set(_DTYPES.values()):
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    return found


def module_device(module: nn.Module) -> torch.device:
    """Where the first parameter lives; the CPU without parameters."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def module_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of most weights. Mixed-precision towers keep their norms in float32."""
    count: dict[torch.dtype, int] = {}
    for p in module.parameters():
        if p.is_floating_point():
            count[p.dtype] = count.get(p.dtype, 0) + p.numel()
    return max(count, key=lambda d: count[d]) if count else torch.float32


def check_pixels(pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``pixels`` where the towers want them.

    Raises:
        ValueError: if they are not (B, 3, H, W) floats.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(
            f"pixels: expected (B, 3, H, W), got {tuple(pixels.shape)}; "
            f"use encoder.preprocess on each image and stack the results"
        )
    if not pixels.is_floating_point():
        raise ValueError(
            f"pixels: expected normalised floats, got {pixels.dtype}; use encoder.preprocess"
        )
    return pixels.to(device=device, dtype=dtype, non_blocking=True)


def features_of(output: Any) -> Tensor:
    """The features in what a tower returns: a tensor, a tuple that starts with it, or an object.

    Newer transformers return an object whose ``pooler_output`` is already projected.
    """
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    if isinstance(pooled, Tensor):
        return pooled
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"a tower must return a tensor of features, got {type(output).__name__}; "
        f"wrap it in a function that returns the (B, D) tensor"
    )


def cut_prompts(tokens: Tensor, prompts: Sequence[str]) -> list[str]:
    """A warning if prompts fill the whole context: whatever was longer has been cut off.

    Right-padded rows repeat their last id only when at least two positions are padding, so a row
    is full when its last two ids differ and the last is not padding of the shorter rows.
    """
    if not len(tokens) or tokens.shape[1] < 2:
        return []
    padding = 0
    full = (tokens[:, -1] != padding) & (tokens[:, -1] != tokens[:, -2])
    rows = [prompts[i] for i in full.nonzero().flatten().tolist()]
    if not rows:
        return []
    return [
        f"{len(rows)} prompt(s) fill all {tokens.shape[1]} tokens of the context and are probably "
        f"cut off, first: {rows[0][:60]!r}"
    ]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fixed initial weights without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
