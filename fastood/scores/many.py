"""All asked scores from one pass over the similarities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from fastood.scores.bank import ClassBank, Head, Similarities
from fastood.scores.inputs import BLOCK, check_count, check_features
from fastood.scores.registry import Methods, resolve

__all__ = ["score"]


def score(
    image: Tensor,
    text: Tensor | Head,
    *,
    methods: Methods,
    local: Tensor | None = None,
    negatives: Tensor | None = None,
    groups: int = 100,
    seed: int | None = 0,
    remainder: Literal["drop", "spread"] = "drop",
    normalize: bool = True,
    logit_scale: float | None = None,
    rows: int | None = None,
) -> dict[str, Tensor]:
    """Every asked score of every image; similarities are computed once, a block of rows at a time.

    Args:
        image: (B, D) features.
        text: (K, D) class features, a ``ClassBank``, or any head with ``similarities(features,
            local=None)`` (adapted models).
        methods: names (``["mcm", "energy"]``), ``{label: (name, options)}``, so that one score
            can be asked at several temperatures, or a list of both.
        local: (B, P, D) patch features for ``l_mcm`` and ``gl_mcm``.
        negatives: (M, D) features of negative labels for ``neg_label`` (or in the ClassBank), with
            ``groups``, ``seed`` and ``remainder`` as in ``ClassBank``.
        logit_scale: γ of the model; tau of msp, energy, delta_energy, max_logit and neg_label then
            defaults to 1/γ instead of 0.01.
        rows: images per block; by default as many as keep a block near 32 MiB.
    Returns:
        ``{label: (B,)}`` in the order asked; higher means in-distribution throughout.
    Raises:
        ValueError: before any arithmetic on an unknown score or option or an unmet need; on shapes,
            dtypes or devices that do not fit; on NaN, Inf or zero rows.

    Example:
        >>> z, t = torch.eye(2), torch.eye(2)
        >>> out = score(z, t, methods={"mcm": "mcm", "sharp": ("mcm", {"tau": 0.1})})
        >>> [round(float(v[0]), 4) for v in out.values()]
        [0.7311, 1.0]
    """
    image = check_features("image", image, (2,), "(B, D)")
    if local is not None:
        local = check_features("local", local, (3,), "(B, P, D)")
        if len(local) != len(image):
            raise ValueError(f"local: expected patches of {len(image)} images, got {len(local)}")
    if isinstance(text, Tensor):
        text = ClassBank(
            text,
            negatives=negatives,
            groups=groups,
            seed=seed,
            remainder=remainder,
            normalize=normalize,
        )
    elif negatives is not None:
        raise ValueError("negatives: the head decides; give them to ClassBank(...) instead")
    check_head(text)
    if isinstance(text, ClassBank) and not normalize:
        text = text.as_is()
    bank = text if isinstance(text, ClassBank) else None
    resolved = resolve(
        methods,
        logit_scale=logit_scale,
        local=local is not None,
        negatives=None if bank is None else bank.negatives is not None,
        classes=None if bank is None else len(bank),
    )
    wants_local = any(spec.needs == "local" for spec, _ in resolved.values())
    parts: dict[str, list[Tensor]] = {label: [] for label in resolved}
    for z, s in similarity_blocks(text, image, local if wants_local else None, rows=rows):
        for label, (spec, options) in resolved.items():
            parts[label].append(spec.compute(s, z, **options))
    return {label: torch.cat(blocks) for label, blocks in parts.items()}


def check_head(head: Any) -> None:
    """Raise a TypeError unless ``head`` offers ``similarities``."""
    if not isinstance(head, Head):
        raise TypeError(
            "text: expected (K, D) features, a ClassBank or an object with "
            f"similarities(features, local=None), got {type(head).__name__}"
        )


def similarity_blocks(
    head: Head, image: Tensor, local: Tensor | None = None, *, rows: int | None = None
) -> Iterator[tuple[Tensor, Similarities]]:
    """Features and their similarities, a block of rows at a time (one empty block for B = 0)."""
    if rows is None:
        width = 4096
        if isinstance(head, ClassBank):
            width = len(head)
            if head.negatives is not None:
                width += head.negatives.shape[0] * head.negatives.shape[1]
        rows = max(1, BLOCK // (width * (1 if local is None else 1 + local.shape[1])))
    else:
        rows = check_count("rows", rows, 1, None)
    for i in range(0, max(1, len(image)), rows):
        z = image[i : i + rows]
        yield z, head.similarities(z, None if local is None else local[i : i + rows])
