"""The scores by name: what each needs, how its temperature is chosen, where it comes from."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastood.ops.requests import Kind, Request
from fastood.scores.fitted import knn, mahalanobis
from fastood.scores.inputs import check_count, check_scalar, check_tau

__all__ = ["SCORES", "Methods", "ScoreSpec", "default_methods", "entries", "resolve"]

Labelled = Mapping[str, tuple[str, Mapping[str, Any]] | str]
Methods = Sequence[str | Labelled] | Labelled
"""Names, or ``{label: (name, options)}`` to ask one score several times, or both in one list."""


@dataclass(frozen=True)
class ScoreSpec:
    """One registered score.

    Attributes:
        name: as users write it.
        options: the options it takes, with the functional defaults.
        formula: one line, for reports.
        source: the paper.
        request: from its options, where it is a global score of one row of similarities.
        compute: from image features and options, where it is computed from a fit.
        model_tau: True where the field sets tau to 1/γ of the model rather than to 1.
        needs: ``"local"``, ``"negatives"`` or ``"fit"`` where similarities alone do not do.
    """

    name: str
    options: Mapping[str, Any]
    formula: str
    source: str
    request: Callable[..., Request] | None = field(default=None, repr=False)
    compute: Callable[..., Tensor] | None = field(default=None, repr=False)
    model_tau: bool = False
    needs: str | None = None


def _row(kind: Kind) -> Callable[..., Request]:
    def request(*, tau: float = 1.0) -> Request:
        return Request(kind, tau)

    return request


def _energy(*, tau: float, scale: str) -> Request:
    return Request(Kind.ENERGY, tau, flag=scale == "unit")


def _margin(*, tau: float | None) -> Request:
    return Request(Kind.MARGIN, 1.0 if tau is None else tau, c=2, flag=tau is not None)


def _delta_energy(*, tau: float, c: int, reset: float, joint: bool) -> Request:
    return Request(Kind.DELTA_ENERGY, tau, c, reset, joint)


def _mahalanobis(image: Tensor, *, fit: Any) -> Tensor:
    return mahalanobis(image, fit)


def _knn(image: Tensor, *, fit: Any, k: int) -> Tensor:
    return knn(image, fit, k=k)


_SPECS = (
    ScoreSpec(
        "max_similarity",
        {},
        "max_k s_k",
        "arXiv 2306.06048 (S_MS)",
        _row(Kind.MAX_SIMILARITY),
    ),
    ScoreSpec(
        "mcm",
        {"tau": 1.0},
        "max_k softmax_k(s / tau)",
        "arXiv 2211.13445 (S_MCM)",
        _row(Kind.MAX_SOFTMAX),
    ),
    ScoreSpec(
        "msp",
        {"tau": 0.01},
        "max_k softmax_k(s / tau)",
        "arXiv 1610.02136 (S_MSP)",
        _row(Kind.MAX_SOFTMAX),
        model_tau=True,
    ),
    ScoreSpec(
        "energy",
        {"tau": 0.01, "scale": "tau"},
        "tau log Σ_k exp(s_k / tau)",
        "arXiv 2010.03759",
        _energy,
        model_tau=True,
    ),
    ScoreSpec(
        "delta_energy",
        {"tau": 0.01, "c": 1, "reset": 0.0, "joint": False},
        "Σ_{j<=c} [lse(s / tau) - lse(s / tau with s_j := reset)]",
        "arXiv 2510.11296 (reimplemented from abstract and figure)",
        _delta_energy,
        model_tau=True,
    ),
    ScoreSpec(
        "max_logit",
        {"tau": 0.01},
        "max_k s_k / tau",
        "arXiv 1911.11132",
        _row(Kind.MAX_LOGIT),
        model_tau=True,
    ),
    ScoreSpec(
        "neg_entropy",
        {"tau": 1.0},
        "log K - H(softmax(s / tau))",
        "arXiv 2211.13445 (baseline)",
        _row(Kind.NEG_ENTROPY),
    ),
    ScoreSpec(
        "variance",
        {"tau": 1.0},
        "var_k softmax_k(s / tau)",
        "arXiv 2211.13445 (baseline)",
        _row(Kind.VARIANCE),
    ),
    ScoreSpec("margin", {"tau": None}, "s(1) - s(2)", "best versus second best", _margin),
    ScoreSpec(
        "l_mcm",
        {"tau": 1.0},
        "max_p max_k softmax_k(s_pk / tau)",
        "arXiv 2304.04521",
        needs="local",
    ),
    ScoreSpec(
        "gl_mcm",
        {"tau": 1.0, "weight": 1.0},
        "S_MCM + weight · L-MCM",
        "arXiv 2304.04521",
        needs="local",
    ),
    ScoreSpec(
        "neg_label",
        {"tau": 0.01},
        "mean_g sigmoid(lse(l) - lse(n_g))",
        "arXiv 2403.20078",
        model_tau=True,
        needs="negatives",
    ),
    ScoreSpec(
        "mahalanobis",
        {"fit": None},
        "max_k -(f - μ_k)' Σ⁻¹ (f - μ_k) / 2",
        "arXiv 1807.03888",
        compute=_mahalanobis,
        needs="fit",
    ),
    ScoreSpec(
        "knn",
        {"fit": None, "k": 50},
        "-‖f - f_(k)‖",
        "arXiv 2204.06507",
        compute=_knn,
        needs="fit",
    ),
)

SCORES: Mapping[str, ScoreSpec] = {spec.name: spec for spec in _SPECS}
"""Every score by name, in the order tables show them."""


def resolve(
    methods: Methods,
    *,
    logit_scale: float | None = None,
    local: bool | None = None,
    negatives: bool | None = None,
    classes: int | None = None,
) -> dict[str, tuple[ScoreSpec, dict[str, Any]]]:
    """Labels with their score and complete options, checked before any work starts.

    Args:
        methods: names, ``{label: (name, options)}``, or a list of both.
        logit_scale: γ of the model; where the field ties tau to it, an option left open becomes
            1/γ. None keeps the functional default 0.01.
        local, negatives: whether those are at hand; None skips the check.
        classes: K, to check ``c`` and the margin against; None skips the check.
    Raises:
        ValueError: on an unknown score (names the nearest), an unknown option, a score whose needs
            are not met, a repeated label, or none at all.
    """
    asked = entries(methods)
    if not asked:
        raise ValueError(f"methods: expected at least one of {', '.join(SCORES)}")
    resolved: dict[str, tuple[ScoreSpec, dict[str, Any]]] = {}
    for label, (name, options) in asked.items():
        spec = SCORES.get(name)
        if spec is None:
            near = difflib.get_close_matches(str(name), SCORES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(SCORES)}"
            raise ValueError(f"methods: unknown score {name!r}{hint}")
        unknown = set(options) - set(spec.options)
        if unknown:
            raise ValueError(
                f"{name}: unknown option {', '.join(sorted(map(repr, unknown)))}; it takes "
                f"{', '.join(spec.options) or 'none'}"
            )
        full = {**spec.options}
        if spec.model_tau and logit_scale is not None:
            full["tau"] = 1.0 / logit_scale
        full.update(options)
        _check_options(spec, full, local=local, negatives=negatives, classes=classes)
        resolved[label] = (spec, full)
    return resolved


def entries(methods: Methods) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """What was asked as ``{label: (name, options)}``, in order; only its form is checked.

    Raises:
        ValueError: on an entry that is neither a name nor ``{label: (name, options)}``, or a label
            asked for twice.
    """
    asked: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for item in [methods] if isinstance(methods, (str, Mapping)) else methods:
        if isinstance(item, str):
            item = {item: item}
        elif not isinstance(item, Mapping):
            raise _malformed(item)
        for label, entry in item.items():
            # not a match statement: torch.compile of torch 2.6 cannot trace one
            pair = (entry, {}) if isinstance(entry, str) else entry
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise _malformed(entry)
            name, options = pair
            if not isinstance(name, str) or not isinstance(options, Mapping):
                raise _malformed(entry)
            if label in asked:
                raise ValueError(
                    f"methods: {label!r} is asked for twice; use {{label: (name, options)}}"
                )
            asked[label] = name, options
    return asked


def _malformed(entry: object) -> ValueError:
    return ValueError(f"methods: expected names or {{label: (name, options)}}, got {entry!r}")


def _check_options(
    spec: ScoreSpec,
    options: Mapping[str, Any],
    *,
    local: bool | None,
    negatives: bool | None,
    classes: int | None,
) -> None:
    if options.get("tau") is not None:
        check_tau(options["tau"])
    for name in ("reset", "weight"):
        if name in options:
            check_scalar(name, options[name])
    if options.get("scale", "tau") not in ("tau", "unit"):
        raise ValueError(f'scale: expected "tau" or "unit", got {options["scale"]!r}')
    if "c" in options:
        check_count("c", options["c"], 1, classes, high_name="K = ")
    if spec.name == "margin" and classes is not None and classes < 2:
        raise ValueError(f"margin: expected at least two classes, got K = {classes}")
    if spec.needs == "local" and local is False:
        raise ValueError(f"{spec.name}: needs patch features; give local=(B, P, D)")
    if spec.needs == "negatives" and negatives is False:
        raise ValueError(f"{spec.name}: needs negative labels; give negatives=(M, D)")
    if spec.needs == "fit" and options.get("fit") is None:
        raise ValueError(
            f"{spec.name}: needs a bank of training features; "
            f"give {{label: ({spec.name!r}, {{'fit': fit_{spec.name}(...)}})}}"
        )


def default_methods(*, local: bool, classes: int) -> list[str]:
    """The scores that make sense without asking: all that need neither negatives nor a fit."""
    return [
        spec.name
        for spec in _SPECS
        if spec.needs is None or (spec.needs == "local" and local)
        if not (spec.name == "margin" and classes < 2)
        # ranks exactly as max_similarity: one row in a table is enough
        if spec.name != "max_logit"
    ]
