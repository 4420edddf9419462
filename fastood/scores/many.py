"""All asked scores from one pass over the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastood import reference
from fastood.kernels.precision import check_precision
from fastood.ops.requests import Kind, Request
from fastood.scores.bank import ClassBank, Head, Similarities
from fastood.scores.compute import RowScores, check_no_product, score_rows
from fastood.scores.grouped import neg_label
from fastood.scores.inputs import BLOCK, check_count, check_features, check_tau, check_tensor
from fastood.scores.local import local_rows
from fastood.scores.registry import Methods, ScoreSpec, resolve

__all__ = ["Asked", "Found", "check_head", "score", "scores_of_features", "scores_of_similarities"]

Asked = Mapping[str, tuple[ScoreSpec, Mapping[str, Any]]]
"""Labels with their score and complete options, as ``resolve`` returns them."""


class Found(NamedTuple):
    values: dict[str, Tensor]
    """(B,) by label."""
    classes: Tensor | None
    """(B,) int64, the nearest class, if asked for."""
    k: int
    """How many classes there are."""


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
    impl: str | None = None,
    precision: str | None = None,
) -> dict[str, Tensor]:
    """Every asked score of every image, from one pass over the classes.

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
        rows: images at a time; by default all, or as many as keep a block of similarities near
            32 MiB where there has to be one (other heads than a ``ClassBank``, the reference).
        impl, precision: as for the global scores. Heads other than a ``ClassBank`` multiply as
            they do: no precision there.
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
    image = check_tensor("image", image, (2,), "(B, D)")
    if local is not None:
        local = check_tensor("local", local, (3,), "(B, P, D)")
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
            impl=impl,
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
    if rows is not None:
        rows = check_count("rows", rows, 1, None)
    found = scores_of_features(
        resolved, text, image, local, rows=rows, impl=impl, precision=precision
    )
    return found.values


def scores_of_features(
    asked: Asked,
    head: Head,
    image: Tensor,
    local: Tensor | None = None,
    *,
    rows: int | None = None,
    impl: str | None = None,
    precision: str | None = None,
    classes: bool = False,
) -> Found:
    """Asked scores of features; a ``ClassBank`` takes them without keeping similarities.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, NaN, Inf or zero rows.
    """
    if not any(spec.needs == "local" for spec, _ in asked.values()):
        local = None
    bank = head if isinstance(head, ClassBank) else None
    if rows is None:
        rows = max(1, len(image)) if bank is not None else _rows_of_block(local)
    parts = []
    for i in range(0, max(1, len(image)), rows):
        z = image[i : i + rows]
        zl = None if local is None else local[i : i + rows]
        if bank is not None:
            parts.append(_of_bank(asked, bank, z, zl, impl, precision, classes))
        else:
            check_features("image", z, (2,), "(B, D)")
            s = head.similarities(z, zl)
            parts.append(
                scores_of_similarities(asked, s, z, impl=impl, precision=precision, classes=classes)
            )
    if len(parts) == 1:
        return parts[0]
    values = {label: torch.cat([part.values[label] for part in parts]) for label in asked}
    nearest = [part.classes for part in parts if part.classes is not None]
    return Found(values, torch.cat(nearest) if classes else None, parts[0].k)


def _rows_of_block(local: Tensor | None) -> int:
    width = 4096 * (1 if local is None else 1 + local.shape[1])
    return max(1, BLOCK // width)


def _of_bank(
    asked: Asked,
    bank: ClassBank,
    image: Tensor,
    local: Tensor | None,
    impl: str | None,
    precision: str | None,
    classes: bool,
) -> Found:
    how: dict[str, Any] = {"impl": impl, "precision": precision}
    return _assemble(
        asked,
        image,
        lambda requests: score_rows(requests, image, bank, None, classes=classes, **how),
        lambda taus: local_rows(taus, local, bank, None, **how),
        lambda tau: neg_label(image, bank, tau=tau, **how),
        classes,
        len(bank),
    )


def scores_of_similarities(
    asked: Asked,
    s: Similarities,
    image: Tensor | None = None,
    *,
    impl: str | None = None,
    precision: str | None = None,
    classes: bool = False,
) -> Found:
    """Asked scores of similarities at hand; ``image`` is for those that need a fit."""
    check_precision(precision)
    check_no_product(precision, "this head multiplies, not the kernels")

    def negatives(tau: float) -> Tensor:
        if s.negatives is None:  # resolve() has seen to it; for callers that come here directly
            raise ValueError("negatives: neg_label needs a ClassBank built with negatives=...")
        return reference.neg_label(s.image, s.negatives, check_tau(tau))

    return _assemble(
        asked,
        image,
        lambda requests: score_rows(requests, None, None, s.image, impl=impl, classes=classes),
        lambda taus: local_rows(taus, None, None, s.local, impl=impl),
        negatives,
        classes,
        s.image.shape[-1],
    )


def _assemble(
    asked: Asked,
    image: Tensor | None,
    rows: Callable[[tuple[Request, ...]], RowScores],
    local: Callable[[tuple[float, ...]], Tensor],
    negatives: Callable[[float], Tensor],
    classes: bool,
    k: int,
) -> Found:
    """Each kind of pass once, whatever number of scores shares it."""
    requests: dict[str, Request] = {}
    taus: dict[float, None] = {}
    for label, (spec, options) in asked.items():
        if spec.request is not None:
            requests[label] = spec.request(**options)
        elif spec.needs == "local":
            taus[options["tau"]] = None
            if spec.name == "gl_mcm":
                requests[label] = Request(Kind.MAX_SOFTMAX, options["tau"])
    unique = tuple(dict.fromkeys(requests.values()))
    if classes and not unique:
        unique = (Request(Kind.MAX_SIMILARITY),)
    of_rows = rows(unique) if unique else RowScores(torch.empty(0), None)
    of_patches = local(tuple(taus)) if taus else torch.empty(0)

    values: dict[str, Tensor] = {}
    for label, (spec, options) in asked.items():
        if label in requests:
            values[label] = of_rows.values[unique.index(requests[label])]
        if spec.needs == "local":
            patch = of_patches[list(taus).index(options["tau"])]
            if spec.name == "gl_mcm":
                values[label] = values[label] + options["weight"] * patch
            else:
                values[label] = patch
        elif spec.needs == "negatives":
            values[label] = negatives(options["tau"])
        elif spec.compute is not None:
            values[label] = spec.compute(image, **options)
    return Found(values, of_rows.classes, k)


def check_head(head: Any) -> None:
    """Raise a TypeError unless ``head`` offers ``similarities``."""
    if not isinstance(head, Head):
        raise TypeError(
            "text: expected (K, D) features, a ClassBank or an object with "
            f"similarities(features, local=None), got {type(head).__name__}"
        )
